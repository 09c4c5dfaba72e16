"""A web search that only takes its time: Tavily's API on loopback, as a child of the benchmark."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from benchmarks.child import argument, converse

PAGES = 20
TEXT = "Word after word after word. " * 40


class Pages:
    """Finds PAGES pages for everything, each of its own, and reads them all."""

    def __init__(self, search_s: float, page_s: float) -> None:
        self._search_s, self._page_s = search_s, page_s
        self._searches = 0

    async def search(self, request: web.Request) -> web.Response:
        self._searches += 1
        number = self._searches
        await asyncio.sleep(self._search_s)
        found = [
            {"url": f"http://pages.invalid/{number}/{page}", "score": 1 - page / 100} for page in range(PAGES)
        ]
        return web.json_response({"results": found})

    async def extract(self, request: web.Request) -> web.Response:
        urls = (await request.json())["urls"]
        await asyncio.sleep(self._page_s)
        return web.json_response({"results": [{"url": url, "raw_content": TEXT} for url in urls]})


async def main(search_s: float, page_s: float) -> None:
    """Serve until the input ends."""
    pages = Pages(search_s, page_s)
    app = web.Application()
    app.router.add_post("/search", pages.search)
    app.router.add_post("/extract", pages.extract)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await converse({"url": f"http://127.0.0.1:{runner.addresses[0][1]}"}, _nothing)
    await runner.cleanup()


async def _nothing(question: dict[str, Any]) -> dict[str, Any]:
    return {}


if __name__ == "__main__":
    asyncio.run(main(**argument()))
