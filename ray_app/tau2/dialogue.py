"""What is said and done in a simulation: messages of the agent and the user, and what their tools answered.

Both sides see the same entries in part only: the agent hears no tool calls of the user's, the user none of
the agent's. What a model is sent follows from the entries alone, so a resumed dialogue asks the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_app.records import Message, ToolCall, Usage

Side = Literal["assistant", "user"]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of one side, with its arguments read."""

    call_id: str
    name: str
    arguments: Mapping[str, Any]
    side: Side = "assistant"


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a side: text for the other side, or tool calls (then a text beside them is for nobody).

    `at` is wall time (Unix seconds). `source` says where it came from (models, endpoints, tokens), for the
    record; no model sees it.
    """

    side: Side
    text: str = ""
    calls: tuple[Call, ...] = ()
    at: float = 0.0
    took_s: float = 0.0
    cost_usd: float = 0.0
    usage: Usage = field(default_factory=Usage)
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answered:
    """What a tool answered to the call `call_id` of a side."""

    call_id: str
    text: str
    side: Side = "assistant"
    is_error: bool = False
    at: float = 0.0


Entry = Said | Answered


def heard_by(side: Side, entries: Iterable[Entry]) -> list[Entry]:
    """The entries that `side` knows of: its own, its tools' answers, and what the other side said to it."""
    return [entry for entry in entries if entry.side == side or (isinstance(entry, Said) and not entry.calls)]


def chat(side: Side, system: str, entries: Sequence[Entry]) -> tuple[Message, ...]:
    """The messages that the model which speaks for `side` is sent; its own are the assistant's."""
    return Message("system", system), *(_message(side, entry) for entry in heard_by(side, entries))


def _message(side: Side, entry: Entry) -> Message:
    if isinstance(entry, Answered):
        return Message("tool", entry.text, tool_call_id=entry.call_id)
    calls = tuple(ToolCall(call.call_id, call.name, json.dumps(call.arguments)) for call in entry.calls)
    return Message("assistant" if entry.side == side else "user", entry.text, tool_calls=calls)


def tool_calls(entries: Iterable[Entry]) -> list[Call]:
    """All tool calls of both sides, in their order."""
    return [call for entry in entries if isinstance(entry, Said) for call in entry.calls]


def exchanges(entries: Sequence[Entry]) -> list[tuple[Call, Answered]]:
    """Each tool call with its answer. Raises ValueError where they do not follow each other in order."""
    waiting: list[Call] = []
    found = []
    for entry in entries:
        if isinstance(entry, Answered):
            if not waiting or waiting[0].call_id != entry.call_id:
                raise ValueError(f"a tool's answer to {entry.call_id!r} follows no call of that id")
            found.append((waiting.pop(0), entry))
        elif waiting:
            raise ValueError(f"no tool answered to {waiting[0].call_id!r} ({waiting[0].name})")
        else:
            waiting = list(entry.calls)
    if waiting:
        raise ValueError(f"no tool answered to {waiting[0].call_id!r} ({waiting[0].name})")
    return found


def entries_cost(side: Side, entries: Iterable[Entry]) -> float:
    """US dollars that a side's messages cost."""
    return sum(entry.cost_usd for entry in entries if isinstance(entry, Said) and entry.side == side)
