"""The web fallback: a search, the best of its pages read at the same time, and what that cost.

Owns the time limit of a fallback, the prices, and the order in which pages are tried; a fallback that fails
says why and raises nothing. Answers are cached on disk, and callers who ask the same at the same time share
one answer, which one of them pays for. Prices are a list, not a bill: a call that was refused, failed or
was cut off counts as free.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from ray_app.records import Hit, Retrieval, digest
from ray_app.retrieval.flights import Flights
from ray_app.retrieval.tavily import MAX_QUERY_CHARS, Found, Tavily, WebError
from ray_app.retrieval.web_cache import DiskCache
from ray_app.retrieval.web_config import WebConfig

MIN_PAGE_CHARS = 100

Measure = Literal["fallbacks", "paid_calls", "cost_usd", "cache_hits", "retries", "errors"]
Count = Callable[[Measure, float], None]

T = TypeVar("T")


@dataclass(frozen=True)
class _Question(Generic[T]):
    """Something that one call of Tavily answers. `parse` reads what the cache holds of it."""

    name: tuple[str, ...]
    call: Callable[[float], Awaitable[T]]
    parse: Callable[[object], T]
    price_usd: float


@dataclass(frozen=True)
class _Answer(Generic[T]):
    value: T
    cost_usd: float = 0.0
    calls: int = 0


@dataclass
class _Bill:
    cost_usd: float = 0.0
    calls: int = 0


def _uncounted(measure: Measure, value: float) -> None:
    pass


class WebSearcher:
    """Answers queries from the web, on one event loop. `count` is told of what happens, as it happens.

    Raises ConfigError for a key or a cache folder that cannot be used.
    """

    def __init__(self, config: WebConfig, key: str, count: Count = _uncounted) -> None:
        self._config, self._count = config, count
        self._tavily = Tavily(
            key,
            config.base_url,
            config.call_timeout_s,
            config.max_concurrency,
            on_retry=lambda error: count("retries", 1),
        )
        self._cache = DiskCache(config.cache_folder, config.cache_max_age_s)
        self._searches: Flights[_Answer[tuple[Found, ...]]] = Flights()
        self._pages: Flights[_Answer[str]] = Flights()

    async def search(self, query: str, limit: int) -> Retrieval:
        """At most `limit` web hits, best first, with what they cost. Never fails: see `web_error`."""
        asked = " ".join(query.split())[:MAX_QUERY_CHARS].strip()
        if limit <= 0 or not asked:
            return Retrieval(())
        self._count("fallbacks", 1)
        bill, problem = _Bill(), ""
        hits: tuple[Hit, ...] = ()
        give_up_at = asyncio.get_running_loop().time() + self._config.timeout_s
        try:
            hits, problem = await self._hits(asked, limit, bill, give_up_at)
        except WebError as error:
            problem = str(error)
        if problem:
            self._count("errors", 1)
        return Retrieval(hits, bill.cost_usd, bill.calls, problem)

    async def close(self) -> None:
        """Ends what is under way and closes the connections."""
        await self._searches.close()
        await self._pages.close()
        await self._tavily.close()

    async def _hits(
        self, query: str, limit: int, bill: _Bill, give_up_at: float
    ) -> tuple[tuple[Hit, ...], str]:
        try:
            async with asyncio.timeout_at(give_up_at):
                found = await self._answer(self._searches, self._search_for(query), bill)
        except TimeoutError:
            raise WebError(f"the web search did not end in {self._config.timeout_s:g} s") from None
        if not found:
            return (), "the web search found nothing"
        reading = _Reading(found, limit, lambda url: self._answer(self._pages, self._page_at(url), bill))
        unread = await reading.until(give_up_at)
        if unread:
            return reading.hits(), f"{unread} web pages were not read in {self._config.timeout_s:g} s"
        return reading.hits(), reading.problem()

    async def _answer(self, flights: Flights[_Answer[T]], question: _Question[T], bill: _Bill) -> T:
        landed = await flights.share(digest(question.name), lambda: self._fetch(question))
        if landed.is_first:
            bill.cost_usd += landed.value.cost_usd
            bill.calls += landed.value.calls
        return landed.value.value

    async def _fetch(self, question: _Question[T]) -> _Answer[T]:
        """From the cache or from Tavily; bounded by itself, since the first who asked may be gone."""
        kept = await asyncio.to_thread(self._cache.get, question.name, question.parse)
        if kept is not None:
            self._count("cache_hits", 1)
            return _Answer(kept)
        give_up_at = asyncio.get_running_loop().time() + self._config.timeout_s
        try:
            async with asyncio.timeout_at(give_up_at):
                value = await question.call(give_up_at)
        except TimeoutError:
            raise WebError(f"no answer of Tavily in {self._config.timeout_s:g} s") from None
        self._count("paid_calls", 1)
        self._count("cost_usd", question.price_usd)
        await asyncio.to_thread(self._cache.put, question.name, value)
        return _Answer(value, question.price_usd, 1)

    def _search_for(self, query: str) -> _Question[tuple[Found, ...]]:
        results = self._config.max_results
        return _Question(
            ("search", query, str(results)),
            lambda give_up_at: self._tavily.search(query, results, give_up_at),
            _kept_results,
            self._config.search_usd,
        )

    def _page_at(self, url: str) -> _Question[str]:
        return _Question(
            ("page", url),
            lambda give_up_at: self._tavily.page(url, give_up_at),
            _kept_text,
            self._config.extract_usd,
        )


class _Reading:
    """Reads the best `limit` results at once, and the next best for each that gives no text."""

    def __init__(self, found: Sequence[Found], limit: int, read: Callable[[str], Awaitable[str]]) -> None:
        self._found, self._limit, self._read = found, limit, read
        self._waiting = deque(enumerate(found))
        self._open: dict[asyncio.Task[str], int] = {}
        self._texts: dict[int, str] = {}
        self._failure = ""

    async def until(self, give_up_at: float) -> int:
        """Reads until it is done or time is over; returns how many pages were given up."""
        loop = asyncio.get_running_loop()
        try:
            while self._fill():
                left_s = max(0.0, give_up_at - loop.time())
                done, _ = await asyncio.wait(self._open, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    return len(self._open)
                for task in done:
                    self._take(task)
            return 0
        finally:
            await self._drop()

    def hits(self) -> tuple[Hit, ...]:
        """The texts so far in the order of the search, with the ranks -1, -2, ... as scores."""
        texts = [self._texts[place] for place in sorted(self._texts)]
        return tuple(Hit(-1, text, -float(rank), "tavily") for rank, text in enumerate(texts, 1))

    def problem(self) -> str:
        """Why nothing was read, "" where something was."""
        if self._texts:
            return ""
        return f"none of {len(self._found)} web pages gave a text: {self._failure}"

    def _fill(self) -> bool:
        while self._waiting and len(self._texts) + len(self._open) < self._limit:
            place, found = self._waiting.popleft()
            self._open[asyncio.ensure_future(self._read(found.url))] = place
        return bool(self._open)

    def _take(self, task: asyncio.Task[str]) -> None:
        place = self._open.pop(task)
        try:
            text = task.result()
        except WebError as error:
            self._failure = self._failure or str(error)
            return
        if len(text) > MIN_PAGE_CHARS:
            self._texts[place] = text
        else:
            self._failure = self._failure or f"only {len(text)} characters"

    async def _drop(self) -> None:
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)


def _kept_results(value: object) -> tuple[Found, ...]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list of results, got {type(value).__name__}")
    return tuple(Found(str(url), float(score)) for url, score in value)


def _kept_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    return value
