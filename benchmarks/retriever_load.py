"""The clients of the retriever's benchmark, in a process of their own: a closed loop over HTTP or handles.

Over HTTP the answers are received whole and not decoded, but for those that are kept: what a client makes
of them is its own. By handle it is the client that our actors use, decoding included.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from benchmarks.child import argument, converse
from benchmarks.retriever_data import QUERIES, Query

TOP_K = 50
TIMEOUT_S = 300.0
WEB_ID = -1  # of pages, which have no id

Send = Callable[[Query, bool], Awaitable[list[int] | None]]


@dataclass
class Measured:
    """What one job saw: seconds in all, of each request, ids of the hits that were asked to be kept."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    extra_s: list[float] = field(default_factory=list)
    extra_hits: list[int] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)


class Clients:
    """Sends what jobs ask for; connections and handles are kept between jobs."""

    def __init__(self, queries: list[Query]) -> None:
        self._queries = queries
        # One for each address: Serve's HAProxy answers new routes on new connections only.
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._handles: dict[str, Any] = {}

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """A job, or the counts of an HTTP server (`stats`)."""
        return await (self._stats(question["stats"]) if "stats" in question else self.run(question))

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """A closed loop: `clients` at once send `count` queries from number `start` on, to `to`.

        It ends early after `seconds`, if given. `extra` are queries sent once each in the midst of the
        clients' first, and told apart in the answer. The ids of the first `keep` answers are told.
        """
        to: str = job["to"]
        send = self._over_http(to) if to.startswith("http://") else self._by_handle(to)
        measured = Measured()
        began = time.perf_counter()
        numbers = _until(began + job.get("seconds", float("inf")), job["start"], job["count"])
        keep_until = job["start"] + job.get("keep", 0)
        clients = [self._client(send, numbers, keep_until, measured) for _ in range(job["clients"])]
        extra = [self._extra(send, Query(*pair), measured) for pair in job.get("extra", [])]
        middle = len(clients) // 2
        early = [asyncio.create_task(client) for client in clients[:middle]]
        beside = [asyncio.create_task(request) for request in extra]
        await asyncio.gather(*early, *clients[middle:])
        measured.seconds = time.perf_counter() - began
        await asyncio.gather(*beside)
        return vars(measured)

    async def _client(self, send: Send, numbers: Iterator[int], keep_until: int, measured: Measured) -> None:
        for number in numbers:
            is_kept = number < keep_until
            sent = time.perf_counter()
            try:
                ids = await send(self._queries[number % len(self._queries)], is_kept)
            except Exception as error:
                measured.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                continue
            measured.latencies_s.append(time.perf_counter() - sent)
            if ids is not None:
                measured.kept[number] = ids

    async def _extra(self, send: Send, query: Query, measured: Measured) -> None:
        sent = time.perf_counter()
        try:
            ids = await send(query, True)
        except Exception as error:
            measured.errors[f"extra: {type(error).__name__}: {error}"[:200]] += 1
            return
        measured.extra_s.append(time.perf_counter() - sent)
        measured.extra_hits.append(len(ids or ()))

    def _over_http(self, url: str) -> Send:
        session, headers = self._session(url), {"Content-Type": "application/json"}

        async def send(query: Query, is_kept: bool) -> list[int] | None:
            body = {"queries": [query.text], "topk": TOP_K, "return_scores": True, "eid": query.eid}
            sent = session.post(f"{url}/retrieve", data=json.dumps(body).encode(), headers=headers)
            async with sent as reply:
                received = await reply.read()
                if reply.status != 200:
                    raise RuntimeError(f"HTTP {reply.status}: {received[:150]!r}")
            return [hit["document"].get("id", WEB_ID) for hit in json.loads(received)[0]] if is_kept else None

        return send

    def _by_handle(self, app: str) -> Send:
        from ray_app.retrieval.client import HandleRetriever  # imports Ray, which HTTP alone does not need

        client = self._handles.setdefault(app, HandleRetriever(app, TIMEOUT_S))

        async def send(query: Query, is_kept: bool) -> list[int] | None:
            found = await client.retrieve(query.text, query.eid, TOP_K)
            return [hit.document_id for hit in found.hits] if is_kept else None

        return send

    def _session(self, url: str) -> aiohttp.ClientSession:
        if url not in self._sessions:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            connector = aiohttp.TCPConnector(limit=0)
            self._sessions[url] = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._sessions[url]

    async def _stats(self, url: str) -> dict[str, Any]:
        async with self._session(url).get(f"{url}/stats") as reply:
            reply.raise_for_status()
            counted: dict[str, Any] = await reply.json()
            return counted

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()


def _until(ends_at: float, start: int, count: int) -> Iterator[int]:
    """Numbers from `start` on, at most `count`, none after `ends_at`."""
    for number in range(start, start + count):
        if time.perf_counter() >= ends_at:
            return
        yield number


def join_ray(address: str) -> None:
    """Become a driver of that session, as handles need. Call it on the main thread."""
    import ray  # reads its settings from the environment when it is imported
    from ray import serve  # noqa: F401 - sets its logging up, which is set again below

    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


async def main(folder: str) -> None:
    """Answer jobs until the input ends."""
    listed = itertools.starmap(Query, json.loads((Path(folder) / QUERIES).read_text()))
    clients = Clients(list(listed))
    await converse({"pid": os.getpid()}, clients.ask)
    await clients.close()


if __name__ == "__main__":
    given = argument()
    if given["ray_address"]:
        join_ray(given["ray_address"])
    uvloop.run(main(given["folder"]))
