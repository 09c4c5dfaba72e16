"""What a vLLM engine says of its load: the KV cache in use, calls that wait in it, preemptions.

Two places tell: `/metrics` beside a server started by hand (`vllm:...`), and the metrics port of each node
of our own Ray cluster (`ray_vllm_...`). Only those that the config names, or that stand on a private or
loopback address, are asked; a hosted API never is. One that does not answer is unknown, never an error.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from ray_app.governor import Pressure
from ray_app.slots import RouteKey

EVERY_S = 2.0  # Ray's own series are ten seconds old at most by default, and cost a megabyte to read
RAY_EVERY_S = 10.0
TIMEOUT_S = 5.0
PREFIXES = ("vllm:", "ray_vllm_")
_LINE = re.compile(r"^(?:vllm:|ray_vllm_)(\w+)\{([^}]*)\}\s+([-+0-9.eE]+)")
_MODEL = re.compile(r'model_name="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Source:
    """A page that may tell of a route's engine, under the name that the engine knows the model by."""

    url: str
    served_name: str
    every_s: float = EVERY_S


def parse(text: str) -> dict[str, Pressure]:
    """Model -> its pressure, from a page of Prometheus text; replicas: the fullest, all that wait."""
    kv: dict[str, float] = {}
    queued: dict[str, float] = {}
    preempted: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith(PREFIXES) or not (found := _LINE.match(line)):
            continue
        name, labels, number = found.groups()
        model = named.group(1) if (named := _MODEL.search(labels)) else ""
        with suppress(ValueError):
            value = float(number)
            if name == "kv_cache_usage_perc":
                kv[model] = max(value, kv.get(model, 0.0))
            elif name == "num_requests_waiting":
                queued[model] = queued.get(model, 0.0) + value
            elif name == "num_preemptions_total":
                preempted[model] = preempted.get(model, 0.0) + value
    models = kv.keys() | queued.keys() | preempted.keys()
    return {name: Pressure(kv.get(name), queued.get(name), preempted.get(name, 0.0)) for name in models}


def own_page(base_url: str) -> str | None:
    """`/metrics` of the server behind `base_url`; None where it is not on this machine or a private net."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if host != "localhost":
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return None
        if not (address.is_loopback or address.is_private):
            return None
    return f"{parts.scheme}://{parts.netloc}/metrics"


class EngineMetrics:
    """Asks the pages of each route in turn; `of` is the newest answer."""

    def __init__(self, sources: Mapping[RouteKey, Sequence[Source]]) -> None:
        self._sources = sources
        self._pages: dict[str, dict[str, Pressure]] = {}

    def of(self, key: RouteKey) -> Pressure | None:
        """Over all pages; None while none has told of this model."""
        told = [
            pressure
            for source in self._sources.get(key, ())
            if (pressure := self._pages.get(source.url, {}).get(source.served_name))
        ]
        return joined(told) if told else None

    async def follow(self) -> None:
        """Read for as long as this runs."""
        pages = {source.url: source.every_s for sources in self._sources.values() for source in sources}
        if not pages:
            return
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            for url, every_s in pages.items():
                group.create_task(self._read(session, url, every_s))

    async def _read(self, session: aiohttp.ClientSession, url: str, every_s: float) -> None:
        while True:
            try:
                async with session.get(url, allow_redirects=False) as reply:
                    text = await reply.text() if reply.status == 200 else ""
                self._pages[url] = await asyncio.to_thread(parse, text)
            except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError):
                self._pages.pop(url, None)
            await asyncio.sleep(every_s)


def joined(pressures: Iterable[Pressure]) -> Pressure:
    """Of several replicas: the fullest cache, all that wait, all preemptions."""
    found = list(pressures)
    kv = [p.kv_used for p in found if p.kv_used is not None]
    queued = [p.queued for p in found if p.queued is not None]
    return Pressure(max(kv, default=None), sum(queued) if queued else None, sum(p.preemptions for p in found))
