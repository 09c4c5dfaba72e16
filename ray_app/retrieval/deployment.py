"""The retriever on Ray Serve: its config, its deployment class and the builder.

Thin on purpose: searching is `LocalRetriever`'s, the wire `http_api`'s. The HTTP port has no
authentication; keep it on loopback or behind something that has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from ray_app.errors import EvalError, RetrieverError
from ray_app.records import Hit, digest
from ray_app.retrieval.batcher import Limits
from ray_app.retrieval.build import default_cache_dir, ensure_corpus, ensure_index, read_manifest
from ray_app.retrieval.encoder import BUNDLED, Dtype, Encoder, load_encoder
from ray_app.retrieval.http_api import RETRY_AFTER_S, build_http_app
from ray_app.retrieval.index import EXACT, MIN_SCORE, postfilter_depth
from ray_app.retrieval.search import MIN_CHARS, Filters, LocalRetriever, Query, Searcher, open_searcher

HEALTH_TTL_S = 1.0
HEALTH_TIMEOUT_S = 10.0

Ticket = asyncio.Future[list[Hit]] | EvalError


class RetrieverConfig(BaseModel):
    """Arguments of the retriever application.

    Either `index_dir` (built before), or `corpus_jsonl`, from which an index is built at the first start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index_dir: Path | None = None
    corpus_jsonl: Path | None = None
    examples: Path | None = Field(None, description="question id -> allowed document ids")
    cache_dir: Path | None = Field(None, description="where indexes are built; default: the user's cache")
    encoder: str = BUNDLED
    device: str = "cpu"
    dtype: Dtype = "float32"
    mode: str = Field(EXACT, description="exact, or postfilter:K for parity with a global top K")
    unscoped: Literal["deny", "search"] = "deny"
    min_score: float = Field(MIN_SCORE, description="hits score more than this")
    min_chars: int = Field(MIN_CHARS, ge=0, description="hits have more characters than this")
    max_batch_size: int = Field(64, gt=0)
    batch_wait_s: float = Field(0.0, ge=0)
    token_budget: int = Field(4096, gt=0, description="tokens of one micro-batch, padding included")
    max_ongoing_requests: int = Field(512, gt=0, description="queries that one replica holds")
    max_queued_requests: int = Field(1024, gt=0, description="queries that wait at each caller; then 503")
    num_cpus: float = Field(1.0, gt=0, description="of one replica; also its encoder threads")
    num_replicas: int = Field(1, gt=0)

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, mode: str) -> str:
        postfilter_depth(mode)
        return mode

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.index_dir is None) == (self.corpus_jsonl is None):
            raise ValueError("give index_dir or corpus_jsonl, and not both")
        if self.examples is None and self.unscoped == "deny":
            raise ValueError("without examples every query would be refused; set unscoped: search")
        return self

    def limits(self) -> Limits:
        return Limits(self.max_ongoing_requests, self.max_batch_size, self.token_budget)

    def filters(self) -> Filters:
        return Filters(self.min_score, self.min_chars, self.mode, self.unscoped)


class RetrieverDeployment:
    """One replica: HTTP through `build_http_app`, and `retrieve` and `info` by handle."""

    def __init__(self, config: RetrieverConfig, service_digest: str) -> None:
        threads = max(1, int(config.num_cpus))
        encoder = load_encoder(config.encoder, device=config.device, threads=threads, dtype=config.dtype)
        self._retriever = LocalRetriever(open_index(config, encoder), encoder, config.limits())
        self._info = _info(config, self._retriever.searcher, service_digest)
        self._healthy_at = -HEALTH_TTL_S
        self._health_lock = asyncio.Lock()
        # One batch at a time is enough: its body only queues, and each caller then awaits its own
        # future. So no caller waits for the rest of its group, and cancelling one cancels one.
        self._enqueue = serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_s
        )(self._submit_all)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self)

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> list[Hit]:
        """Hits for one query, best first. Raises BadQuery, UnknownScope, RetrieverError."""
        return await self.search(Query(query, scope_id, top_k))

    async def info(self) -> dict[str, str]:
        """What this service is: digest, encoder, index, sizes and policy."""
        return self._info

    async def unknown_scopes(self, question_ids: list[str]) -> list[str]:
        """Those of `question_ids` that a scoped search would refuse."""
        scopes = self._retriever.searcher.scopes
        return [name for name in question_ids if scopes is None or name not in scopes.positions]

    async def search(self, query: Query) -> list[Hit]:
        """As `retrieve`."""
        ticket: Ticket = await self._enqueue(query)
        if isinstance(ticket, EvalError):
            raise ticket
        return await ticket

    async def health(self) -> dict[str, Any]:
        """Encodes and searches, at most once a second. Raises RetrieverError when that fails."""
        async with self._health_lock:
            if time.monotonic() - self._healthy_at >= HEALTH_TTL_S:
                await self._probe()
                self._healthy_at = time.monotonic()
        return {"status": "ok", **self._info, "documents": len(self._retriever.searcher.corpus)}

    async def check_health(self) -> None:
        """Serve's own periodic check: replaces a replica whose encoder thread has ended."""
        if not self._retriever.is_alive:
            raise RetrieverError("the encoder thread has ended")

    async def _probe(self) -> None:
        try:
            await asyncio.wait_for(self._retriever.probe(), HEALTH_TIMEOUT_S)
        except RetrieverError:
            raise
        except Exception as error:  # whatever the encoder raises, this service cannot search
            raise RetrieverError(f"a trial search failed: {type(error).__name__}: {error}") from error

    async def _submit_all(self, queries: Sequence[Query]) -> list[Ticket]:
        return [self._submit(query) for query in queries]

    def _submit(self, query: Query) -> Ticket:
        try:
            return self._retriever.submit(query)
        except EvalError as error:  # returned, because an exception would fail the whole group
            return error


def retriever_app(config: RetrieverConfig, service_digest: str = "") -> Application:
    """The Serve application; `info` and /health report `service_digest` as this service's identity."""
    deployment = serve.deployment(
        serve.ingress()(RetrieverDeployment),
        name="retriever",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": 1 if config.device.startswith("cuda") else 0,
        },
    )
    return deployment.bind(config, service_digest)


def open_index(config: RetrieverConfig, encoder: Encoder) -> Searcher:
    """Opens the configured index, building what is missing. Raises DatasetError for unusable files."""
    cache_dir = config.cache_dir or default_cache_dir()
    corpus_path = None
    if config.index_dir is not None:
        index_dir = config.index_dir
        corpus_path = ensure_corpus(index_dir, cache_dir)
    else:
        assert config.corpus_jsonl is not None  # the config's validator saw to it
        index_dir = ensure_index(config.corpus_jsonl, encoder, cache_dir)
    return open_searcher(index_dir, config.examples, encoder, config.filters(), corpus_path)


def _info(config: RetrieverConfig, searcher: Searcher, service_digest: str) -> dict[str, str]:
    source = config.index_dir or config.corpus_jsonl
    manifest = read_manifest(searcher.corpus.path.parent)
    return {
        "digest": service_digest,
        "documents": str(len(searcher.corpus)),
        "scopes": str(len(searcher.scopes or ())),
        "missing_ids": str(len(searcher.scopes.missing) if searcher.scopes else 0),
        "encoder": config.encoder,
        "mode": config.mode,
        "unscoped": config.unscoped,
        "index": digest(manifest) if manifest else str(source),
    }
