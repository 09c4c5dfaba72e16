"""A local server that speaks Tavily's API and can misbehave, for tests of the web fallback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

KEY = "tvly-secret-of-the-tests"


def text_of(url: str) -> str:
    """What the page at `url` says; long enough to be a hit."""
    return f"{url} is about glaciers. " + "Ice moves slowly. " * 8


@dataclass
class TavilyServer:
    """Finds the pages that it is given. Remembers what it was asked, and how much at once.

    `faults` names what happens in place of an answer: by "/search" or by the url of a page, or "*" for all
    others, the next of the list, the last one for ever. A status with headers, "hang", "reset", "ok", or the
    bytes of a reply.
    """

    scores: Sequence[tuple[str, float]]
    texts: dict[str, Any]
    page_s: float = 0.0
    faults: dict[str, list[Any]] = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    extractions: list[dict[str, Any]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed_early: asyncio.Event = field(default_factory=asyncio.Event)
    most_at_once: int = 0
    url: str = ""
    _now: int = 0

    @property
    def asked(self) -> int:
        return len(self.searches) + len(self.pages)

    def found(self, query: str) -> Sequence[tuple[str, float]]:
        """Urls and scores."""
        return self.scores

    def text(self, url: str) -> str | None:
        return self.texts.get(url)

    async def search(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.searches.append(body)
        fault = await self._fault(request, "/search")
        if fault is not None:
            return fault
        if len(body["query"]) > 400:
            return _refusal(400, "Query is too long. Max query length is 400 characters.")
        if body["max_results"] > 20 or not 1 <= body["chunks_per_source"] <= 3:
            return web.json_response({"detail": [{"msg": "Input should be less"}]}, status=422)
        results = [
            {"title": "t", "url": url, "content": "a snippet", "score": score, "raw_content": None}
            for url, score in self.found(body["query"])
        ]
        return web.json_response({"query": body["query"], "results": results, "response_time": 0.1})

    async def extract(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.extractions.append(body)
        [url] = body["urls"]
        self.pages.append(url)
        fault = await self._fault(request, url)
        if fault is not None:
            return fault
        await asyncio.sleep(self.page_s)
        text = self.text(url)
        results = [] if text is None else [{"url": url, "raw_content": text, "images": []}]
        failed = [{"url": url, "error": "Failed to retrieve content"}] if text is None else []
        return web.json_response({"results": results, "failed_results": failed, "response_time": 0.1})

    async def _fault(self, request: web.Request, name: str) -> web.StreamResponse | None:
        self.arrived.set()
        await self.gate.wait()
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            # Some servers do repeat what they were sent.
            return _refusal(401, f"invalid key: {request.headers.get('Authorization')}")
        faults = self.faults.get(name) or self.faults.get("*", ["ok"])
        fault = faults.pop(0) if len(faults) > 1 else faults[0]
        if fault == "ok":
            return None
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
        if isinstance(fault, bytes):
            return web.Response(body=fault, content_type="application/json")
        status, headers = fault if isinstance(fault, tuple) else (200, {})
        return _refusal(status, f"refused {request.headers['Authorization']}", headers)

    @web.middleware
    async def counted(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            answer: web.StreamResponse = await handler(request)
            return answer
        except asyncio.CancelledError:
            self.closed_early.set()
            raise
        finally:
            self._now -= 1


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"detail": {"error": message}}, status=status, headers=headers)


@asynccontextmanager
async def serving_tavily(*scores: tuple[str, float], port: int = 0) -> AsyncIterator[TavilyServer]:
    """A server on loopback (0: a free port) that finds these urls; closed at the end."""
    server = TavilyServer(scores, {url: text_of(url) for url, _ in scores})
    async with serving(server, port):
        yield server


@asynccontextmanager
async def serving(server: TavilyServer, port: int = 0) -> AsyncIterator[None]:
    server.gate.set()
    app = web.Application(middlewares=[server.counted])
    app.router.add_post("/search", server.search)
    app.router.add_post("/extract", server.extract)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        await runner.cleanup()
