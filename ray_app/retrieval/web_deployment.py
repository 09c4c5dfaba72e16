"""The web fallback on Ray Serve: its deployment class and the builder.

Thin on purpose: searching is `WebSearcher`'s. The key is read from the environment of the replica's own
process, so that Ray neither stores nor shows it. One replica: callers who ask the same at the same time can
share a paid answer only within one process.
"""

from __future__ import annotations

import os

from ray import serve
from ray.serve import Application, metrics

from ray_app.records import Retrieval
from ray_app.retrieval.web import Measure, WebSearcher
from ray_app.retrieval.web_config import WebConfig, read_key

MEASURES: dict[Measure, str] = {
    "fallbacks": "queries for which the web was asked",
    "paid_calls": "calls of the search service that were paid for",
    "cost_usd": "US dollars paid, at list prices",
    "cache_hits": "answers that the disk cache had",
    "retries": "calls of the search service that were repeated",
    "errors": "fallbacks that brought nothing, or less than they should",
}


class WebDeployment:
    """One replica: `search` by handle."""

    def __init__(self, config: WebConfig) -> None:
        self._counters = {
            measure: metrics.Counter(f"retriever_web_{measure}", description=text)
            for measure, text in MEASURES.items()
        }
        self._searcher = WebSearcher(config, read_key(config.api_key_env, os.environ), self._count)

    async def search(self, query: str, limit: int) -> Retrieval:
        """At most `limit` web hits, best first, and what they cost. Never fails: see `web_error`."""
        return await self._searcher.search(query, limit)

    async def __del__(self) -> None:  # Serve awaits it when it ends a replica
        if hasattr(self, "_searcher"):  # nothing to close where starting failed
            await self._searcher.close()

    def _count(self, measure: Measure, value: float) -> None:
        if value > 0:  # all that a counter takes; a price may be zero
            self._counters[measure].inc(value)


def web_deployment(config: WebConfig) -> Application:
    """The fallback, to be bound to the deployment that calls it.

    Its replica does not start where the variable that `api_key_env` names is empty.
    """
    deployment = serve.deployment(
        WebDeployment,
        name="web",
        num_replicas=1,
        max_ongoing_requests=config.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.timeout_s + 5,  # what is paid for is cached before it leaves
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(config)
