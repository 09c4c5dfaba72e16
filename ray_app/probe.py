"""What an endpoint can do, asked before a run: its list of models, a few tokens, a tool call.

The list is free; the tokens are not, at the model's price, and what they used is in the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from ray_app.config import ModelConfig
from ray_app.endpoint import Route, TimeLimits
from ray_app.faults import Fault
from ray_app.records import Usage

LIST_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
# One would do for most; reasoning models refuse a limit that leaves no room for an answer.
TOKENS = 16
TOOL_TOKENS = 256
NO_USAGE = Usage()
QUESTION = "Call the tool `ready` if you have it; else say: ready."
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "ready",
        "description": "Says that you are ready.",
        "parameters": {
            "type": "object",
            "properties": {"state": {"type": "string", "enum": ["ready"]}},
            "required": ["state"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Probe:
    """What one endpoint showed. `problem` is "" where a run can use it; `notes` are worth knowing.

    `context_length` is what it says itself (vLLM does), in tokens.
    """

    url: str
    problem: str = ""
    notes: tuple[str, ...] = ()
    context_length: int | None = None
    usage: Usage = NO_USAGE

    @property
    def line(self) -> str:
        return self.problem or "; ".join(self.notes) or "answers"


async def listing(route: Route, http: aiohttp.ClientSession, model: ModelConfig) -> Probe:
    """Whether the endpoint lists the model, with room for the context that the config names."""
    name = model.served_name or route.key.model
    try:
        listed = await route.listed(http, LIST_TIMEOUT_S)
    except Fault as fault:
        return Probe(route.url, str(fault.error).removeprefix(f"endpoint {route.url}: "))
    if listed is None:
        return Probe(route.url, notes=("lists no models",))
    found = next((item for item in listed if item.get("id") == name), None)
    if found is None:
        ids = ", ".join(str(item.get("id")) for item in listed[:5]) or "nothing"
        return Probe(route.url, f"serves {ids}, not {name}")
    length = found.get("max_model_len")
    if not isinstance(length, int):
        return Probe(route.url)
    if length < model.context_length:
        problem = f"accepts {length:,} tokens, context_length says {model.context_length:,}"
        return Probe(route.url, problem, context_length=length)
    return Probe(route.url, context_length=length)


async def examine(
    route: Route, http: aiohttp.ClientSession, model: ModelConfig, body: bytes, with_tools: bool
) -> Probe:
    """The listing, and one call with `body`, tried once; with tools, whether it can use them."""
    listed = await listing(route, http, model)
    if listed.problem:
        return listed
    deadline = asyncio.get_running_loop().time() + ANSWER_TIMEOUT_S
    try:
        answered = await route.ask(http, body, "", TimeLimits(deadline, None, ANSWER_TIMEOUT_S))
    except Fault as fault:
        lacks = "does not answer with tools" if with_tools else "does not answer"
        return replace(listed, problem=f"{lacks}: {str(fault.error).removeprefix(f'endpoint {route.url}: ')}")
    answer = answered.answer
    notes = (*listed.notes, f"answers in {answered.done - answered.sent:.2g} s")
    if not answer.usage.prompt_tokens:
        notes += ("tells no usage: its tokens and their price are estimated",)
    if with_tools:
        chose = any(call.name == "ready" for call in answer.tool_calls)
        notes += ("calls tools" if chose else "accepts tools, called none",)
    return replace(listed, notes=notes, usage=answer.usage)
