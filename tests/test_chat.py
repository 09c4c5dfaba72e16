import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from ray_app import chat, endpoint
from ray_app.budgets import in_time
from ray_app.chat import ChatRequest, Router
from ray_app.config import Endpoint, ModelConfig, Price, Sampling, TaskLimits
from ray_app.errors import (
    AccessDenied,
    ConfigError,
    ContextOverflow,
    EndpointError,
    LimitReached,
    Refusal,
)
from ray_app.journal import CHAT
from ray_app.records import ChatReply, Message, Task, ToolCall, Usage
from ray_app.slots import MAX_SAMPLES, RouteKey, Sample, Slots
from tests.model_server import GOOD, PAUSE_S, chunk, serving, usage
from tests.stand_ins import MemoryLog, journal

REQUEST = ChatRequest("m", (Message("user", "hi"),), Sampling(temperature=0.5, max_tokens=7), session="s-1")
PRICE = Price(input=2.0, output=10.0, cached_input=0.5)
RATE_LIMITED = (429, {"message": "slow down", "code": "rate_limit"}, {"Retry-After": "0"})
BROKEN: tuple[int, dict[str, str], dict[str, str]] = (500, {"message": "oops"}, {})


def marks(error: Any) -> tuple[str, str, int, str]:
    """What a failed call carries for its event."""
    return error.endpoint, error.model, error.retries, error.faults


def of_session(number: int) -> ChatRequest:
    return replace(REQUEST, session=f"task-{number}")


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF_S", 0.01)
    monkeypatch.setattr(chat, "MAX_BACKOFF_S", 0.1)


@asynccontextmanager
async def routed(
    *urls: str, environ: dict[str, str] | None = None, pool: int | None = None, **settings: object
) -> AsyncIterator[Router]:
    key = "MODEL_KEY" if environ and "MODEL_KEY" in environ else None
    endpoints = [Endpoint(base_url=url, api_key_env=key) for url in urls]
    model = ModelConfig.model_validate({"endpoints": endpoints, "price": PRICE} | settings)
    router = Router({"m": model}, {}, environ=environ or {}, rng=random.Random(1), max_connections=pool)
    try:
        yield router
    finally:
        await router.close()


async def test_a_streamed_reply_is_put_together_with_usage_times_and_price() -> None:
    async with serving(GOOD) as server, routed(server.url) as router:
        reply = await router.complete(REQUEST)
    assert (reply.content, reply.finish_reason) == ("Hello", "tool_calls")
    assert reply.tool_calls == (ToolCall("t1", "answer", '{"model": "a1"}'),)
    assert reply.usage == Usage(1000, 50, 400)
    assert reply.cost_usd == pytest.approx((600 * 2 + 400 * 0.5 + 50 * 10) / 1e6)
    assert (reply.model, reply.endpoint, reply.retries) == ("m-1", server.url, 0)
    assert reply.prefill_s > 0 and reply.decode_s >= 0
    asked = server.requests[0]
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("m", 0.5, 7)
    assert "tools" not in asked and "top_p" not in asked
    assert server.headers[0]["x-session-id"] == "s-1"


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (RATE_LIMITED, "429"),
        (BROKEN, "500"),
        ((503, {"message": "full"}, {}), "503"),
        ([GOOD[0], "reset"], "reset"),
        (["reset"], "reset"),
        ("hang", "timeout"),
        ([GOOD[0], "hang"], "stall"),
        ([GOOD[0], GOOD[1]], "truncated"),
        (["{not json"], "malformed"),
        (['["no", "object"]'], "malformed"),
        (['{"choices": [{"delta": {"content": 7}, "finish_reason": "stop"}]}'], "malformed"),
        (['{"choices": "none"}'], "malformed"),
        (web.Response(body=b"<html>", content_type="text/html"), "malformed"),
        (web.Response(body=b"{", content_type="application/json"), "malformed"),
        (web.Response(body=b'data: {"model": "\xff"}\n\n', content_type="text/event-stream"), "malformed"),
        ([], "empty"),
        ([chunk({}).replace('{"index": 0, "delta": {}, "finish_reason": null}', "")], "empty"),
        ([GOOD[0], '{"error": {"message": "engine is dead", "code": 500}}'], "500"),
        (['{"error": {"message": "odd", "code": "server_error"}}'], "error"),
        (['{"object": "error", "message": "old vLLM", "code": 503}'], "503"),
    ],
)
async def test_a_passing_fault_is_tried_again_and_counted_by_its_name(fault: object, name: str) -> None:
    first_token_s, stall_s = 0.2 if name == "timeout" else 20, 0.2 if name == "stall" else 20
    async with (
        serving(fault, fault, GOOD) as server,
        routed(server.url, first_token_s=first_token_s, stall_s=stall_s) as router,
    ):
        reply = await asyncio.wait_for(router.complete(REQUEST), 5)
    assert (reply.content, reply.retries, len(server.requests)) == ("Hello", 2, 3)
    assert (reply.faults, reply.endpoint) == (f"{name},{name}", server.url)
    congested = name in {"429", "503", "timeout", "stall"}
    endings = [sample.ending for sample in router.slots[RouteKey("m", server.url)].take()]
    assert endings == [*["congested" if congested else "broken"] * 2, "ok"]


async def test_a_lasting_fault_ends_after_a_bounded_number_of_tries() -> None:
    async with serving(BROKEN) as server, routed(server.url) as router:
        with pytest.raises(EndpointError, match=r"HTTP 500: .*oops") as caught:
            await router.complete(REQUEST)
    assert len(server.requests) == chat.MAX_TRIES
    assert marks(caught.value) == (server.url, "m", chat.MAX_TRIES - 1, "500,500,500,500,500")


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (400, {"message": "maximum context length is 4096 tokens"}, ContextOverflow),
        (400, {"message": "no", "code": "context_length_exceeded"}, ContextOverflow),
        (400, {"message": "bad value"}, Refusal),
        (400, {"message": "use another field", "code": "unsupported_parameter"}, AccessDenied),
        (401, {"message": "bad key"}, AccessDenied),
        (404, {"message": "no such model"}, AccessDenied),
    ],
)
async def test_a_terminal_error_is_not_tried_again(
    status: int, error: dict[str, str], expected: type[Exception]
) -> None:
    async with serving((status, error, {})) as server, routed(server.url) as router:
        with pytest.raises(expected, match=error["message"]) as caught:
            await router.complete(REQUEST)
    assert len(server.requests) == 1
    assert marks(caught.value) == (server.url, "m", 0, str(status))


async def test_a_filtered_answer_is_a_refusal() -> None:
    async with (
        serving([chunk({"content": "I"}), chunk({}, "content_filter")]) as server,
        routed(server.url) as router,
    ):
        with pytest.raises(Refusal, match="content filter"):
            await router.complete(REQUEST)


async def test_a_call_that_hangs_ends_at_its_deadline_and_the_server_is_told() -> None:
    async with serving("hang") as server, routed(server.url, timeout_s=0.3) as router:
        with pytest.raises(EndpointError, match=r"no complete answer .* within 0.3 s"):
            await router.complete(REQUEST)
        await asyncio.wait_for(server.closed_early.wait(), 5)


async def test_an_answer_that_takes_too_long_did_not_stand_still() -> None:
    slow = [chunk({"content": "x"}), *["pause", chunk({"content": "x"})] * 150]
    async with serving(slow) as server, routed(server.url, timeout_s=1.2) as router:
        with pytest.raises(EndpointError, match=r"not complete after 1\.2") as caught:
            await router.complete(REQUEST)
    assert marks(caught.value)[3] == "timeout"


async def test_cancelling_a_call_reaches_the_server() -> None:
    async with serving("hang") as server, routed(server.url) as router:
        call = asyncio.create_task(router.complete(REQUEST))
        await server.arrived.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(server.closed_early.wait(), 5)


async def test_a_dead_endpoint_is_passed_over_while_another_lives() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        async with serving(GOOD) as server, routed(dead, server.url) as router:
            replies = [await router.complete(of_session(n)) for n in range(24)]
    assert {reply.endpoint for reply in replies} == {server.url}
    # Which of them is first at home at the dead one is a matter of their names; nobody is after that.
    assert [reply.faults for reply in replies if reply.retries] == ["connect"]


async def test_calls_go_to_the_endpoint_with_the_fewest_open_calls() -> None:
    async with serving("hang") as one, serving("hang") as other, routed(one.url, other.url) as router:
        calls = [asyncio.create_task(router.complete(of_session(n))) for n in range(8)]
        calls += [asyncio.create_task(router.complete(replace(REQUEST, session=""))) for _ in range(2)]
        async with asyncio.timeout(5):
            await asyncio.gather(one.until_asked(4), other.until_asked(4))
            await asyncio.gather(one.arrived.wait(), other.arrived.wait())
        assert 4 <= len(one.requests) <= 6
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_the_environment_changes_no_route_and_leaks_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "NEBIUS_API_KEY"):
        monkeypatch.setenv(name, "secret-of-another-service")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    async with serving(GOOD) as server:
        async with routed(server.url) as router:
            await router.complete(REQUEST)
        async with routed(server.url, environ={"MODEL_KEY": "named-key"}) as router:
            await router.complete(REQUEST)
    assert not [value for headers in server.headers for value in headers.values() if "secret" in value]
    assert server.headers[1]["authorization"] == "Bearer named-key"


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "http://host:port/v1", "ftp://host/v1", "http:///v1"])
def test_an_address_that_is_none_is_a_mistake_of_the_user(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a base URL"):
        Router({"m": ModelConfig(endpoints=(Endpoint(base_url=url),))}, {}, environ={})


@pytest.mark.parametrize("url", ["http://me:hidden@h/v1", "http://h/v1?key=hidden", "http://h/v1#x"])
def test_an_address_holds_no_key(url: str) -> None:
    with pytest.raises(ConfigError, match="endpoint http://h/v1") as caught:
        Router({"m": ModelConfig(endpoints=(Endpoint(base_url=url),))}, {}, environ={})
    assert "hidden" not in str(caught.value)


async def test_a_named_key_that_is_not_set_is_a_mistake_of_the_user() -> None:
    endpoint = Endpoint(base_url="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is empty"):
        Router({"m": ModelConfig(endpoints=(endpoint,))}, {}, environ={})


async def test_a_key_that_no_header_takes_is_a_mistake_of_the_user_and_not_shown() -> None:
    endpoint = Endpoint(base_url="http://127.0.0.1:1/v1", api_key_env="KEY")
    with pytest.raises(ConfigError, match="variable KEY has a line break") as caught:
        Router({"m": ModelConfig(endpoints=(endpoint,))}, {}, environ={"KEY": "hidden\nhidden"})
    assert "hidden" not in str(caught.value)


async def test_a_probe_says_what_is_wrong_with_a_route() -> None:
    async with serving(GOOD, max_model_len=4096) as server:
        async with routed(server.url, context_length=4096) as router:
            assert await router.probe("m") == ""
        async with routed(server.url, context_length=5000) as router:
            assert "accepts 4,096 tokens, context_length says 5,000" in await router.probe("m")
        async with routed(server.url, served_name="other") as router:
            assert "serves m, not other" in await router.probe("m")
        assert server.requests == []  # it was free
    async with routed(server.url) as router:
        assert server.url in await router.probe("m")


async def test_an_examination_asks_each_endpoint_for_tokens_and_a_tool_call() -> None:
    ready = [{"index": 0, "id": "t", "function": {"name": "ready", "arguments": "{}"}}]
    calls = [chunk({"tool_calls": ready}, "tool_calls"), usage(20, 4)]
    refusal = (400, {"message": "this model has no tool parser"}, dict[str, str]())
    async with (
        serving(calls, max_model_len=40_960) as able,
        serving(GOOD) as unwilling,
        serving(refusal) as unable,
        routed(able.url, unwilling.url, unable.url) as router,
    ):
        good, fair, bad = await router.examine("m", with_tools=True)
        plain = (await router.examine("m"))[0]
    assert (good.problem, good.usage, good.context_length) == ("", Usage(20, 4), 40_960)
    assert good.notes[-1] == "calls tools" and good.notes[0].startswith("answers in")
    assert (fair.problem, fair.notes[-1]) == ("", "accepts tools, called none")
    assert (bad.url, bad.usage) == (unable.url, Usage())
    assert bad.problem.startswith("does not answer with tools: HTTP 400: this model has no tool parser")
    assert len(unable.requests) == 2  # each time once
    assert able.requests[0]["tools"][0]["function"]["name"] == "ready"
    assert "tools" not in able.requests[1] and len(plain.notes) == 1
    async with serving([chunk({"content": "ready"}, "stop")]) as silent, routed(silent.url) as router:
        assert (await router.examine("m"))[0].notes[-1].startswith("tells no usage")


async def test_one_hang_leaves_time_for_another_endpoint() -> None:
    async with serving("hang") as stuck, serving(GOOD) as good:
        async with routed(stuck.url, good.url, timeout_s=5.0, first_token_s=0.2) as router:
            replies = [await router.complete(of_session(number)) for number in range(24)]
        assert {reply.endpoint for reply in replies} == {good.url}
        faults = Counter(reply.faults for reply in replies)
        assert faults == {"timeout": endpoint.FAULTS_IN_A_ROW, "": 24 - endpoint.FAULTS_IN_A_ROW}
        await asyncio.wait_for(stuck.closed_early.wait(), 5)


async def test_what_one_endpoint_asks_for_is_waited_for_there_and_cools_nothing() -> None:
    later = (429, {"message": "slow down"}, {"Retry-After": "1"})
    async with serving(later, GOOD) as server, routed(server.url) as router:
        started = time.monotonic()
        waited, *others = await asyncio.gather(*(router.complete(of_session(n)) for n in range(5)))
        assert time.monotonic() - started >= 1.0
    retried = [reply for reply in (waited, *others) if reply.retries]
    assert [(reply.retries, reply.faults) for reply in retried] == [(1, "429")]
    assert retried[0].queue_s >= 1.0  # all that came before the attempt that was answered
    assert max(reply.queue_s for reply in (waited, *others) if not reply.retries) < 0.5


async def test_an_endpoint_that_asks_for_time_has_it_although_another_fails_meanwhile() -> None:
    later = (429, {"message": "slow down"}, {"Retry-After": "1"})
    async with (
        serving(later, GOOD) as busy,
        serving(BROKEN) as broken,
        routed(busy.url, broken.url) as router,
    ):
        started = time.monotonic()
        # Without a session, the first of those with as many open calls is asked first.
        reply = await router.complete(replace(REQUEST, session=""))
        waited_s = time.monotonic() - started
    assert (reply.endpoint, reply.faults[:7]) == (busy.url, "429,500")
    assert waited_s >= 1.0


@pytest.mark.parametrize(("status", "bound"), [(429, "patience_s"), (500, "timeout_s")])
async def test_a_wait_that_does_not_fit_its_bound_is_not_begun(status: int, bound: str) -> None:
    later = (status, {"message": "slow down"}, {"Retry-After": "30"})
    settings: dict[str, Any] = {bound: 5.0}
    async with serving(later) as server, routed(server.url, **settings) as router:
        with pytest.raises(EndpointError, match=rf"within 5 s.*: .*HTTP {status}: slow down"):
            await asyncio.wait_for(router.complete(REQUEST), 2)
    assert len(server.requests) == 1


async def test_what_an_endpoint_does_not_take_is_waited_for_and_is_no_part_of_the_tries_or_the_time() -> None:
    refused: list[Any] = [(status, {"message": "not now"}, {}) for status in (429, 503, 502, 529)] * 3
    async with serving(*refused, BROKEN, GOOD) as server, routed(server.url, timeout_s=0.6) as router:
        reply = await asyncio.wait_for(router.complete(REQUEST), 10)
        slots = router.slots[RouteKey("m", server.url)]
        assert (slots.pausing, slots.refusal, slots.away) == (0, "", "")
    assert (reply.retries, reply.faults) == (13, "429,503,502,529," * 3 + "500")
    assert reply.queue_s > 0.6


async def test_a_server_that_restarts_costs_a_wait_that_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is not there is asked for often, however long the pauses are that overload asks for.
    monkeypatch.setattr(chat, "BACKOFF_S", 60.0)
    monkeypatch.setattr(chat, "MAX_BACKOFF_S", 60.0)
    monkeypatch.setattr(chat, "MAX_AWAY_BACKOFF_S", 0.1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    async with routed(url) as router, asyncio.timeout(10):
        slots = router.slots[RouteKey("m", url)]
        calls = [asyncio.create_task(router.complete(of_session(number))) for number in range(8)]
        while slots.pausing < 8:  # noqa: ASYNC110  (a few turns of the loop)
            await asyncio.sleep(0)
        assert (slots.in_flight, slots.waiting) == (0, 8) and "no connection" in slots.refusal
        async with serving((502, {"message": "nobody behind this"}, {}), GOOD, port=port):
            replies = await asyncio.gather(*calls)
    assert sum(reply.faults.endswith("502") for reply in replies) == 1
    assert {reply.endpoint for reply in replies} == {url} and slots.waiting == 0
    assert all(reply.faults.startswith("connect") for reply in replies)


async def test_endpoints_that_take_no_call_have_their_turns_until_one_does() -> None:
    refusal: tuple[int, dict[str, str], dict[str, str]] = (503, {"message": "full"}, {})
    for first in range(2):  # whichever is at home
        behaviours: list[list[Any]] = [[refusal], [refusal, refusal, GOOD]]
        one, other = behaviours[first], behaviours[1 - first]
        async with serving(*one) as here, serving(*other) as there, routed(here.url, there.url) as router:
            reply = await asyncio.wait_for(router.complete(REQUEST), 5)
        assert reply.endpoint == (there if first == 0 else here).url and 4 <= reply.retries <= 5


async def test_an_endpoint_that_refuses_its_key_is_passed_over_while_another_takes_the_calls() -> None:
    denial: tuple[int, dict[str, str], dict[str, str]] = (401, {"message": "bad key"}, {})
    async with serving(denial) as locked, serving(GOOD) as good, routed(locked.url, good.url) as router:
        replies = [await router.complete(of_session(number)) for number in range(12)]
        assert router.slots[RouteKey("m", locked.url)].denial == f"endpoint {locked.url}: HTTP 401: bad key"
    assert {reply.endpoint for reply in replies} == {good.url}
    assert [reply.faults for reply in replies if reply.retries] == ["401"] and len(locked.requests) == 1


async def test_only_where_all_endpoints_deny_whatever_is_asked_the_run_has_to_end() -> None:
    denial: tuple[int, dict[str, str], dict[str, str]] = (403, {"message": "forbidden"}, {})
    async with serving(denial) as one, serving(denial) as other, routed(one.url, other.url) as router:
        slots = router.slots[RouteKey("m", other.url)]
        # One task may be denied for its prompt, in all its attempts.
        for session in (1, 1, 1, 2, 3):
            assert slots.away == ""
            with pytest.raises(AccessDenied, match="HTTP 403: forbidden") as caught:
                await router.complete(of_session(session))
            assert marks(caught.value)[2:] == (1, "403,403")
        assert slots.away.startswith("model m: every call is denied: endpoint http")
        assert "mend the key or models.m" in slots.away


async def test_only_endpoints_that_answer_nobody_for_too_long_are_away() -> None:
    busy: tuple[int, dict[str, str], dict[str, str]] = (429, {"message": "busy"}, {})
    not_taken = r"model m: not taken by http\S+ within 0.2 s \(patience_s\): .*HTTP 429: busy"
    async with serving([GOOD[0], "hang"], busy) as server, routed(server.url, patience_s=0.2) as router:
        slots = router.slots[RouteKey("m", server.url)]
        answered = asyncio.create_task(router.complete(REQUEST))
        await server.until_asked(1)
        with pytest.raises(EndpointError, match=not_taken):
            await router.complete(REQUEST)
        assert slots.away == ""  # it works for another
        answered.cancel()
        await asyncio.gather(answered, return_exceptions=True)
        before = len(server.requests)
        with pytest.raises(EndpointError, match=not_taken) as caught:
            await router.complete(REQUEST)
        assert slots.away.startswith(f"model m: {server.url} answered nothing for 0.2 s")
        assert marks(caught.value)[2] == len(server.requests) - before - 1


def test_tokens_that_a_service_counts_apart_make_no_call_cheaper_than_free() -> None:
    model = ModelConfig(endpoints=(Endpoint(base_url="http://127.0.0.1:1/v1"),), price=PRICE)
    assert chat.cost(Usage(10, 1, 1000), model) == pytest.approx((10 * 0.5 + 10.0) / 1e6)


async def test_a_call_waits_for_a_slot_of_its_route_and_its_own_time_stands_still_meanwhile() -> None:
    async with serving("hang", GOOD) as server, routed(server.url, timeout_s=0.5) as router:
        slots = router.slots[RouteKey("m", server.url)]
        slots.limit = 1
        first = asyncio.create_task(router.complete(REQUEST))
        await server.arrived.wait()
        second = asyncio.create_task(router.complete(REQUEST))
        async with asyncio.timeout(5):
            while not slots.waiting:  # noqa: ASYNC110  (a few turns of the loop)
                await asyncio.sleep(0)
        assert (slots.in_flight, slots.waiting, len(server.requests)) == (1, 1, 1)
        first.cancel()
        reply = await second
        assert 0 < reply.queue_s < 0.5
        slots.limit = 0
        third = asyncio.create_task(router.complete(REQUEST))
        done, _ = await asyncio.wait({third}, timeout=0.6)
        assert not done
        slots.limit = 1
        assert (await third).queue_s > 0.5
        assert [sample.ending for sample in slots.take()] == ["cancelled", "ok", "ok"]
        assert (slots.in_flight, slots.waiting) == (0, 0)


async def test_a_task_has_its_time_limit_for_itself_and_not_for_its_waits() -> None:
    busy: tuple[int, dict[str, str], dict[str, str]] = (429, {"message": "busy"}, {"retry-after": "0.4"})
    limits = TaskLimits(wall_s=0.3)
    async with serving(GOOD, busy, GOOD, "hang") as server, routed(server.url) as router:
        slots = router.slots[RouteKey("m", server.url)]
        slots.limit = 0

        async def two_at_once() -> list[ChatReply]:
            return list(await asyncio.gather(router.complete(REQUEST), router.complete(REQUEST)))

        work = asyncio.create_task(in_time(two_at_once(), limits, "answer"))
        done, _ = await asyncio.wait({work}, timeout=0.5)
        assert not done and slots.waiting == 2
        slots.limit = 1
        # One of them is refused meanwhile, and waits for longer than the limit is.
        assert [reply.content for reply in await work] == ["Hello", "Hello"]
        began = time.monotonic()
        with pytest.raises(LimitReached, match=r"no answer within 0\.3 s \(limits\.wall_s\)"):
            await in_time(router.complete(REQUEST), limits, "answer")
        assert time.monotonic() - began < 5
        # The same where the task has been at work, waits, and then takes too long.
        slots.limit = 0
        work = asyncio.create_task(in_time(two_at_once(), limits, "answer"))
        await asyncio.wait({work}, timeout=0.4)
        assert slots.waiting == 2
        slots.limit = 2
        with pytest.raises(LimitReached):
            await asyncio.wait_for(work, 5)


async def test_samples_that_nobody_takes_do_not_pile_up() -> None:
    slots = Slots()
    for number in range(2 * MAX_SAMPLES):
        await slots.acquire()
        slots.release(Sample("ok", number))
    kept = slots.take()
    assert (len(kept), kept[-1].duration_s, slots.take()) == (MAX_SAMPLES, 2 * MAX_SAMPLES - 1, [])


async def test_connections_are_used_again_and_never_more_than_the_pool() -> None:
    async with serving(GOOD, [*GOOD, "[DONE]", "pause"]) as server:  # whose end comes later, too
        async with routed(server.url) as router:
            for _ in range(5):
                await router.complete(REQUEST)
        assert len(server.peers) == 1
        async with routed(server.url, pool=3) as router:
            await asyncio.gather(*(router.complete(REQUEST) for _ in range(30)))
        # On a busy machine an end may come too late for its connection to be used again; most do not.
        assert len(server.peers) <= 16


async def test_a_server_that_ignores_stream_is_understood() -> None:
    call = {"id": "t1", "type": "function", "function": {"name": "answer", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "t2"}]}
    counted = {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    whole = {
        "model": "m-2",
        "choices": [{"message": message, "finish_reason": "tool_calls"}],
        "usage": counted,
    }
    response = web.Response(body=json.dumps(whole).encode(), content_type="application/json")
    async with serving(response) as server, routed(server.url) as router:
        reply = await router.complete(REQUEST)
    assert [call.call_id for call in reply.tool_calls] == ["t1", "t2"]
    assert (reply.content, reply.model, reply.usage) == ("", "m-2", Usage(3, 2, 0, 1))


async def test_reasoning_is_no_part_of_the_answer_but_its_first_token_is_the_first() -> None:
    thought = [chunk({"reasoning_content": "hm"}), chunk({"reasoning": "hm"}), "hang"]
    async with serving(thought) as server, routed(server.url, stall_s=0.1) as router:
        with pytest.raises(EndpointError, match="stood still"):
            await router.complete(REQUEST)
        assert router.slots[RouteKey("m", server.url)].take()[0].duration_s >= 0.1
    halves = [
        chunk({"reasoning": "hm"}),
        chunk({"content": "a\ud83d"}),
        chunk({"content": "\ude00b"}, "stop"),
    ]
    async with serving(halves) as server, routed(server.url) as router:
        assert (await router.complete(REQUEST)).content == "a\U0001f600b"
    late = [chunk({"reasoning": "hm"}), "pause", chunk({"content": "ab"}, "stop")]
    async with serving(late) as server, routed(server.url) as router:
        reply = await router.complete(REQUEST)
    assert reply.content == "ab" and reply.decode_s > 0.9 * PAUSE_S


async def test_a_call_whose_endpoint_tells_no_usage_is_counted_here_and_priced() -> None:
    log, book_of = MemoryLog(), Task("t", "q", "a")
    call = {"index": 0, "id": "t", "function": {"name": "answer", "arguments": "{}"}}
    silent = [
        chunk({"reasoning": "x" * 39}),
        chunk({"content": "Hello there!", "tool_calls": [call]}, "stop"),
    ]
    async with serving(silent, GOOD) as server, routed(server.url) as router:
        book = journal(book_of, log)
        replies = [await book.call(CHAT, {}, lambda: router.complete(REQUEST)) for _ in range(2)]
    # "hi" in its message; two words and a mark, a name with its brackets, and ten tokens of thought.
    assert replies[0].usage == Usage(1 + 8, 3 + 3 + 10, reasoning_tokens=10, is_estimated=True)
    assert replies[0].cost_usd == pytest.approx((9 * 2 + 16 * 10) / 1e6)
    assert book.cost_usd == book.paid_usd == pytest.approx(replies[0].cost_usd + replies[1].cost_usd)
    rows = log.of("model_call")
    assert [(row.prompt_tokens, row.is_estimated) for row in rows] == [(9, True), (1000, None)]
    # What an endpoint told is recorded as ever, to the byte.
    told = [json.loads(log.bodies[row.payload_hash])["usage"] for row in rows]
    assert "is_estimated" not in told[1] and CHAT.decode(log.bodies[rows[0].payload_hash], {}) == replies[0]


async def test_a_redirect_is_not_followed_and_a_key_is_never_repeated() -> None:
    moved = (307, {"message": "elsewhere"}, {"location": "http://127.0.0.1:1/v1"})
    denied = (401, {"message": "Incorrect API key provided: named-key"}, dict[str, str]())
    environ = {"MODEL_KEY": "named-key"}
    async with serving(moved, denied) as server, routed(server.url, environ=environ) as router:
        with pytest.raises(AccessDenied, match=r"redirects to http://127.0.0.1:1/v1"):
            await router.complete(REQUEST)
        with pytest.raises(AccessDenied, match=r"key provided: \*\*\*") as caught:
            await router.complete(REQUEST)
    assert "named-key" not in str(caught.value)


async def test_the_log_has_where_a_failed_call_went_and_what_it_met() -> None:
    log, task = MemoryLog(), Task("t", "q", "a")
    async with serving(BROKEN, RATE_LIMITED, GOOD, "hang") as server, routed(server.url) as router:
        book = journal(task, log)
        await book.call(CHAT, {}, lambda: router.complete(REQUEST))
        server.arrived.clear()
        cut = asyncio.create_task(book.call(CHAT, {}, lambda: router.complete(REQUEST)))
        await server.arrived.wait()
        cut.cancel()
        await asyncio.gather(cut, return_exceptions=True)
    async with serving((400, {"message": "bad"}, {})) as other, routed(other.url) as router:
        with pytest.raises(Refusal):
            await book.call(CHAT, {}, lambda: router.complete(REQUEST))
    seen = [(row.status, row.endpoint, row.model, row.retries, row.detail) for row in log.of("model_call")]
    assert seen == [
        ("ok", server.url, "m-1", 2, "500,429"),
        ("error", server.url, "m", 0, ""),
        ("error", other.url, "m", 0, "400"),
    ]
    assert log.events[0].reasoning_tokens == 0


async def test_images_follow_the_text_as_parts() -> None:
    message = Message("user", "look", ("data:image/png;base64,AAAA",))
    content = chat.as_openai(message)["content"]
    assert [part["type"] for part in content] == ["text", "image_url"]
