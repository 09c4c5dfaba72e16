from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_app.errors import ConfigError, DatasetError, RetrieverError, UserError
from ray_app.retrieval.encoder import FloatArray, Tokens
from ray_app.retrieval.index import UnknownScope
from ray_app.retrieval.search import BadQuery, Filters, LocalRetriever, Query, Searcher, open_searcher
from tests.retrieval.data import WordEncoder, build_searcher, document


@pytest.fixture
def searcher(tmp_path: Path) -> Searcher:
    return build_searcher(tmp_path, WordEncoder(), Filters(unscoped="search"))


@pytest.fixture
def retriever(searcher: Searcher) -> Iterator[LocalRetriever]:
    retriever = LocalRetriever(searcher, WordEncoder())
    yield retriever
    retriever.close()


async def test_hits_come_from_the_scope_only_best_first(retriever: LocalRetriever) -> None:
    best = document("glacier", "south")  # row 13, an odd one
    odd = await retriever.retrieve(best, "odd", 4)
    assert (odd[0].text, odd[0].document_id, odd[0].source) == (best, 1000 + 7 * 13, "local")
    assert odd[0].score == pytest.approx(1, abs=1e-5)
    assert [hit.score for hit in odd] == sorted((hit.score for hit in odd), reverse=True)
    assert all((hit.document_id - 1000) // 7 % 2 == 1 for hit in odd)
    even = await retriever.retrieve(best, "even", 1000)
    assert len(even) == 24
    assert best not in [hit.text for hit in even]


async def test_without_a_scope_everything_is_searched_where_the_policy_says_so(
    retriever: LocalRetriever, tmp_path: Path
) -> None:
    everywhere = await retriever.retrieve(document("glacier", "south"), None, 1000)
    assert everywhere == await retriever.retrieve(document("glacier", "south"), "all", 1000)
    assert len(everywhere) == 47
    strict = build_searcher(tmp_path, WordEncoder())
    with pytest.raises(BadQuery, match="no question id"):
        strict.check(Query("glacier", None))


async def test_texts_of_a_hundred_characters_or_less_are_no_hits(retriever: LocalRetriever) -> None:
    assert "A desert." not in [hit.text for hit in await retriever.retrieve("A desert.", "all", 1000)]
    assert "A desert." not in [hit.text for hit in await retriever.retrieve("A desert.", None, 1000)]


async def test_queries_answered_together_keep_scope_and_depth_apart(retriever: LocalRetriever) -> None:
    asked = [
        ("glacier", "odd", 1),
        ("the orchard by the old road", None, 9),
        ("harbour", "none", 5),
        ("railway", "even", 3),
    ]
    alone = [await retriever.retrieve(*one) for one in asked]
    together = await asyncio.gather(*(retriever.retrieve(*one) for one in asked))
    assert list(together) == alone
    assert [len(hits) for hits in together] == [1, 9, 0, 3]


@pytest.mark.parametrize(
    ("text", "top_k", "complaint"),
    [
        ("", 5, "the query is empty"),
        (" \n", 5, "the query is empty"),
        ("\ud800", 5, "half a surrogate pair"),
        ("x" * 1_000_001, 5, "1000001 characters"),
        ("x", 0, "topk is 0; expected 1 to 1000"),
        ("x", -1, "topk is -1; expected 1 to 1000"),
        ("x", 1001, "topk is 1001; expected 1 to 1000"),
    ],
)
async def test_a_query_that_nothing_can_answer_is_refused(
    retriever: LocalRetriever, text: str, top_k: int, complaint: str
) -> None:
    with pytest.raises(BadQuery, match=complaint):
        await retriever.retrieve(text, "all", top_k)


async def test_an_unknown_question_is_an_error_and_costs_no_encoding(searcher: Searcher) -> None:
    encoder = WordEncoder()
    retriever = LocalRetriever(searcher, encoder)
    with pytest.raises(UnknownScope, match="'nobody'"):
        await retriever.retrieve("glacier", "nobody", 5)
    retriever.close()
    assert encoder.batches == []


def test_postfilter_mode_loses_hits_that_exact_finds(tmp_path: Path) -> None:
    query, vectors = Query(document("glacier", "south"), "even", 10), WordEncoder()
    exact = build_searcher(tmp_path, vectors)
    lossy = build_searcher(tmp_path, vectors, Filters(mode="postfilter:4"))
    vector = vectors.encode(vectors.tokenize([query.text]))
    full, part = exact.answer([query], vector)[0], lossy.answer([query], vector)[0]
    assert len(full) == 10
    assert 0 < len(part) < 4
    assert part == full[: len(part)]


async def test_a_probe_searches_for_real(retriever: LocalRetriever) -> None:
    assert isinstance(await retriever.probe(), list)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    build_searcher(tmp_path, WordEncoder())
    other = WordEncoder()
    other.name = "other"
    with pytest.raises(DatasetError, match="built with encoder 'words', not 'other'"):
        open_searcher(tmp_path, None, other, Filters(unscoped="search"))
    other.name, other.dim = "words@bfloat16", 32
    with pytest.raises(DatasetError, match="64 dimensions and the encoder gives 32"):
        open_searcher(tmp_path, None, other, Filters(unscoped="search"))
    (tmp_path / "vectors.npy").unlink()
    with pytest.raises(DatasetError, match="neither vectors"):
        open_searcher(tmp_path, None, WordEncoder(), Filters(unscoped="search"))


async def test_a_query_whose_vector_is_none_is_an_error_and_not_an_empty_answer(searcher: Searcher) -> None:
    class Overflowing(WordEncoder):
        def encode(self, queries: list[Tokens]) -> FloatArray:
            vectors = super().encode(queries)
            vectors[[len(tokens) == 1 for tokens in queries]] = np.nan
            return vectors

    retriever = LocalRetriever(searcher, Overflowing())
    good = asyncio.create_task(retriever.retrieve(document("glacier", "south"), "all", 1))
    with pytest.raises(RetrieverError, match="a vector of length nan"):
        await retriever.retrieve("overflow", "all", 1)
    assert [hit.text for hit in await good] == [document("glacier", "south")]
    retriever.close()


def test_vectors_without_a_manifest_are_no_index(tmp_path: Path) -> None:
    build_searcher(tmp_path, WordEncoder())
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="has no manifest: its vectors may not be those of its corpus"):
        open_searcher(tmp_path, tmp_path / "examples.json", WordEncoder())


def test_a_retriever_without_scopes_must_be_told_to_search_everything(tmp_path: Path) -> None:
    build_searcher(tmp_path, WordEncoder())
    with pytest.raises(ConfigError, match="unscoped: search"):
        open_searcher(tmp_path, None, WordEncoder())
    free = open_searcher(tmp_path, None, WordEncoder(), Filters(unscoped="search"))
    with pytest.raises(UserError, match="this retriever has no scopes"):
        free.check(Query("glacier", "q1"))
