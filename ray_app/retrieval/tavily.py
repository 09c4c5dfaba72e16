"""Tavily's REST API as far as a fallback needs it: one search, and the text of one page.

Owns the HTTP session, the key, the bound on calls at once and the one retry layer. Refuses redirects, so
that the key goes to no other host, and replies beyond a size. Knows nothing of caches, prices and hits.

A page is a call of its own, though one call could take 20: so a slow or broken page holds up no other, what
has come when time is over is the most that could come, and each page is shared and kept by its url. The
price is the same, as Tavily bills the pages that it could read and not the calls. What it does use up is
the key's requests per minute (100 for a development key, 1,000 for a production one).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp

from ray_app.errors import ConfigError, RetrieverError

BASE_URL = "https://api.tavily.com"
MAX_QUERY_CHARS = 400
MAX_RESULTS = 20
# The most that the API takes. It shapes the snippets of the search, of which nothing is used.
CHUNKS_PER_SOURCE = 3
MIN_PAGE_TIMEOUT_S, MAX_PAGE_TIMEOUT_S = 1.0, 60.0

# 20 pages of it stay below the 4 MiB that a reply of Serve may have.
MAX_PAGE_CHARS = 50_000
MAX_REPLY_BYTES = 10_000_000
# An outage of 7 s is outlasted whatever the jitter: what a search did not find changes an answer.
MAX_TRIES = 7
BACKOFF_S, MAX_BACKOFF_S = 0.5, 4.0
MAX_REASON_CHARS = 200
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

T = TypeVar("T")


class WebError(RetrieverError):
    """Tavily did not answer, refused, or answered something else than its API says."""


class _Passing(WebError):
    """Something that may be over soon; `retry_after_s` is the pause that the server asks for."""

    retry_after_s = 0.0


class Found(NamedTuple):
    """One result of a search; a higher score is better."""

    url: str
    score: float


class Tavily:
    """A client with one key, for one event loop.

    `call_timeout_s` holds for each try; one that runs into it is not repeated, as it may have been billed.
    `on_retry` is told what each repeat answers to. Raises ConfigError for a key that no header could carry.
    """

    def __init__(
        self,
        key: str,
        base_url: str = BASE_URL,
        call_timeout_s: float = 20.0,
        max_concurrency: int = 40,
        on_retry: Callable[[WebError], None] = lambda error: None,
        rng: random.Random | None = None,
    ) -> None:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("the web fallback's key is none; expected printable ASCII without a space")
        self._key = key
        self._base_url = base_url.rstrip("/")
        self._call_timeout_s = call_timeout_s
        self._slots = asyncio.Semaphore(max_concurrency)
        self._on_retry = on_retry
        self._rng = rng or random.Random()
        self._session: aiohttp.ClientSession | None = None

    async def search(self, query: str, max_results: int, give_up_at: float) -> tuple[Found, ...]:
        """Distinct urls, best first, for a query of at most MAX_QUERY_CHARS characters.

        After `give_up_at` (time of the loop) nothing is tried again.

        Raises WebError.
        """
        body = {
            "query": query,
            "search_depth": "advanced",
            "max_results": max_results,
            "chunks_per_source": CHUNKS_PER_SOURCE,
        }
        return await self._ask("/search", body, give_up_at, _found_in)

    async def page(self, url: str, give_up_at: float) -> str:
        """The stripped text of a page, at most MAX_PAGE_CHARS characters. Raises WebError."""
        # Tavily is to give up before we do: a page that it could not read is not billed.
        timeout_s = min(max(self._call_timeout_s - 1.0, MIN_PAGE_TIMEOUT_S), MAX_PAGE_TIMEOUT_S)
        body = {"urls": [url], "extract_depth": "advanced", "format": "text", "timeout": timeout_s}
        return await self._ask("/extract", body, give_up_at, _text_in)

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(
        self, path: str, body: Mapping[str, object], give_up_at: float, parse: Callable[[object], T]
    ) -> T:
        reply = await self._with_retries(path, body, give_up_at)
        try:
            return parse(json.loads(reply))
        except (ValueError, RecursionError) as error:
            raise WebError(self._line(path, str(error))) from None

    async def _with_retries(self, path: str, body: Mapping[str, object], give_up_at: float) -> bytes:
        for attempt in range(1, MAX_TRIES + 1):
            try:
                return await self._once(path, body)
            except _Passing as error:
                backoff_s = min(BACKOFF_S * 2.0 ** (attempt - 1), MAX_BACKOFF_S) * self._rng.uniform(0.5, 1.5)
                pause_s = max(backoff_s, error.retry_after_s)
                is_late = asyncio.get_running_loop().time() + pause_s >= give_up_at
                if is_late or attempt == MAX_TRIES:
                    raise WebError(f"{error} (tries: {attempt})") from None
                self._on_retry(error)
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _once(self, path: str, body: Mapping[str, object]) -> bytes:
        async with self._slots:
            try:
                async with (
                    asyncio.timeout(self._call_timeout_s),
                    self._opened().post(self._base_url + path, json=body, allow_redirects=False) as reply,
                ):
                    text = await _read(reply)
            except TimeoutError:
                raise WebError(self._line(path, f"no answer in {self._call_timeout_s:g} s")) from None
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:  # before any answer
                raise _Passing(self._line(path, f"{type(error).__name__}: {error}")) from None
            except (aiohttp.ClientError, OSError) as error:  # amid the answer, which may have been billed
                raise WebError(self._line(path, f"{type(error).__name__}: {error}")) from None
            except ValueError as error:
                raise WebError(self._line(path, str(error))) from None
        if reply.status == 200:
            return text
        raise self._refusal(path, reply, text)

    def _refusal(self, path: str, reply: aiohttp.ClientResponse, text: bytes) -> WebError:
        line = self._line(path, f"HTTP {reply.status}: {_reason(text)}")
        if reply.status != 429 and reply.status < 500:
            return WebError(line)
        error = _Passing(line)
        error.retry_after_s = _retry_after_s(reply)
        return error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._key}"},
                # Bounds are this class's: aiohttp's own would count the wait for a connection.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                # A proxy that the environment names is for the outside.
                trust_env=urlsplit(self._base_url).hostname not in LOOPBACK,
            )
        return self._session

    def _line(self, path: str, text: str) -> str:
        """One printable line without the key, which a server may send back."""
        shown = "".join(char if char.isprintable() else " " for char in text.replace(self._key, "***"))
        return f"Tavily {path}: {' '.join(shown.split())[:MAX_REASON_CHARS]}"


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for part in reply.content.iter_any():
        body += part
        if len(body) > MAX_REPLY_BYTES:
            raise ValueError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
    return bytes(body)


def _reason(text: bytes) -> str:
    """What a refusal says: Tavily's own sentence, or the beginning of anything else."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        return str(json.loads(text)["detail"]["error"])
    return text[: 4 * MAX_REASON_CHARS].decode("utf-8", "replace")


def _retry_after_s(reply: aiohttp.ClientResponse) -> float:
    try:
        return float(reply.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0  # a date; Tavily sends seconds


def _found_in(reply: object) -> tuple[Found, ...]:
    best: dict[str, float] = {}
    for item in _items(reply, "results"):
        url, score = item.get("url"), item.get("score")
        if not url:
            continue
        if not isinstance(url, str) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError("a result whose url is no text or whose score is no number")
        best[url] = max(float(score), best.get(url, -math.inf))
    return tuple(sorted((Found(*pair) for pair in best.items()), key=lambda found: -found.score))


def _text_in(reply: object) -> str:
    texts = [item.get("raw_content") for item in _items(reply, "results")]
    if not texts:
        failed = [str(item.get("error")) for item in _items(reply, "failed_results")]
        raise ValueError(f"the page could not be read: {failed[0] if failed else 'no reason given'}")
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError("a page whose raw_content is no text")
    whole = "".join(text for text in texts if isinstance(text, str))
    # Half a surrogate pair, which JSON can hold, could be neither stored nor sent on.
    return whole.strip()[:MAX_PAGE_CHARS].encode("utf-8", "replace").decode()


def _items(reply: object, name: str) -> list[Mapping[str, object]]:
    items = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"a reply without a list of objects {name!r}")
    return items
