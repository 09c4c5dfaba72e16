import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from ray_app import chat
from ray_app.chat import ChatRequest, Router
from ray_app.config import Endpoint, ModelConfig, Price, Sampling
from ray_app.errors import AccessDenied, ConfigError, ContextOverflow, EndpointError, Refusal
from ray_app.records import Message, ToolCall, Usage
from tests.model_server import GOOD, chunk, serving

REQUEST = ChatRequest("m", (Message("user", "hi"),), Sampling(temperature=0.5, max_tokens=7), session="s-1")
PRICE = Price(input=2.0, output=10.0, cached_input=0.5)
RATE_LIMITED = (429, {"message": "slow down", "code": "rate_limit"}, {"Retry-After": "0"})
BROKEN: tuple[int, dict[str, str], dict[str, str]] = (500, {"message": "oops"}, {})


def of_session(number: int) -> ChatRequest:
    return replace(REQUEST, session=f"task-{number}")


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF_S", 0.01)


@asynccontextmanager
async def routed(
    *urls: str, environ: dict[str, str] | None = None, **settings: object
) -> AsyncIterator[Router]:
    key = "MODEL_KEY" if environ and "MODEL_KEY" in environ else None
    endpoints = [Endpoint(base_url=url, api_key_env=key) for url in urls]
    model = ModelConfig.model_validate({"endpoints": endpoints, "price": PRICE} | settings)
    router = Router({"m": model}, {}, environ=environ or {}, rng=random.Random(1))
    yield router
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
    "fault",
    [RATE_LIMITED, BROKEN, [GOOD[0], "reset"], [GOOD[0], GOOD[1]], ["{not json"], []],
    ids=["429", "500", "reset", "truncated", "malformed", "empty"],
)
async def test_a_passing_fault_is_tried_again_and_counted(fault: object) -> None:
    async with serving(fault, fault, GOOD) as server, routed(server.url) as router:
        reply = await router.complete(REQUEST)
    assert (reply.content, reply.retries, len(server.requests)) == ("Hello", 2, 3)


async def test_a_lasting_fault_ends_after_a_bounded_number_of_tries() -> None:
    async with serving(BROKEN) as server, routed(server.url) as router:
        with pytest.raises(EndpointError, match=r"HTTP 500: .*oops"):
            await router.complete(REQUEST)
    assert len(server.requests) == chat.MAX_TRIES


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
        with pytest.raises(expected, match=error["message"]):
            await router.complete(REQUEST)
    assert len(server.requests) == 1


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
            replies = [await router.complete(of_session(n)) for n in range(8)]
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


async def test_a_named_key_that_is_not_set_is_a_mistake_of_the_user() -> None:
    endpoint = Endpoint(base_url="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is empty"):
        Router({"m": ModelConfig(endpoints=(endpoint,))}, {}, environ={})


async def test_a_probe_says_what_is_wrong_with_a_route() -> None:
    async with serving(GOOD) as server:
        async with routed(server.url) as router:
            assert await router.probe("m") == ""
        async with routed(server.url, served_name="other") as router:
            assert "serves m, not other" in await router.probe("m")
    async with routed(server.url) as router:
        assert server.url in await router.probe("m")


async def test_images_follow_the_text_as_parts() -> None:
    message = Message("user", "look", ("data:image/png;base64,AAAA",))
    content = chat.as_openai(message)["content"]
    assert [part["type"] for part in content] == ["text", "image_url"]
