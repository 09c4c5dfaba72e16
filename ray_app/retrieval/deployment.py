"""The retriever on Ray Serve: its deployment class and the builder.

Thin on purpose: searching is `LocalRetriever`'s, the wire `http_api`'s, the web `web_deployment`'s. Single
calls (HTTP, `retrieve`) are grouped at the door by `@serve.batch`; groups that a caller made itself
(`retrieve_group`, which `client.HandleRetriever` uses) go past it. Both end in one queue, from which the
encoder takes all that waits. The HTTP port has no authentication; keep it on loopback or behind something
that has.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, BackpressureConfig
from ray.serve.handle import DeploymentHandle

from ray_app.config import explain
from ray_app.errors import EvalError, RetrieverError
from ray_app.records import Hit, Retrieval, digest
from ray_app.retrieval import group_wire
from ray_app.retrieval.build import default_cache_dir, ensure_corpus, ensure_index, read_manifest
from ray_app.retrieval.config import Autoscaling, Knobs, RetrieverConfig
from ray_app.retrieval.encoder import Encoder, load_encoder
from ray_app.retrieval.http_api import RETRY_AFTER_S, build_http_app
from ray_app.retrieval.metrics import Meters
from ray_app.retrieval.search import LocalRetriever, Query, Searcher, open_searcher
from ray_app.retrieval.web_deployment import web_deployment

_log = logging.getLogger(__name__)

WAITING = "waiting"
HEALTH_TTL_S = 1.0
HEALTH_TIMEOUT_S = 10.0
# Who has answered within this time needs no trial search, which would have to wait behind the others.
PROGRESS_S = 10.0
# A micro-batch may take so long (a very long text, on a CPU) before its replica counts as stuck.
STUCK_S = 600.0
# Beyond its own limit, the fallback has so long to say what it has.
WEB_GRACE_S = 5.0
# Between two looks for a replica in the place of one that died.
WEB_AGAIN_S = 0.5

Ticket = asyncio.Future[list[Hit]] | EvalError


class RetrieverDeployment:
    """One replica: HTTP through `build_http_app`, and by handle `retrieve`, `retrieve_group` and `info`."""

    def __init__(
        self, config: RetrieverConfig, service_digest: str, web: DeploymentHandle | None = None
    ) -> None:
        threads = max(1, int(config.num_cpus))
        encoder = load_encoder(
            config.encoder,
            device=config.device,
            threads=threads,
            dtype=config.dtype,
            truncate_dim=config.truncate_dim,
        )
        self._config, self._knobs, self._web = config, config.knobs, web
        self._knobs_error = ""
        self._meters = Meters()
        searcher = open_index(config, encoder)
        self._retriever = LocalRetriever(searcher, encoder, config.limits(self._knobs), self._progress)
        self._info = _info(config, searcher, service_digest)
        self._healthy_at = self._progressed_at = -PROGRESS_S
        self._health_lock = asyncio.Lock()
        self._enqueue = self._door(self._knobs)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Turns knobs while queries go on.

        One that does not exist or fit turns none: `health` and `info` say so. An error here would make
        Serve stop this replica, and every other that it starts in its place.
        """
        try:
            knobs = self._config.knobs.changed(user_config)
        except ValidationError as error:
            self._knobs_error = f"user_config is not in force: {explain(error)}"
            _log.error("retriever: %s", self._knobs_error)
            return
        self._knobs, self._knobs_error = knobs, ""
        self._retriever.searcher.filters = self._config.filters(knobs)
        self._retriever.batcher.limits = self._config.limits(knobs)
        self._enqueue = self._door(knobs)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self)

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        """What is found for one query. Raises BadQuery, UnknownScope, RetrieverError."""
        return await self.search(Query(query, scope_id, top_k))

    async def retrieve_group(self, packed: bytes) -> AsyncIterator[bytes]:
        """Answers to a pickled list of queries, in parts as `group_wire` has them.

        Each part comes as soon as its queries are answered, whatever the others take.
        """
        queries = [Query(*fields) for fields in pickle.loads(packed)]
        positions = {
            asyncio.ensure_future(self._answer(query, self._submit(query))): position
            for position, query in enumerate(queries)
        }
        pending = set(positions)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for part in group_wire.packed((positions[task], answer_of(task)) for task in done):
                    yield part
        finally:
            for task in pending:
                task.cancel()

    async def retrieve_one(self, packed: bytes) -> bytes:
        """As `retrieve_group` for a list of one query: its only part."""
        [fields] = pickle.loads(packed)
        query = Query(*fields)
        try:
            answer: group_wire.Answer = await self._answer(query, self._submit(query))
        except EvalError as error:
            answer = error
        [part] = group_wire.packed([(0, answer)])
        return part

    async def info(self) -> dict[str, str]:
        """What this service is: digest, encoder, index, sizes, and as `policy` what decides its hits."""
        knobs, config = self._knobs, self._config
        web = "off" if config.web is None else f"below {config.min_local_hits} hits"
        policy = f"{knobs.mode}, score > {knobs.min_score:g}, over {knobs.min_chars} characters, web {web}"
        trouble = {"knobs_error": self._knobs_error} if self._knobs_error else {}
        return {**self._info, "policy": policy, **trouble}

    async def stats(self) -> dict[str, Any]:
        """Of this replica: sums since it started (`metrics.Totals`), its process, the queries that wait."""
        now = {"pid": os.getpid(), WAITING: self._retriever.batcher.waiting}
        return {**asdict(self._meters.totals), **now}

    async def unknown_scopes(self, question_ids: list[str]) -> list[str]:
        """Those of `question_ids` that a scoped search would refuse."""
        scopes = self._retriever.searcher.scopes
        return [name for name in question_ids if scopes is None or name not in scopes.positions]

    async def search(self, query: Query) -> Retrieval:
        """As `retrieve`."""
        return await self._answer(query, await self._enqueue(query))

    async def health(self) -> dict[str, Any]:
        """Encodes and searches, at most once a second, where it has not just done so for others.

        Raises RetrieverError when that fails.
        """
        async with self._health_lock:
            if time.monotonic() - self._healthy_at >= HEALTH_TTL_S:
                await self.check_health()
                self._healthy_at = time.monotonic()
        return {"status": "ok", **await self.info(), "documents": len(self._retriever.searcher.corpus)}

    async def check_health(self) -> None:
        """Serve's own periodic check; a replica that fails it is replaced.

        A trial search, but where answers come anyway, or are being worked on: behind a full queue it would
        take its time. Raises RetrieverError.
        """
        batcher = self._retriever.batcher
        if not batcher.is_alive:
            raise RetrieverError("a thread of the encoder has ended")
        if batcher.busy_s > STUCK_S:
            raise RetrieverError(f"the encoder has been at one micro-batch for {batcher.busy_s:.0f} s")
        has_progressed = time.monotonic() - self._progressed_at < PROGRESS_S
        if not has_progressed and batcher.busy_s < PROGRESS_S:
            await self._probe()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `replicas_for` decides by: queries, where Serve itself would count calls."""
        return {WAITING: float(self._retriever.batcher.waiting)}

    def __del__(self) -> None:
        if hasattr(self, "_retriever"):  # nothing to close where starting failed
            self._retriever.close()

    def _door(self, knobs: Knobs) -> Any:
        # One batch at a time is enough: its body only queues, and each caller then awaits its own
        # future. So no caller waits for the rest of its group, and cancelling one cancels one.
        gather = serve.batch(max_batch_size=knobs.max_batch_size, batch_wait_timeout_s=knobs.batch_wait_s)
        return gather(self._submit_all)

    async def _submit_all(self, queries: Sequence[Query]) -> list[Ticket]:
        return [self._submit(query) for query in queries]

    def _submit(self, query: Query) -> Ticket:
        try:
            return self._retriever.submit(query)
        except EvalError as error:  # returned, because an exception would fail the whole group
            return error

    async def _answer(self, query: Query, ticket: Ticket) -> Retrieval:
        if isinstance(ticket, EvalError):
            raise ticket
        try:
            hits = await ticket
        except EvalError:
            raise
        except Exception as error:  # of the encoder or the index: one line for who asked
            raise RetrieverError(f"{type(error).__name__}: {error}") from error
        enough = min(query.top_k, self._config.min_local_hits)
        if self._web is None or query.scope_id is None or len(hits) >= enough:
            return Retrieval(tuple(hits))
        return await self._with_web(query, hits, self._web)

    async def _with_web(self, query: Query, hits: list[Hit], web: DeploymentHandle) -> Retrieval:
        """The web's pages behind the local hits. A fallback that fails is told of, and fails nothing."""
        self._meters.fallback()
        assert self._config.web is not None
        limit_s = self._config.web.timeout_s + WEB_GRACE_S
        try:
            async with asyncio.timeout(limit_s):
                found = await _found(web, query.text, query.top_k - len(hits))
        except TimeoutError:
            return Retrieval(tuple(hits), web_error=f"no answer from the web fallback in {limit_s:g} s")
        except Exception as error:  # the deployment is away, or full
            reason = " ".join(str(error).split())[-300:]
            return Retrieval(tuple(hits), web_error=f"{type(error).__name__}: {reason}")
        return Retrieval((*hits, *found.hits), found.cost_usd, found.web_calls, found.web_error)

    def _progress(self, batch: Any) -> None:
        self._progressed_at = time.monotonic()
        self._meters.batch(batch)

    async def _probe(self) -> None:
        try:
            await asyncio.wait_for(self._retriever.probe(), HEALTH_TIMEOUT_S)
        except RetrieverError:
            raise
        except Exception as error:  # whatever the encoder raises, this service cannot search
            raise RetrieverError(f"a trial search failed: {type(error).__name__}: {error}") from error


def answer_of(task: asyncio.Task[Retrieval]) -> group_wire.Answer:
    error = task.exception()
    if error is None:
        return task.result()
    return error if isinstance(error, EvalError) else RetrieverError(f"{type(error).__name__}: {error}")


async def _found(web: DeploymentHandle, text: str, limit: int) -> Retrieval:
    """What the web has; asked again where the replica dies, which keeps what it paid for in its cache."""
    while True:
        try:
            found: Retrieval = await web.search.remote(text, limit)
        except RayActorError:
            await asyncio.sleep(WEB_AGAIN_S)
        else:
            return found


def retriever_app(
    config: RetrieverConfig, service_digest: str = "", user_config: Mapping[str, Any] | None = None
) -> Application:
    """The Serve application; `info` and /health report `service_digest` as this service's identity.

    `user_config` are knobs that differ from the config's; a Serve config that changes them restarts nothing.
    """
    deployment = serve.deployment(
        serve.ingress()(RetrieverDeployment),
        name="retriever",
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=config.drain_s,
        user_config=dict(user_config or {}),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": _gpus(config)},
        **_scale(config),
    )
    web = None if config.web is None else web_deployment(config.web)
    return deployment.bind(config, service_digest, web)


def _gpus(config: RetrieverConfig) -> float:
    if config.num_gpus is not None:
        return config.num_gpus
    return 1.0 if config.device.startswith("cuda") else 0.0


def _scale(config: RetrieverConfig) -> dict[str, Any]:
    if config.autoscaling is None:
        return {"num_replicas": config.num_replicas}
    return {"autoscaling_config": _autoscaling(config.autoscaling)}


def _autoscaling(scaling: Autoscaling) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.target_queries,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function="ray_app.retrieval.deployment:replicas_for"),
    )


def replicas_for(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Replicas for the queries that wait in all of them; Serve keeps to the bounds and the delays."""
    waiting = (context.aggregated_metrics or {}).get(WAITING, {})
    queries = sum(waiting.values()) + (context.total_queued_requests or 0)
    return queries / context.config.target_ongoing_requests, {}


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
    filters = config.filters(config.knobs)
    return open_searcher(index_dir, config.examples, encoder, filters, corpus_path, config.device)


def _info(config: RetrieverConfig, searcher: Searcher, service_digest: str) -> dict[str, str]:
    source = config.index_dir or config.corpus_jsonl
    manifest = read_manifest(searcher.corpus.path.parent)
    return {
        "digest": service_digest,
        "documents": str(len(searcher.corpus)),
        "scopes": str(len(searcher.scopes or ())),
        "missing_ids": str(len(searcher.scopes.missing) if searcher.scopes else 0),
        "encoder": config.encoder,
        "unscoped": config.unscoped,
        "index": digest(manifest) if manifest else str(source),
    }
