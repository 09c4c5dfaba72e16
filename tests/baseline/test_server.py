"""The baseline server over real HTTP, asked by the `openai` client and by plain HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from ray_app.baseline.faults import FAULTS, Failures, Latency
from ray_app.baseline.rules import reply
from ray_app.baseline.server import ServerSettings
from tests.baseline.prompts import answer_request, context, turn_request
from tests.baseline.serving import serving

ANSWER = answer_request("Which exception does `heapq.heappop` raise when the heap is empty?", context())
TURN = turn_request("What is a heap?")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ServerSettings(models=("baseline", "baseline-2"))) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@contextmanager
def failing(**rates: float) -> Iterator[openai.OpenAI]:
    """A client of a server that fails at these rates; the client does not try again."""
    settings = ServerSettings(failures=Failures.model_validate(rates))
    with (
        serving(settings) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_text_reply_is_the_rules_reply_with_its_usage(client: openai.OpenAI) -> None:
    made, expected = client.chat.completions.create(**ANSWER), reply(ANSWER)
    assert made.choices[0].message.content == expected.content == "<answer>IndexError</answer>"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage and made.usage.prompt_tokens == expected.usage.prompt_tokens
    assert made.usage.total_tokens == expected.usage.prompt_tokens + expected.usage.completion_tokens
    assert made.model == "baseline"


def test_streamed_text_is_the_same_text_with_usage_last_when_asked_for(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.chat.completions.create(**ANSWER, **options))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == reply(ANSWER).content
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "stop"
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens > 0
    assert all(part.usage is None for part in parts[:-1])


def test_stream_without_stream_options_has_no_usage(client: openai.OpenAI) -> None:
    parts = list(client.chat.completions.create(**ANSWER, stream=True))
    assert all(part.choices and part.usage is None for part in parts)


def test_tool_call_comes_whole_and_in_fragments(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**TURN).choices[0]
    assert whole.finish_reason == "tool_calls"
    call = whole.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("search", {"model": "search-1"})
    name = arguments = identity = ""
    for part in client.chat.completions.create(**TURN, stream=True):
        for piece in part.choices[0].delta.tool_calls or ():
            identity += piece.id or ""
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (identity, name, arguments) == (call.id, "search", call.function.arguments)


def test_tool_choice_narrows_the_tools(client: openai.OpenAI) -> None:
    chosen: Any = {"type": "function", "function": {"name": "answer"}}
    named = client.chat.completions.create(**TURN, tool_choice=chosen).choices[0]
    assert named.message.tool_calls[0].function.name == "answer"
    none = client.chat.completions.create(**TURN, tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.message.content


def test_long_prompts_are_answered_like_short_ones(client: openai.OpenAI) -> None:
    filler = tuple(f"Passage {n} is about the river {n}. " * 20 for n in range(40))
    request = answer_request("How many km long is the Ule?", context((*filler, "The Ule is 48 km long.")))
    assert len(request["messages"][0]["content"]) > 20_000
    assert client.chat.completions.create(**request).choices[0].message.content == "<answer>48</answer>"


def test_models_and_health(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["baseline", "baseline-2"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"n": 2}, 400, "n"),
        ({"model": "gpt"}, 404, "model"),
    ],
)
def test_bad_requests_get_openai_error_bodies(
    url: str, change: dict[str, Any], status: int, field: str
) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={**ANSWER, **change})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == field
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_that_is_not_json_is_a_bad_request(url: str) -> None:
    answer = httpx.post(
        f"{url}/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_injected_rate_limit_carries_retry_after() -> None:
    with failing(http_429=1.0, retry_after_s=7) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**ANSWER)
        assert caught.value.response.headers["retry-after"] == "7"
        assert caught.value.code == "rate_limit_exceeded"


def test_injected_server_error() -> None:
    with failing(http_500=1.0) as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**ANSWER)


def test_injected_hang_gives_nothing_while_the_client_waits() -> None:
    with failing(hang=1.0) as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**ANSWER)


def test_a_hang_that_nobody_interrupts_ends_as_a_gateway_timeout() -> None:
    with serving(ServerSettings(failures=Failures(hang=1.0, hang_s=0.05))) as url:
        assert httpx.post(f"{url}/v1/chat/completions", json=ANSWER).status_code == 504


def test_injected_empty_reply_has_neither_text_nor_call() -> None:
    with failing(empty=1.0) as client:
        message = client.chat.completions.create(**TURN).choices[0].message
    assert message.content == "" and message.tool_calls is None


def test_injected_malformed_call_has_arguments_that_are_not_json() -> None:
    with failing(malformed_tool_call=1.0) as client:
        call = client.chat.completions.create(**TURN).choices[0].message.tool_calls[0]
    with pytest.raises(ValueError, match=r"delimiter|Expecting"):
        json.loads(call.function.arguments)


def test_a_retry_of_the_same_request_can_succeed() -> None:
    settings = ServerSettings(failures=Failures(http_500=0.5, retry_after_s=0))
    with serving(settings) as url, httpx.Client() as plain:
        bodies = [{**ANSWER, "seed": seed} for seed in range(8)]
        tries = [
            [plain.post(f"{url}/v1/chat/completions", json=body).status_code for _ in range(8)]
            for body in bodies
        ]
    assert all(200 in row for row in tries)
    assert any(row[0] == 500 for row in tries)


def test_streaming_does_not_change_what_is_drawn_for_a_request() -> None:
    settings = ServerSettings(failures=Failures(http_500=0.5))
    outcomes: list[list[int]] = []
    for stream in (False, True):
        with serving(settings) as url, httpx.Client() as plain:
            bodies = [{**ANSWER, "seed": seed, "stream": stream} for seed in range(12)]
            outcomes.append([plain.post(f"{url}/v1/chat/completions", json=b).status_code for b in bodies])
    assert outcomes[0] == outcomes[1]
    assert len(set(outcomes[0])) == 2


def test_latency_is_spent_and_a_stream_starts_before_it_ends() -> None:
    with serving(ServerSettings(latency=Latency(mean_s=0.4, sigma=0.0))) as url:
        started, first = time.monotonic(), 0.0
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ANSWER, "stream": True}) as answer:
            for _ in answer.iter_lines():
                first = first or time.monotonic() - started
        whole = time.monotonic() - started
    assert 0.12 <= first < whole
    assert whole >= 0.4 * 0.9


def test_latency_follows_its_distribution_and_repeats_for_equal_requests() -> None:
    latency = Latency(mean_s=2.0, sigma=0.5)
    draws = [latency.draw_s(str(number)) for number in range(4000)]
    assert sum(draws) / len(draws) == pytest.approx(2.0, rel=0.05)
    assert draws[:10] == [latency.draw_s(str(number)) for number in range(10)]
    assert Latency().draw_s("x") == 0


def test_failure_rates_are_met() -> None:
    failures = Failures(http_429=0.1, http_500=0.2, hang=0.05, empty=0.15, malformed_tool_call=0.1)
    draws = [failures.draw(str(number), number % 3) for number in range(6000)]
    for fault in FAULTS:
        assert draws.count(fault) / 6000 == pytest.approx(failures.rate(fault), abs=0.02)
    assert draws.count(None) / 6000 == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("values", [{"http_500": 0.7, "hang": 0.4}, {"hang": -0.1}, {"http_503": 0.1}])
def test_impossible_or_unknown_rates_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Failures(**values)
