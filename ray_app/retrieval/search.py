"""One retrieval, from a query to its hits, without Ray.

Owns the checks of a query, the filters (score, text length) and the order scope first, score second, text
last. The Serve deployment wraps `LocalRetriever`; tests and tools use it directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ray_app.errors import ConfigError, DatasetError, RetrieverError, ToolError
from ray_app.records import Hit
from ray_app.retrieval.batcher import Batch, Batcher, Limits
from ray_app.retrieval.build import CORPUS, VECTORS, read_manifest
from ray_app.retrieval.corpus import Corpus, IntArray
from ray_app.retrieval.encoder import Encoder, FloatArray
from ray_app.retrieval.gpu import DeviceIndex
from ray_app.retrieval.index import (
    EXACT,
    MIN_SCORE,
    Ranking,
    ScopeMap,
    UnknownScope,
    VectorIndex,
    check_fit,
    not_unit,
)

DEFAULT_TOP_K = 5
MAX_TOP_K = 1000
MIN_CHARS = 100
MAX_QUERY_CHARS = 1_000_000
DEFAULT_LIMITS = Limits()


class BadQuery(ToolError):
    """A query that no corpus could answer: empty, too long, or asking for too many documents."""


@dataclass(frozen=True)
class Query:
    text: str
    scope_id: str | None
    top_k: int = DEFAULT_TOP_K


@dataclass(frozen=True)
class Filters:
    """What a hit must pass: a score above `min_score`, a text longer than `min_chars` characters.

    `unscoped`: whether a query without a scope searches everything or is refused.
    """

    min_score: float = MIN_SCORE
    min_chars: int = MIN_CHARS
    mode: str = EXACT
    unscoped: Literal["deny", "search"] = "deny"


class Searcher:
    """Corpus, vectors and scopes that fit each other. `scopes` is None where everything may be seen."""

    def __init__(
        self, corpus: Corpus, index: VectorIndex, scopes: ScopeMap | None, encoder_dim: int, filters: Filters
    ) -> None:
        check_fit(corpus, index, encoder_dim)
        if scopes is None and filters.unscoped == "deny":
            raise ConfigError(
                "without a scope map every query would be refused; give examples or set unscoped: search"
            )
        self.corpus = corpus
        self.index = index
        self.scopes = scopes
        self.filters = filters

    @property
    def filters(self) -> Filters:
        """May be set at any time; a search that goes on keeps what it began with, or takes the new."""
        return self._filters

    @filters.setter
    def filters(self, filters: Filters) -> None:
        self._eligible = self.corpus.chars > filters.min_chars
        self._filters = filters

    def check(self, query: Query) -> Query:
        """Returns `query`. Raises BadQuery or UnknownScope, both before anything is encoded."""
        if not query.text.strip():
            raise BadQuery("the query is empty; expected a few key words or a short sentence")
        try:
            query.text.encode()
        except UnicodeEncodeError:
            raise BadQuery("the query holds half a surrogate pair, which is no character") from None
        if len(query.text) > MAX_QUERY_CHARS:
            raise BadQuery(f"the query has {len(query.text)} characters; at most {MAX_QUERY_CHARS} are read")
        if not 1 <= query.top_k <= MAX_TOP_K:
            raise BadQuery(f"topk is {query.top_k}; expected 1 to {MAX_TOP_K}")
        if query.scope_id is None and self.filters.unscoped == "deny":
            raise BadQuery("no question id (eid), and this retriever answers within a question's scope only")
        self._allowed(query)
        return query

    def answer(self, queries: list[Query], vectors: FloatArray) -> list[list[Hit]]:
        """The hits of each query; `vectors` float32 [n, dim]. Reads the texts of the winners only."""
        _check_lengths(vectors)
        rankings: dict[int, Ranking] = {}
        scoped = {i: rows for i, query in enumerate(queries) if (rows := self._allowed(query)) is not None}
        unscoped = [i for i in range(len(queries)) if i not in scoped]
        # One depth for all: a ranking is cut to each query's own, which changes nothing above it.
        depth = max(query.top_k for query in queries)
        filters = self.filters
        low, mode = filters.min_score, filters.mode
        found = self.index.search(vectors[list(scoped)], list(scoped.values()), depth, low, mode)
        rankings.update(zip(scoped, found, strict=True))
        if unscoped:
            found = self.index.search_all(vectors[unscoped], depth, low, self._eligible)
            rankings.update(zip(unscoped, found, strict=True))
        return [self._hits(rankings[i].first(query.top_k)) for i, query in enumerate(queries)]

    def probe(self) -> Query:
        """A query that this searcher must be able to answer, for health checks."""
        scoped = (
            (name for name in self.scopes.positions if len(self.scopes.rows(name))) if self.scopes else ()
        )
        return Query("health", next(iter(scoped), None), 1)

    def _allowed(self, query: Query) -> IntArray | None:
        if query.scope_id is None:
            return None
        if self.scopes is None:
            raise UnknownScope(
                f"question id {query.scope_id[:100]!r} given, but this retriever has no scopes; leave it out"
            )
        rows = self.scopes.rows(query.scope_id)
        return rows[self._eligible[rows]]

    def _hits(self, ranking: Ranking) -> list[Hit]:
        found = self.corpus.ids[ranking.rows].tolist(), self.corpus.texts(ranking.rows)
        return [Hit(*fields) for fields in zip(*found, ranking.scores.tolist(), strict=True)]


class LocalRetriever:
    """The retriever in this process: a searcher, an encoder and the batching between them."""

    def __init__(
        self,
        searcher: Searcher,
        encoder: Encoder,
        limits: Limits = DEFAULT_LIMITS,
        observe: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.searcher = searcher
        self.encoder = encoder
        self.batcher: Batcher[Query, list[Hit]] = Batcher(encoder, searcher.answer, limits, observe)

    @property
    def is_alive(self) -> bool:
        return self.batcher.is_alive

    async def retrieve(self, query: str, scope_id: str | None, top_k: int) -> list[Hit]:
        """Hits of the local index, best first. Raises BadQuery, UnknownScope, RetrieverError."""
        return await self.submit(Query(query, scope_id, top_k))

    def submit(self, query: Query) -> asyncio.Future[list[Hit]]:
        """Queues a query on the running loop. Raises what `retrieve` does, except while encoding."""
        return self.batcher.submit(self.searcher.check(query))

    def probe(self) -> asyncio.Future[list[Hit]]:
        """Queues a real search that ought to succeed."""
        return self.batcher.submit(self.searcher.probe())

    def close(self) -> None:
        """Answers what is queued, then ends the threads."""
        self.batcher.close()


def open_searcher(
    index_dir: Path,
    examples: Path | None,
    encoder: Encoder,
    filters: Filters = Filters(),
    corpus_path: Path | None = None,
    device: str = "cpu",
) -> Searcher:
    """Opens the corpus, the vectors (`vectors.npy` or `eval.index`) and the scope map.

    `corpus_path` defaults to the folder's corpus.arrow; for another `device` than "cpu" the vectors are
    copied there, in float16. Raises DatasetError for files that are missing, broken, or do not belong
    together or to this encoder.
    """
    built_with = read_manifest(index_dir).get("encoder")
    if isinstance(built_with, str) and _model_of(built_with) != _model_of(encoder.name):
        raise DatasetError(
            f"{str(index_dir)!r} was built with encoder {built_with!r}, not {encoder.name!r}; "
            "use that encoder or build the index again"
        )
    corpus = Corpus.open(corpus_path or index_dir / CORPUS)
    vectors = next((path for name in (VECTORS, "eval.index") if (path := index_dir / name).exists()), None)
    if vectors is None:
        raise DatasetError(f"{str(index_dir)!r} holds neither {VECTORS} nor eval.index; build the index")
    if vectors.name == VECTORS and not read_manifest(index_dir):
        raise DatasetError(
            f"{str(index_dir)!r} has no manifest: its vectors may not be those of its corpus; build it again"
        )
    scopes = None if examples is None else ScopeMap.from_examples(examples, corpus)
    index = VectorIndex.open(vectors) if device == "cpu" else DeviceIndex.open_on(vectors, device)
    return Searcher(corpus, index, scopes, encoder.dim, filters)


def _check_lengths(vectors: FloatArray) -> None:
    wrong = not_unit(vectors)
    if len(wrong):
        raise RetrieverError(
            f"the encoder gave a vector of length {np.linalg.norm(vectors[wrong[0]]):g} for a query, "
            "which is near nothing; use bfloat16 or float32 where float16 overflows"
        )


def _model_of(label: str) -> str:
    """The model in an encoder's label: its precision and the folder it lies in make no other vectors."""
    return label.partition("@")[0].rstrip("/").rsplit("/", 1)[-1]
