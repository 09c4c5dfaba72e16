"""A fallback as a whole: what it finds, what it pays, what it keeps, and how it fails."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from ray_app.errors import ConfigError
from ray_app.records import Hit, Retrieval
from ray_app.retrieval.web import Measure, WebSearcher
from ray_app.retrieval.web_config import WebConfig, read_key
from tests.retrieval.tavily_server import KEY, TavilyServer, serving_tavily, text_of

A, B, C, D = (f"https://{name}.example/page" for name in "abcd")
TWENTY = [(f"https://many.example/{n}", 1 - n / 100) for n in range(20)]

Make = Callable[..., WebSearcher]


@pytest.fixture
async def server() -> AsyncIterator[TavilyServer]:
    async with serving_tavily((A, 0.5), (B, 0.9), (A, 0.7), (C, 0.1), (D, 0.05)) as server:
        yield server


@pytest.fixture
async def make(server: TavilyServer, tmp_path: Path) -> AsyncIterator[Make]:
    """Searchers that share a cache folder, as instances one after another do; closed at the end."""
    async with AsyncExitStack() as stack:

        def made(counts: Counter[Measure] | None = None, **settings: object) -> WebSearcher:
            values = {"base_url": server.url, "cache_dir": tmp_path / "cache", "timeout_s": 5.0, **settings}
            counted: Counter[Measure] = Counter() if counts is None else counts

            def count(measure: Measure, value: float) -> None:
                counted[measure] += value  # type: ignore[assignment]

            searcher = WebSearcher(WebConfig.model_validate(values), KEY, count)
            stack.push_async_callback(searcher.close)
            return searcher

        yield made


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def web_hit(url: str, rank: int) -> Hit:
    return Hit(-1, text_of(url).strip(), -rank, "tavily")


async def test_hits_are_pages_in_the_order_of_the_search_with_ranks_as_scores(
    server: TavilyServer, make: Make
) -> None:
    found = await make().search(" how  do\nglaciers move ", 50)
    assert found.hits == tuple(web_hit(url, rank) for rank, url in enumerate((B, A, C, D), 1))
    assert (found.web_calls, found.web_error) == (5, "")
    assert found.cost_usd == pytest.approx(0.01 + 4 * 0.002)
    assert server.searches[0]["query"] == "how do glaciers move"
    assert sorted(server.pages) == [A, B, C, D]  # the url that came twice was read once


async def test_a_long_query_is_cut_to_what_tavily_takes(server: TavilyServer, make: Make) -> None:
    assert (await make().search("x" * 5000, 1)).web_error == ""
    assert server.searches[0]["query"] == "x" * 400


@pytest.mark.parametrize(("query", "limit"), [("ice", 0), ("ice", -3), (" \n", 5)])
async def test_nothing_wanted_costs_nothing(server: TavilyServer, make: Make, query: str, limit: int) -> None:
    assert await make().search(query, limit) == Retrieval(())
    assert server.asked == 0


async def test_only_as_many_pages_are_paid_for_as_are_wanted(server: TavilyServer, make: Make) -> None:
    found = await make().search("ice", 2)
    assert found.hits == (web_hit(B, 1), web_hit(A, 2))
    assert sorted(server.pages) == [A, B]
    assert found.cost_usd == pytest.approx(0.014)


async def test_the_next_best_page_stands_in_for_one_without_a_text(server: TavilyServer, make: Make) -> None:
    server.texts[B] = None
    server.texts[A] = " " * 500 + "x" * 100
    found = await make().search("ice", 2)
    assert found.hits == (web_hit(C, 1), web_hit(D, 2))
    assert (found.web_error, found.web_calls) == ("", 4)
    assert found.cost_usd == pytest.approx(0.01 + 3 * 0.002)  # B could not be read, which is free


async def test_pages_are_read_at_the_same_time(make: Make, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with serving_tavily(*TWENTY) as server:
        server.page_s = 0.2
        began = loop.time()
        found = await make(base_url=server.url).search("ice", 50)
        assert loop.time() - began < 2.0
        assert (len(found.hits), server.most_at_once) == (20, 20)


async def test_calls_at_once_are_bounded_over_all_fallbacks(make: Make) -> None:
    async with serving_tavily(*TWENTY) as server:
        server.page_s = 0.01
        searcher = make(base_url=server.url, max_concurrency=3)
        await asyncio.gather(searcher.search("ice", 50), searcher.search("fire", 50))
        assert server.most_at_once == 3


async def test_pages_that_are_late_are_given_up_and_the_others_used(server: TavilyServer, make: Make) -> None:
    server.faults = {A: ["hang"], D: ["hang"]}
    found = await make(timeout_s=2.0).search("ice", 50)
    assert found.hits == (web_hit(B, 1), web_hit(C, 2))
    assert found.web_error == "2 web pages were not read in 2 s"
    assert found.cost_usd == pytest.approx(0.014)
    await asyncio.wait_for(server.closed_early.wait(), 5)


async def test_a_search_that_is_late_says_so(server: TavilyServer, make: Make) -> None:
    server.faults["/search"] = ["hang"]
    assert await make(timeout_s=0.2).search("ice", 5) == Retrieval(
        (), 0.0, 0, "the web search did not end in 0.2 s"
    )
    whole = await make(call_timeout_s=0.2).search("ice", 5)
    assert whole.web_error == "Tavily /search: no answer in 0.2 s"


async def test_no_result_and_no_readable_page_say_why(server: TavilyServer, make: Make) -> None:
    server.texts = {A: "short"}
    found = await make().search("ice", 50)
    assert found.hits == ()
    assert found.web_error.startswith("none of 4 web pages gave a text: ")
    assert found.cost_usd == pytest.approx(0.012)
    server.faults["/search"] = [b'{"results": []}']
    nothing = await make().search("another", 50)
    assert nothing == Retrieval((), 0.01, 1, "the web search found nothing")


async def test_a_refused_key_fails_once_and_is_shown_nowhere(
    server: TavilyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = WebConfig(base_url=server.url, cache_dir=tmp_path)
    searcher = WebSearcher(config, "tvly-not-the-key")
    found = await searcher.search("ice", 5)
    assert found.web_error == "Tavily /search: HTTP 401: invalid key: Bearer ***"
    assert len(server.searches) == 1
    assert "tvly-not" not in f"{searcher!r} {config!r} {found!r} {caplog.text}"
    assert names_in(tmp_path) == []  # failures are not kept
    await searcher.close()


async def test_what_was_paid_for_is_read_back_by_another_instance(
    server: TavilyServer, make: Make, tmp_path: Path
) -> None:
    first = await make().search("ice", 50)
    counts: Counter[Measure] = Counter()
    second = await make(counts).search("ice", 50)
    assert second == Retrieval(first.hits)
    assert server.asked == 5
    assert counts == {"fallbacks": 1, "cache_hits": 5}
    kept = [(tmp_path / "cache" / name).read_bytes() for name in names_in(tmp_path / "cache")]
    assert len(kept) == 5
    assert not any(KEY.encode() in body for body in kept)


async def test_a_page_is_known_whatever_the_query_was(server: TavilyServer, make: Make) -> None:
    searcher = make()
    await searcher.search("ice", 50)
    other = await searcher.search("snow", 50)
    assert (len(server.searches), len(server.pages)) == (2, 4)
    assert (other.cost_usd, other.web_calls, len(other.hits)) == (0.01, 1, 4)


async def test_each_repeat_is_counted(server: TavilyServer, make: Make) -> None:
    counts: Counter[Measure] = Counter()
    server.faults = {B: [(503, {}), "ok"]}
    assert len((await make(counts).search("ice", 1)).hits) == 1
    assert (counts["retries"], counts["paid_calls"], server.pages) == (1, 2, [B, B])


async def test_failures_are_asked_again(server: TavilyServer, make: Make) -> None:
    server.faults = {"/search": [b"<html>", "ok"], B: [(400, {}), "ok"]}
    searcher = make()
    failed, partly, whole = [await searcher.search("ice", 50) for _ in range(3)]
    assert failed.web_error.startswith("Tavily /search: ")
    assert [len(found.hits) for found in (failed, partly, whole)] == [0, 3, 4]
    assert [found.cost_usd for found in (failed, partly, whole)] == pytest.approx([0, 0.016, 0.002])


async def test_a_torn_cache_is_asked_again(server: TavilyServer, make: Make, tmp_path: Path) -> None:
    first = await make().search("ice", 50)
    for name in names_in(tmp_path / "cache"):
        path = tmp_path / "cache" / name
        path.write_bytes(path.read_bytes()[:-20])
    assert await make().search("ice", 50) == first
    assert server.asked == 10


async def test_hostile_queries_and_urls_stay_inside_the_cache(make: Make, tmp_path: Path) -> None:
    urls = ["../../up", "/etc/passwd", "file:///etc/shadow", "https://x/%00/../..", "x" * 9000]
    async with serving_tavily(*((url, 1.0) for url in urls)) as server:
        found = await make(base_url=server.url).search("../../../query/\x00", 50)
    assert len(found.hits) == 5
    assert names_in(tmp_path) == ["cache"]
    names = names_in(tmp_path / "cache")
    assert len(names) == 6
    assert all(len(name) == 37 and name.endswith(".json") for name in names)


async def test_equal_queries_at_once_are_paid_for_once(server: TavilyServer, make: Make) -> None:
    counts: Counter[Measure] = Counter()
    searcher = make(counts)
    server.gate.clear()
    asking = [asyncio.create_task(searcher.search("ice", 50)) for _ in range(8)]
    await server.arrived.wait()
    server.gate.set()
    found = await asyncio.gather(*asking)
    assert server.asked == 5
    assert {each.hits for each in found} == {found[0].hits}
    assert len(found[0].hits) == 4
    assert sum(each.cost_usd for each in found) == pytest.approx(0.018)
    assert sum(each.web_calls for each in found) == 5
    assert [each.cost_usd > 0 for each in found].count(True) == 1
    assert counts.pop("cost_usd") == pytest.approx(0.018)
    assert counts == {"fallbacks": 8, "paid_calls": 5}


async def test_equal_urls_of_different_queries_at_once_are_paid_for_once(
    server: TavilyServer, make: Make
) -> None:
    searcher = make()
    server.page_s = 0.2
    found = await asyncio.gather(searcher.search("ice", 50), searcher.search("snow", 50))
    assert (len(server.searches), len(server.pages)) == (2, 4)
    assert sum(each.cost_usd for each in found) == pytest.approx(0.028)


async def test_who_asked_first_may_leave_and_who_joined_is_served_and_pays(
    server: TavilyServer, make: Make
) -> None:
    searcher = make()
    server.gate.clear()
    first = asyncio.create_task(searcher.search("ice", 50))
    await server.arrived.wait()
    second = asyncio.create_task(searcher.search("ice", 50))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    server.gate.set()
    found = await second
    assert first.cancelled()
    assert (len(found.hits), len(server.searches)) == (4, 1)
    assert found.cost_usd == pytest.approx(0.018)


async def test_a_call_for_which_nobody_waits_is_cut_off(server: TavilyServer, make: Make) -> None:
    searcher = make()
    server.gate.clear()
    asking = [asyncio.create_task(searcher.search("ice", 50)) for _ in range(2)]
    await server.arrived.wait()
    for task in asking:
        task.cancel()
    await asyncio.wait_for(server.closed_early.wait(), 5)
    server.gate.set()
    assert len((await searcher.search("ice", 50)).hits) == 4
    assert len(server.searches) == 2


async def test_a_failure_is_shared_by_those_who_wait_and_counted(server: TavilyServer, make: Make) -> None:
    counts: Counter[Measure] = Counter()
    searcher = make(counts)
    server.faults["/search"] = [(403, {})]
    server.gate.clear()
    asking = [asyncio.create_task(searcher.search("ice", 5)) for _ in range(3)]
    await server.arrived.wait()
    server.gate.set()
    found = await asyncio.gather(*asking)
    assert set(found) == {Retrieval((), 0.0, 0, "Tavily /search: HTTP 403: refused Bearer ***")}
    assert len(server.searches) == 1
    assert counts == {"fallbacks": 3, "errors": 3}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"base_url": "api.tavily.com"}, "expected a URL such as https://api.tavily.com"),
        ({"base_url": "ftp://x"}, "expected a URL such as"),
        ({"max_results": 21}, "less than or equal to 20"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"api_key": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_config_is_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        WebConfig.model_validate(settings)


def test_the_key_is_read_from_the_variable_that_is_named() -> None:
    assert read_key("MY_KEY", {"MY_KEY": f" {KEY}\n", "TAVILY_API_KEY": "other"}) == KEY
    with pytest.raises(ConfigError, match=r"^web fallback: variable MY_KEY is empty where its replica runs"):
        read_key("MY_KEY", {"MY_KEY": " ", "TAVILY_API_KEY": "other"})
