from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from ray_app.errors import DatasetError
from ray_app.retrieval.corpus import Corpus, IntArray, build_corpus
from ray_app.retrieval.encoder import FloatArray
from ray_app.retrieval.index import (
    BoolArray,
    Ranking,
    ScopeMap,
    UnknownScope,
    VectorIndex,
    check_fit,
    postfilter_depth,
)
from tests.retrieval.data import unit, write_jsonl


def random_units(seed: int, count: int, dim: int = 24) -> FloatArray:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32))


def with_twins(seed: int = 0, count: int = 400) -> FloatArray:
    """Vectors of which many are exactly equal, so that ties decide."""
    vectors = random_units(seed, count)
    vectors[count // 2 :] = vectors[: count // 2][::-1]
    return vectors


def oracle(vectors: FloatArray, query: FloatArray, rows: IntArray, top_k: int, low: float) -> list[int]:
    """The ranking by plain arithmetic in double precision; equal vectors tie exactly here, too."""
    scored = [
        (-sum(float(a) * float(b) for a, b in zip(vectors[r], query, strict=True)), int(r)) for r in rows
    ]
    return [row for score, row in sorted(scored) if -score > low][:top_k]


def scopes(seed: int, count: int, total: int) -> list[IntArray]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(total, rng.integers(1, 90), replace=False)) for _ in range(count)]


@pytest.mark.parametrize("top_k", [1, 7, 1000])
def test_scoped_search_equals_brute_force_over_the_allowed_rows(top_k: int) -> None:
    vectors, queries, allowed = with_twins(), random_units(1, 20), scopes(2, 20, 400)
    found = VectorIndex(vectors).search(queries, allowed, top_k)
    for query, rows, ranking in zip(queries, allowed, found, strict=True):
        assert ranking.rows.tolist() == oracle(vectors, query, rows, top_k, 0.1)
        assert ranking.scores.tolist() == pytest.approx((vectors[ranking.rows] @ query).tolist(), abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 7, 150, 1000])
def test_unscoped_search_equals_brute_force_over_all_eligible_rows(top_k: int) -> None:
    vectors, queries = with_twins(), random_units(3, 8)
    eligible: BoolArray = np.arange(400) % 3 > 0
    found = VectorIndex(vectors).search_all(queries, top_k, 0.1, eligible)
    for query, ranking in zip(queries, found, strict=True):
        assert ranking.rows.tolist() == oracle(vectors, query, np.flatnonzero(eligible), top_k, 0.1)


def test_unscoped_search_ranks_near_twins_as_scoped_search_does() -> None:
    # FAISS rounds otherwise than we do, so which of these come first in it is as good as chance.
    noise = np.random.default_rng(10).normal(size=(2000, 384)) * 1e-7
    vectors = unit((random_units(11, 1, dim=384) + noise).astype(np.float32))
    index, queries = VectorIndex(vectors), vectors[:30]
    scoped = index.search(queries, [np.arange(2000)] * 30, 5)
    for mine, other in zip(index.search_all(queries, 5), scoped, strict=True):
        assert mine.rows.tolist() == other.rows.tolist()


def test_a_document_scores_the_same_in_every_scope_and_twins_rank_by_row() -> None:
    vectors = np.repeat(random_units(4, 1, dim=37), 50, axis=0)
    query, index = random_units(5, 1, dim=37), VectorIndex(vectors)
    whole = index.search(query, [np.arange(50)], 50, -1.0)[0]
    assert whole.rows.tolist() == list(range(50))
    assert len(set(whole.scores.tolist())) == 1
    for rows in (np.array([49]), np.array([3, 17, 31])):
        assert index.search(query, [rows], 50, -1.0)[0].scores[0] == whole.scores[0]


def test_the_least_score_is_excluded_itself() -> None:
    vectors = np.eye(4, dtype=np.float32)
    query = np.array([[0.5, 0.25, 0.75, 0.0]], dtype=np.float32)
    index = VectorIndex(vectors)
    assert index.search(query, [np.arange(4)], 9, 0.25)[0].rows.tolist() == [2, 0]
    assert index.search_all(query, 9, 0.25)[0].rows.tolist() == [2, 0]


def test_an_empty_scope_finds_nothing() -> None:
    nothing = np.empty(0, dtype=np.int64)
    ranking = VectorIndex(random_units(0, 5)).search(random_units(1, 1), [nothing], 5)[0]
    assert isinstance(ranking, Ranking)
    assert len(ranking.rows) == len(ranking.scores) == 0


@pytest.mark.parametrize("depth", [1, 10, 60, 400])
def test_postfilter_answers_a_prefix_of_the_exact_ranking_and_only_what_the_global_search_reached(
    depth: int,
) -> None:
    vectors, queries, allowed = with_twins(), random_units(6, 20), scopes(7, 20, 400)
    index = VectorIndex(vectors)
    exact = index.search(queries, allowed, 50)
    partial = index.search(queries, allowed, 50, mode=f"postfilter:{depth}")
    lost = 0
    for query, full, part in zip(queries, exact, partial, strict=True):
        reached = set(oracle(vectors, query, np.arange(400), depth, 0.1))
        assert part.rows.tolist() == full.rows.tolist()[: len(part.rows)]
        assert part.rows.tolist() == [row for row in full.rows.tolist() if row in reached]
        lost += len(full.rows) - len(part.rows)
    assert (lost == 0) == (depth == 400)


@pytest.mark.parametrize("mode", ["", "fast", "postfilter", "postfilter:0", "postfilter:x", "postfilter:-1"])
def test_an_unknown_mode_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="expected 'exact' or 'postfilter:K'"):
        postfilter_depth(mode)


@pytest.mark.parametrize("flat", [faiss.IndexFlatIP, faiss.IndexFlatL2])
def test_a_flat_faiss_file_answers_as_the_array_does(tmp_path: Path, flat: type) -> None:
    vectors, queries, allowed = with_twins(), random_units(8, 5), scopes(9, 5, 400)
    stored = flat(24)
    stored.add(vectors)
    faiss.write_index(stored, str(tmp_path / "eval.index"))
    np.save(tmp_path / "vectors.npy", vectors)
    first = VectorIndex.open(tmp_path / "eval.index")
    second = VectorIndex.open(tmp_path / "vectors.npy")
    del stored
    assert (len(first), first.dim) == (len(second), second.dim) == (400, 24)
    for mine, other in (
        (first.search(queries, allowed, 9), second.search(queries, allowed, 9)),
        (first.search_all(queries, 9), second.search_all(queries, 9)),
    ):
        assert [r.rows.tolist() for r in mine] == [r.rows.tolist() for r in other]
        assert [r.scores.tolist() for r in mine] == [r.scores.tolist() for r in other]


def test_missing_truncated_and_foreign_index_files_are_refused(tmp_path: Path) -> None:
    vectors = random_units(0, 100)
    stored = faiss.IndexFlatIP(24)
    stored.add(vectors)
    faiss.write_index(stored, str(tmp_path / "whole.index"))
    np.save(tmp_path / "whole.npy", vectors)
    for name in ("index", "npy"):
        content = (tmp_path / f"whole.{name}").read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(content[: len(content) // 2])
        with pytest.raises(DatasetError, match="unreadable"):
            VectorIndex.open(tmp_path / f"cut.{name}")
        with pytest.raises(DatasetError, match="does not exist"):
            VectorIndex.open(tmp_path / f"absent.{name}")
    graph = faiss.IndexHNSWFlat(24, 8)
    graph.add(vectors)
    faiss.write_index(graph, str(tmp_path / "graph.index"))
    with pytest.raises(DatasetError, match="IndexHNSWFlat; expected a flat index"):
        VectorIndex.open(tmp_path / "graph.index")


def test_vectors_that_are_not_unit_float32_rows_are_refused() -> None:
    with pytest.raises(DatasetError, match="expected unit vectors"):
        VectorIndex(2 * random_units(0, 10))
    with pytest.raises(DatasetError, match="expected unit vectors"):
        VectorIndex(np.full((3, 4), np.nan, dtype=np.float32))
    for wrong in (np.ones((3, 4)), np.ones(4, dtype=np.float32), np.empty((0, 4), dtype=np.float32)):
        with pytest.raises(DatasetError, match="expected float32"):
            VectorIndex(wrong)  # type: ignore[arg-type]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    lines = [{"id": 100 - i, "content": "x"} for i in range(10)]
    build_corpus(write_jsonl(tmp_path / "c.jsonl", lines), tmp_path / "c.arrow")
    return Corpus.open(tmp_path / "c.arrow")


def test_index_corpus_and_encoder_must_fit(corpus: Corpus) -> None:
    check_fit(corpus, VectorIndex(random_units(0, 10)), 24)
    with pytest.raises(DatasetError, match="9 vectors and the corpus 10 documents"):
        check_fit(corpus, VectorIndex(random_units(0, 9)), 24)
    with pytest.raises(DatasetError, match="24 dimensions and the encoder gives 384"):
        check_fit(corpus, VectorIndex(random_units(0, 10)), 384)


def test_scopes_are_sorted_rows_without_doubles_and_report_absent_ids(tmp_path: Path, corpus: Corpus) -> None:
    path = tmp_path / "examples.json"
    path.write_text(json.dumps({"q1": [91, 100, 91, "95", 7], "q2": [], "q3": [8, 7]}))
    scopes = ScopeMap.from_examples(path, corpus)
    assert len(scopes) == 3
    assert scopes.rows("q1").tolist() == [0, 5, 9]
    assert scopes.rows("q2").tolist() == scopes.rows("q3").tolist() == []
    assert scopes.missing.tolist() == [7, 8]


def test_an_unknown_question_is_an_error_that_names_it(tmp_path: Path, corpus: Corpus) -> None:
    path = tmp_path / "examples.json"
    path.write_text("{}")
    with pytest.raises(UnknownScope, match=r"unknown question id '\.\./x'"):
        ScopeMap.from_examples(path, corpus).rows("../x")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[1]", "is no object"),
        ("{", "is not JSON"),
        ('{"q": 1}', "'q' holds int, not a list"),
        ('{"q": [1, "1.0"]}', "'q' lists '1.0', which is not an integer"),
        ('{"q": [null]}', "'q' lists None, which is not an integer"),
    ],
)
def test_a_malformed_scope_map_is_refused(
    tmp_path: Path, corpus: Corpus, content: str, complaint: str
) -> None:
    path = tmp_path / "examples.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=complaint):
        ScopeMap.from_examples(path, corpus)
    with pytest.raises(DatasetError, match="cannot read scope map"):
        ScopeMap.from_examples(tmp_path / "absent.json", corpus)
