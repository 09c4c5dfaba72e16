"""Small stand-ins for what lies outside the agent: a scripted model, a fixed retriever, a log in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from ray_app.chat import ChatRequest
from ray_app.config import RunConfig
from ray_app.journal import NOTHING, Journal, Record, RecordedCall, call_label
from ray_app.records import ChatReply, Event, Hit, Retrieval, Task, ToolCall, Usage

Script = Callable[[ChatRequest], ChatReply | Exception]


def chooses(tool: str, alias: str) -> ChatReply:
    """A reply that calls `tool` with `alias`."""
    return ChatReply("", (ToolCall("c1", tool, f'{{"model": "{alias}"}}'),), "tool_calls", Usage(100, 10))


def says(text: str) -> ChatReply:
    return ChatReply(text, (), "stop", Usage(100, 10))


@dataclass
class ScriptedModel:
    """A chat client that answers each request by `script` and remembers what it was asked."""

    script: Script
    asked: list[ChatRequest] = field(default_factory=list)

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.asked.append(request)
        reply = self.script(request)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def prompts(self) -> list[str]:
        return [request.messages[-1].content for request in self.asked]


@dataclass
class FixedRetriever:
    """Returns the same hits for every query, at the same price."""

    hits: list[Hit]
    cost_usd: float = 0.0
    web_error: str = ""
    queries: list[tuple[str, str | None]] = field(default_factory=list)

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        self.queries.append((query, scope_id))
        return Retrieval(tuple(self.hits[:top_k]), self.cost_usd, int(self.cost_usd > 0), self.web_error)


@dataclass
class MemoryLog:
    """An event sink that keeps everything."""

    events: list[Event] = field(default_factory=list)
    bodies: dict[str, str] = field(default_factory=dict)

    def append(self, event: Event) -> str:
        self.events.append(event)
        return str(len(self.events))

    def payload(self, body: str, media: str = "json") -> str:
        key = hashlib.sha256(body.encode()).hexdigest()[:32]
        self.bodies[key] = body
        return key

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def record(self, calls: int = 10**9) -> Record:
        """What a resume finds of a task that died in the call after its first `calls` completed ones."""
        at = [n for n, event in enumerate(self.events) if event.call_seq >= 0 and event.status == "ok"]
        seen = self.events[: at[calls]] if calls < len(at) else self.events
        recorded = [self._recorded(self.events[n]) for n in at[:calls]]
        notes = {(event.kind, event.turn, event.tool) for event in seen if event.call_seq < 0}
        return Record(tuple(recorded), frozenset(notes))

    def _recorded(self, event: Event) -> RecordedCall:
        label = call_label(event.kind, event.role, event.tool, event.alias)
        body = self.bodies[event.payload_hash]
        return RecordedCall(event.call_seq, event.request_hash, body, self.bodies, label)


def journal(task: Task, log: MemoryLog, record: Record = NOTHING) -> Journal:
    return Journal(task, log, Event("attempt", 0.0, task_id=task.task_id), record)


def config(**changes: object) -> RunConfig:
    """A config with one model `m` and one alias a tool."""
    model = {"endpoints": [{"base_url": "http://127.0.0.1:9/v1"}], "price": {"input": 1, "output": 2}}
    values: dict[str, object] = {
        "models": {"m": model},
        "orchestrator": {"model": "m"},
        "judge": {"model": "m"},
        "tools": {
            "enhance_reasoning": {"reasoner-1": {"model": "m"}},
            "search": {"search-1": {"model": "m"}},
            "answer": {"answer-1": {"model": "m"}},
        },
    }
    return RunConfig.model_validate(values | changes)
