"""The client of Tavily's API: what it asks, what it repeats, what it refuses."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ray_app.errors import ConfigError
from ray_app.retrieval.tavily import MAX_PAGE_CHARS, MAX_REPLY_BYTES, MAX_TRIES, Found, Tavily, WebError
from tests.retrieval.tavily_server import KEY, TavilyServer, serving_tavily, text_of

A, B, C = "https://a.example/1", "https://b.example/2", "https://c.example/3"


class Hasty(random.Random):
    """Jitter that makes each pause a hundredth."""

    def uniform(self, a: float, b: float) -> float:
        return 0.01 * b


def soon(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


@pytest.fixture
async def server() -> AsyncIterator[TavilyServer]:
    async with serving_tavily((A, 0.7), (B, 0.9), (A, 0.5), (C, 0.1)) as server:
        yield server


@pytest.fixture
async def tavily(server: TavilyServer) -> AsyncIterator[Tavily]:
    tavily = Tavily(KEY, server.url + "/", call_timeout_s=5.0, rng=Hasty())
    yield tavily
    await tavily.close()


async def test_a_search_gives_each_url_once_best_first(server: TavilyServer, tavily: Tavily) -> None:
    assert await tavily.search("ice", 20, soon()) == (Found(B, 0.9), Found(A, 0.7), Found(C, 0.1))
    [asked] = server.searches
    assert asked == {"query": "ice", "search_depth": "advanced", "max_results": 20, "chunks_per_source": 3}


async def test_a_page_gives_its_stripped_text(server: TavilyServer, tavily: Tavily) -> None:
    server.texts[A] = f"\n  {text_of(A)}\n"
    assert await tavily.page(A, soon()) == text_of(A).strip()
    [asked] = server.extractions
    assert asked == {"urls": [A], "extract_depth": "advanced", "format": "text", "timeout": 4.0}


async def test_a_huge_page_is_cut_and_half_a_character_replaced(server: TavilyServer, tavily: Tavily) -> None:
    server.texts[A] = "\ud800" + "x" * (2 * MAX_PAGE_CHARS)
    text = await tavily.page(A, soon())
    assert (len(text), text[:2]) == (MAX_PAGE_CHARS, "?x")


@pytest.mark.parametrize(
    "fault", [(500, {}), (503, {}), (429, {}), (429, {"Retry-After": "a date"}), "reset"]
)
async def test_what_may_be_over_soon_is_tried_again(server: TavilyServer, tavily: Tavily, fault: Any) -> None:
    server.faults["/search"] = [fault, fault, "ok"]
    assert len(await tavily.search("ice", 20, soon())) == 3
    assert len(server.searches) == 3


async def test_tries_have_an_end(server: TavilyServer, tavily: Tavily) -> None:
    server.faults["/search"] = [(500, {})]
    with pytest.raises(WebError, match=rf"^Tavily /search: HTTP 500: refused .*\(tries: {MAX_TRIES}\)$"):
        await tavily.search("ice", 20, soon())
    assert len(server.searches) == MAX_TRIES


async def test_a_pause_that_is_asked_for_is_kept(server: TavilyServer, tavily: Tavily) -> None:
    server.faults["/search"] = [(429, {"Retry-After": "0.4"}), "ok"]
    began = asyncio.get_running_loop().time()
    await tavily.search("ice", 20, soon())
    assert asyncio.get_running_loop().time() - began >= 0.4


async def test_a_pause_beyond_the_time_limit_is_not_begun(server: TavilyServer, tavily: Tavily) -> None:
    server.faults["/search"] = [(429, {"Retry-After": "60"}), "ok"]
    async with asyncio.timeout(5):
        with pytest.raises(WebError, match=r"HTTP 429: .* \(tries: 1\)"):
            await tavily.search("ice", 20, soon())
    assert len(server.searches) == 1


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 422, 432, 433])
async def test_a_refusal_for_good_is_not_repeated(server: TavilyServer, tavily: Tavily, status: int) -> None:
    server.faults["/search"] = [(status, {"Location": server.url + "/elsewhere"}), "ok"]
    with pytest.raises(WebError, match=rf"^Tavily /search: HTTP {status}: refused Bearer \*\*\*$"):
        await tavily.search("ice", 20, soon())
    assert len(server.searches) == 1


async def test_a_call_that_hangs_ends_at_its_limit_and_is_not_repeated(server: TavilyServer) -> None:
    tavily = Tavily(KEY, server.url, call_timeout_s=0.2)
    server.faults["/search"] = ["hang"]
    with pytest.raises(WebError, match=r"no answer in 0\.2 s$"):
        await tavily.search("ice", 20, soon())
    await asyncio.wait_for(server.closed_early.wait(), 5)
    assert len(server.searches) == 1
    await tavily.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"<html>",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"results": {}}',
        b'{"results": ["x"]}',
        b'{"results": [{"url": 7, "score": 1}]}',
        b'{"results": [{"url": "https://a.example"}]}',
        b'{"results": [{"url": "https://a.example", "score": "high"}]}',
        b'{"results": [{"url": "https://a.example", "score": NaN}]}',
        b"[" * 100_000,
        b'"' + b"x" * MAX_REPLY_BYTES + b'"',
    ],
    ids=lambda reply: reply[:40].decode("utf-8", "replace"),
)
async def test_garbage_is_an_error_of_its_call_and_not_repeated(
    server: TavilyServer, tavily: Tavily, reply: bytes
) -> None:
    server.faults["/search"] = [reply, "ok"]
    with pytest.raises(WebError, match=r"^Tavily /search: ") as caught:
        await tavily.search("ice", 20, soon())
    assert "\n" not in str(caught.value)
    assert len(server.searches) == 1


async def test_a_result_without_a_url_is_left_out(server: TavilyServer, tavily: Tavily) -> None:
    server.faults["/search"] = [b'{"results": [{"url": null}, {}, {"url": "https://a.example", "score": 1}]}']
    assert await tavily.search("ice", 20, soon()) == (Found("https://a.example", 1.0),)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b'{"results": [], "failed_results": [{"error": "no such host"}]}', "no such host"),
        (b'{"results": [], "failed_results": []}', "no reason given"),
        (b'{"results": []}', "without a list of objects"),
        (b'{"results": [{"raw_content": 5}]}', "raw_content is no text"),
    ],
)
async def test_a_page_without_a_text_says_why(
    server: TavilyServer, tavily: Tavily, reply: bytes, reason: str
) -> None:
    server.faults[A] = [reply]
    with pytest.raises(WebError, match=f"^Tavily /extract: .*{reason}"):
        await tavily.page(A, soon())
    assert server.pages == [A]


async def test_nobody_there_is_an_error_that_says_so() -> None:
    async with serving_tavily() as gone:
        pass
    tavily = Tavily(KEY, gone.url, rng=Hasty())
    with pytest.raises(WebError, match=r"ClientConnectorError.*\(tries: 7\)"):
        await tavily.search("ice", 20, soon())
    await tavily.close()


async def test_the_key_is_in_no_message_no_log_and_no_repr(
    server: TavilyServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "tvly-another-secret"
    tavily = Tavily(wrong, server.url)
    with pytest.raises(WebError, match=r"HTTP 401: invalid key: Bearer \*\*\*$") as caught:
        await tavily.search("ice", 20, soon())
    assert wrong not in repr(tavily) + repr(caught.value) + caplog.text
    await tavily.close()


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^the web fallback's key is none") as caught:
        Tavily(key)
    assert not key or key not in str(caught.value)
