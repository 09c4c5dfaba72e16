"""From a run config to what bounds its routes: the limits of each, and the pages that tell of its engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ray_app import events
from ray_app.concurrency import Bounds
from ray_app.config import Adaptive, Endpoint, ModelConfig
from ray_app.endpoint import endpoint_url
from ray_app.engine_metrics import RAY_EVERY_S, Source, own_page
from ray_app.slots import RouteKey


def bounds(models: Mapping[str, ModelConfig], service_urls: Mapping[str, str]) -> dict[RouteKey, Bounds]:
    """The bounds of each route; a fixed limit is a start that is floor and ceiling too."""
    return {
        RouteKey(name, endpoint_url(endpoint, service_urls)): endpoint_bounds(endpoint)
        for name, model in models.items()
        for endpoint in model.endpoints
    }


def endpoint_bounds(endpoint: Endpoint) -> Bounds:
    wanted = endpoint.concurrency
    if isinstance(wanted, int):
        return Bounds(wanted, wanted, wanted)
    settings = wanted if isinstance(wanted, Adaptive) else Adaptive()
    return Bounds(settings.start, 1, settings.max)


def sources(
    models: Mapping[str, ModelConfig], service_urls: Mapping[str, str], ray_pages: Sequence[str]
) -> dict[RouteKey, list[Source]]:
    """Where to ask for each route: what its config names; a service's nodes; a private server's own page."""
    return {
        RouteKey(name, endpoint_url(endpoint, service_urls)): _sources(
            endpoint, model.served_name or name, ray_pages
        )
        for name, model in models.items()
        for endpoint in model.endpoints
    }


def _sources(endpoint: Endpoint, served_name: str, ray_pages: Sequence[str]) -> list[Source]:
    if endpoint.metrics_url is not None:
        return [Source(endpoint.metrics_url, served_name)]
    if endpoint.base_url is None:
        return [Source(page, served_name, RAY_EVERY_S) for page in ray_pages]
    page = own_page(endpoint.base_url)
    return [] if page is None else [Source(page, served_name)]


def spent_usd(run_dir: Path, writer_prefix: str = "") -> float:
    """What the calls of this run have cost so far; second opinions are no part of it.

    With a prefix of `Options.writer_prefix`, those of one process, whoever wrote them into the log at last.
    """
    query = f"""
        select coalesce(sum(cost_usd), 0.0) from events
        where kind in ('model_call', 'retrieval', 'code') and not coalesce(is_replayed, false)
            and not {events.SECOND_OPINION} and starts_with(event_id, $prefix)
    """
    with events.connect(run_dir) as log:
        return float(log.execute(query, {"prefix": writer_prefix}).fetchall()[0][0])
