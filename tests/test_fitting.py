"""Prompts inside a model's context: by our own count, and where the endpoint counts otherwise."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from ray_app import fitting
from ray_app.chat import Router
from ray_app.config import Alias, ModelConfig
from ray_app.errors import ContextOverflow
from ray_app.fitting import MIN_REPLY_TOKENS, Fit, fit, shortened
from ray_app.records import Hit, Message, Task
from ray_app.tokens import TokenCounter, WordTokens
from ray_app.tools.base import Caller
from ray_app.workspace import CodeRun, Workspace
from tests.model_server import chunk, usage
from tests.stand_ins import MemoryLog, journal


class Exact(WordTokens):
    is_estimate = False


def model(context_length: int, **settings: Any) -> ModelConfig:
    endpoint = {"base_url": "http://127.0.0.1:9/v1"}
    return ModelConfig.model_validate(
        {"endpoints": [endpoint], "context_length": context_length, "price": {}} | settings
    )


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Fit(500, 1000, 2000), Fit(500, 1000, 2000)),  # all of it has room
        (Fit(500, 3000, 2000), Fit(500, 1500, 2000)),  # the context gives way first
        (Fit(2500, 3000, 2000), Fit(2500, 0, 1500)),  # then the reply
        (Fit(4000 - MIN_REPLY_TOKENS, 0, 2000), Fit(4000 - MIN_REPLY_TOKENS, 0, MIN_REPLY_TOKENS)),
        (Fit(3950, 10, 50), Fit(3950, 0, 50)),  # a short reply was asked for
    ],
)
def test_the_context_gives_way_before_the_reply_and_the_question_never(wanted: Fit, expected: Fit) -> None:
    assert fit("m", model(4000), wanted, Exact()) == expected


def test_a_question_without_room_for_a_reply_is_refused_with_its_size_and_the_context() -> None:
    wanted = Fit(4001 - MIN_REPLY_TOKENS, 0, 2000)
    with pytest.raises(
        ContextOverflow, match=r"model m: a question of 3 tokens .* context of 4000 "
    ) as refused:
        fit("m", model(4000), wanted, Exact(), "one two three")
    assert refused.value.kind == "model"


def test_an_estimate_leaves_a_quarter_free_and_lets_the_endpoint_refuse() -> None:
    assert fit("m", model(4000), Fit(500, 3000, 2000), WordTokens()) == Fit(500, 1000, 2000)
    assert fit("m", model(4000), Fit(2400, 10, 2000), WordTokens()) == Fit(2400, 0, 800)
    assert fit("m", model(4000), Fit(3500, 10, 2000), WordTokens()).reply == MIN_REPLY_TOKENS


# What servers say of one and the same call: 3,000 tokens and a reply of 1,500 where 4,096 fit.
SAID = [
    "This model's maximum context length is 4096 tokens. However, you requested 1500 output tokens and your "
    "prompt contains 3000 input tokens, for a total of 4500 tokens.",
    "This model's maximum context length is 4,096 tokens. However, you requested 4500 tokens (3000 in the "
    "messages, 1500 in the completion). Please reduce the length of the messages or completion.",
    "'max_tokens' is too large: 1500. This model's maximum context length is 4096 tokens and your request "
    "has 3000 input tokens (1500 > 4096 - 3000).",
    "The decoder prompt (length 3000) is longer than the maximum model length of 4096.",
    "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 3000 `inputs` tokens and 1500 new ones",
]


@pytest.mark.parametrize("message", SAID)
def test_the_numbers_of_a_refusal_decide_how_much_goes(message: str) -> None:
    # It counts 1.5 tokens where we count one, and 404 with the spare ones are too many: 280 of ours.
    assert shortened(Fit(500, 1500, 1500), message) == Fit(500, 1500 - 280, 1500)
    # That was not enough before: then each of ours is worth one of theirs at most.
    assert shortened(Fit(500, 1500, 1500), message, 2) == Fit(500, 1500 - 420, 1500)


@pytest.mark.parametrize(
    "message",
    [
        "context_length_exceeded",
        "This model's maximum context length is 4096 tokens. However, you requested 1500 output tokens and "
        "your prompt contains at least 2597 input tokens.",
    ],
)
def test_without_its_numbers_half_goes_each_time_until_nothing_can(message: str) -> None:
    sent: Fit | None = Fit(500, 1500, 1500)
    steps = []
    while sent is not None:
        steps.append(sent)
        sent = shortened(sent, message)
    assert [step.context for step in steps[:3]] == [1500, 750, 375]
    assert steps[-1].context == 0 and MIN_REPLY_TOKENS <= steps[-1].reply < 2 * MIN_REPLY_TOKENS


def test_another_tokenizer_and_a_hidden_template_are_met_within_the_shortenings_allowed() -> None:
    rng = random.Random(11)
    for _ in range(2000):
        ratio, hidden = rng.uniform(0.8, 3.0), rng.randrange(0, 1500)
        sent = Fit(rng.randrange(50, 1500), rng.randrange(0, 30000), rng.randrange(300, 8000))
        limit = round(sent.fixed * ratio) + hidden + MIN_REPLY_TOKENS + 400 + rng.randrange(0, 20000)
        for number in range(1, fitting.MAX_SHORTENINGS + 2):
            prompt = round((sent.fixed + sent.context) * ratio) + hidden
            if prompt + sent.reply <= limit:
                break
            said = f"maximum context length is {limit} tokens; the request has {prompt} input tokens"
            shorter = shortened(sent, said, number)
            assert shorter is not None, (sent, said)
            assert (shorter.fixed, shorter.reply <= sent.reply) == (sent.fixed, True)
            sent = shorter
        else:
            pytest.fail(f"still too long after {number - 1} shortenings: {sent} in {limit}, ratio {ratio}")


@dataclass
class Endpoint:
    """A model server with a tokenizer of its own, a template that nobody told of, and a small context."""

    limit: int
    says_numbers: bool = True
    accepted: list[dict[str, Any]] = field(default_factory=list)
    refused: int = 0
    url: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = 300 + sum(len(message["content"]) for message in body["messages"]) // 2
        if prompt + body["max_tokens"] > self.limit:
            self.refused += 1
            text = (
                f"This model's maximum context length is {self.limit} tokens and your request has {prompt} "
            )
            message = f"{text} input tokens" if self.says_numbers else "the prompt is too long"
            error = {"message": message, "type": "invalid_request_error", "code": "context_length_exceeded"}
            return web.json_response({"error": error}, status=400)
        self.accepted.append(body)
        lines = [chunk({"content": "<query>found</query>"}), chunk({}, "stop"), usage(prompt, 5)]
        text = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
        return web.Response(text=text, headers={"content-type": "text/event-stream"})


@asynccontextmanager
async def answering(endpoint: Endpoint) -> AsyncIterator[Endpoint]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", endpoint.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield endpoint
    finally:
        await runner.cleanup()


QUESTION = "Which stone floats, and why does it do so?"
TASK = Task("q1", QUESTION, "pumice")


def gathered() -> Workspace:
    space = Workspace()
    space.add_hits([Hit(n, f"document {n} " + "about stones " * 40, 1.0 - n / 100) for n in range(20)])
    space.runs.append(CodeRun("print('pumice')", "pumice"))
    return space


def write(context: str) -> tuple[Message, ...]:
    return (Message("user", f"{context}Question: {QUESTION}"),)


@pytest.mark.parametrize("says_numbers", [True, False])
async def test_a_prompt_that_the_endpoint_calls_too_long_is_shortened_recorded_and_asked_again(
    says_numbers: bool,
) -> None:
    async with answering(Endpoint(3000, says_numbers)) as endpoint:
        settings = model(20000, endpoints=[{"base_url": endpoint.url}])
        client, log = Router({"m": settings}, {}), MemoryLog()
        caller, alias = Caller(client, {"m": settings}), Alias(model="m", sampling={"max_tokens": 500})
        own = journal(TASK, log)
        reply = await caller.ask_expert(own, alias, TASK, gathered(), write)
        prompt = endpoint.accepted[0]["messages"][0]["content"]
        asked_again = endpoint.refused
        resumed = journal(TASK, MemoryLog(), log.record())
        assert await caller.ask_expert(resumed, alias, TASK, gathered(), write) == reply
        await client.close()
    # The lowest-ranked documents went, the best of them, the program and the question stayed.
    assert "document 0 about" in prompt and "document 19 about" not in prompt
    assert "print('pumice')" in prompt and prompt.endswith(QUESTION)
    refused, [answered] = log.of("overflow"), log.of("model_call")
    assert 1 <= len(refused) == asked_again <= fitting.MAX_SHORTENINGS
    assert {(row.status, row.error_kind, row.call_seq) for row in refused} == {("error", "model", -1)}
    left = [row.context_tokens or 0 for row in [*refused, answered]]
    assert left == sorted(left, reverse=True) and len(set(left)) == len(left) and left[-1] > 100
    cuts = [row.context_cut or 0 for row in [*refused, answered]]
    assert cuts[0] == 0 and cuts[-1] > left[0] - left[-1] - 10
    # The whole is one call, so a resume asks nothing again.
    assert (resumed.replayed, endpoint.refused, len(endpoint.accepted)) == (1, asked_again, 1)


async def test_a_refusal_that_no_shortening_mends_is_terminal_after_a_bounded_number_of_them() -> None:
    async with answering(Endpoint(100, says_numbers=False)) as endpoint:
        settings = model(20000, endpoints=[{"base_url": endpoint.url}])
        client, log = Router({"m": settings}, {}), MemoryLog()
        with pytest.raises(ContextOverflow, match="too long"):
            alias = Alias(model="m")
            await Caller(client, {"m": settings}).ask_expert(
                journal(TASK, log), alias, TASK, gathered(), write
            )
        await client.close()
    assert endpoint.refused == fitting.MAX_SHORTENINGS + 1
    assert [row.status for row in log.of("model_call")] == ["error"]


def test_the_chat_template_the_schemas_and_the_images_are_counted() -> None:
    tokens: TokenCounter = WordTokens()
    plain = fitting.size([Message("user", "two words")], [], tokens)
    assert plain == 2 + fitting.MESSAGE_TOKENS
    seen = fitting.size([Message("user", "two words", ("data:image/png;base64,AA",))], [], tokens)
    assert seen == plain + fitting.IMAGE_TOKENS
    offered = fitting.size([Message("user", "two words")], [{"name": "search"}], tokens)
    assert offered >= plain + fitting.TOOLS_TOKENS + 3
