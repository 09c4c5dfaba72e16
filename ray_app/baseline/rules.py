"""The baseline model: deterministic rules behind a chat model's interface. Not a language model.

`reply` is a pure function of the request. It reads the prompt's text as a model would, and nothing else:
no question id, no list of questions, no file, no clock. It is a floor that a real model has to beat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_app.baseline import coder, desk, judge, orchestrate, query, reader
from ray_app.baseline.language import count_tokens
from ray_app.baseline.prompt import Role, read, role_of, text_of
from ray_app.records import ToolCall, Usage

MODEL_NAME = "baseline"


@dataclass(frozen=True, slots=True)
class BaselineReply:
    """What a chat completion is made of. Token counts: see `language.count_tokens`."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = field(default_factory=Usage)

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.tool_calls else "stop"


def reply(request: Mapping[str, Any]) -> BaselineReply:
    """The reply to the body of a chat-completions request (`messages`, `tools`)."""
    role = role_of(request)
    if role in {"agent", "user"}:
        move = desk.agent(request) if role == "agent" else desk.user(request)
        call, content = _move_call(move, request), move.text
    else:
        call = _call(request) if role == "orchestrator" else None
        content = "" if call else _content(role, request)
    written = count_tokens(content) + (count_tokens(call.name + call.arguments) if call else 0)
    return BaselineReply(content, (call,) if call else (), Usage(_prompt_tokens(request), written))


def _call(request: Mapping[str, Any]) -> ToolCall | None:
    chosen = orchestrate.choose(text_of(request, "user"), request["tools"])
    if chosen is None:
        return None
    return ToolCall(f"call_{chosen.tool}", chosen.tool, json.dumps({"model": chosen.alias}))


def _move_call(move: desk.Move, request: Mapping[str, Any]) -> ToolCall | None:
    if not move.tool:
        return None
    # Unique in the dialogue, and the same for the same one.
    return ToolCall(f"call_{len(request['messages'])}", move.tool, json.dumps(dict(move.arguments)))


def _content(role: Role, request: Mapping[str, Any]) -> str:
    prompt, system = text_of(request, "user"), text_of(request, "system")
    if role == "judge":
        return judge.reply(prompt)
    if role == "query":
        return f"<query>{query.write(read(prompt).question.text)}</query>"
    if role == "coder":
        shown = read(prompt)
        return f"```python\n{coder.program(shown.question, shown.documents)}\n```"
    return _answer(
        prompt, is_boxed="<answer>" not in prompt.rpartition("\n\n")[2], is_bare="\\boxed" not in system
    )


def _answer(prompt: str, *, is_boxed: bool, is_bare: bool) -> str:
    found = reader.answer(read(prompt, has_instruction=not is_boxed))
    if is_boxed:
        text = found.answer if is_bare else f"\\boxed{{{found.answer}}}"
    else:
        text = f"<answer>{found.answer}</answer>"
    if "<confidence>" in prompt.rpartition("\n\n")[2]:
        text += f"\n<confidence>{round(100 * min(0.95, max(0.05, found.support)))}</confidence>"
    return text


def _prompt_tokens(request: Mapping[str, Any]) -> int:
    texts = [
        text_of({"messages": [message]}, message.get("role", "")) for message in request.get("messages") or []
    ]
    return sum(count_tokens(text) for text in texts) + (
        count_tokens(json.dumps(request["tools"])) if request.get("tools") else 0
    )
