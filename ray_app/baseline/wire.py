"""The OpenAI chat-completions shapes: replies, stream chunks, model lists and errors. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ray_app.baseline.faults import Fault
from ray_app.baseline.rules import BaselineReply
from ray_app.records import ToolCall, Usage

PIECE_CHARS = 32
CREATED = 0  # a fixed time stamp keeps replies to equal requests equal


class Reply(Protocol):
    """What a chat completion is made of; `records.ChatReply` is one too."""

    @property
    def content(self) -> str: ...

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]: ...

    @property
    def finish_reason(self) -> str: ...

    @property
    def usage(self) -> Usage: ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every object of one reply repeats."""

    completion_id: str
    model: str


def damaged(reply: BaselineReply, fault: Fault | None) -> BaselineReply:
    """The reply as a faulty model would give it; other faults never get this far."""
    if fault == "empty":
        return replace(reply, content="", tool_calls=())
    if fault == "malformed_tool_call":
        calls = tuple(replace(call, arguments=call.arguments.rstrip("}")) for call in reply.tool_calls)
        return replace(reply, tool_calls=calls)
    return reply


def completion(reply: Reply, envelope: Envelope) -> dict[str, Any]:
    """The body of a reply that is not streamed."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content or None}
    if reply.tool_calls:
        message["tool_calls"] = _calls(reply)
    elif reply.content == "":
        message["content"] = ""
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
    return {**_head(envelope, "chat.completion"), "choices": [choice], "usage": usage(reply)}


def chunks(reply: Reply, envelope: Envelope, *, with_usage: bool) -> Iterator[dict[str, Any]]:
    """The bodies of a streamed reply: role, pieces, finish reason, and the usage where it was asked for."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in _pieces(reply.content)]
    deltas += [{"tool_calls": [part]} for part in _call_parts(reply)]
    extra = {"usage": None} if with_usage else {}
    for delta in deltas:
        yield {**_chunk(envelope, delta, None), **extra}
    yield {**_chunk(envelope, {}, reply.finish_reason), **extra}
    if with_usage:
        yield {**_head(envelope, "chat.completion.chunk"), "choices": [], "usage": usage(reply)}


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"


def usage(reply: Reply) -> dict[str, Any]:
    counted = reply.usage
    cached = {"prompt_tokens_details": {"cached_tokens": counted.cached_tokens}}
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "total_tokens": counted.prompt_tokens + counted.completion_tokens,
        **(cached if counted.cached_tokens else {}),
    }


def models(names: Sequence[str], owner: str = "baseline") -> dict[str, Any]:
    data = [{"id": name, "object": "model", "created": CREATED, "owned_by": owner} for name in names]
    return {"object": "list", "data": data}


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error reply; `kind` is OpenAI's `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _head(envelope: Envelope, kind: str) -> dict[str, Any]:
    return {"id": envelope.completion_id, "object": kind, "created": CREATED, "model": envelope.model}


def _chunk(envelope: Envelope, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**_head(envelope, "chat.completion.chunk"), "choices": [choice]}


def _calls(reply: Reply) -> list[dict[str, Any]]:
    return [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in reply.tool_calls
    ]


def _call_parts(reply: Reply) -> Iterator[dict[str, Any]]:
    """Per call its name first, then its arguments in pieces."""
    for index, call in enumerate(reply.tool_calls):
        function = {"name": call.name, "arguments": ""}
        yield {"index": index, "id": call.call_id, "type": "function", "function": function}
        for piece in _pieces(call.arguments):
            yield {"index": index, "function": {"arguments": piece}}


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
