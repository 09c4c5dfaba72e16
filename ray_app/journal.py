"""Every outside call of a task, recorded once and served again on resume.

A task is a deterministic function of its calls' outputs (model replies, retrieved documents, code
output). So the checkpoint of a task is the list of its completed calls: a resumed task runs from
the start, is given each recorded output whose request is still the same, and goes on live where the
record ends, in mid-turn. What is recorded is only outputs; prompts follow from them.

A call counts as completed when its keeper has it: then it outlives this process (`committer.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Generic, Literal, Protocol, TypeVar

from ray_app.errors import EvalError, InfrastructureError, kind_of
from ray_app.records import (
    ChatReply,
    Event,
    EventKind,
    ExecutionResult,
    Hit,
    Retrieval,
    Role,
    Task,
    ToolCall,
    Usage,
    digest,
)

T = TypeVar("T")

# Of an event: what an attempt's rows have in common.
_BASE = (
    *("run_id", "epoch", "rollout_key", "judge_key", "task_id", "trial", "attempt"),
    *("category", "answer_type", "worker"),
)
_REPLY, _USAGE = (tuple(field.name for field in fields(kind)) for kind in (ChatReply, Usage))


class EventSink(Protocol):
    """Where events and payloads go; `events.EventWriter` is the real one."""

    def append(self, event: Event) -> str: ...

    def payload(self, body: str, media: Literal["json", "text"] = "json") -> str: ...


class Watch(Protocol):
    """Is told of each call that goes out; `pulse.Pulse` is the real one."""

    def begin(self, row: Event, model: str = "") -> int: ...

    def end(self, number: int) -> None: ...


class Keeper(Protocol):
    """Makes calls outlive this process; `committer.Committer` is the real one."""

    async def admit(self, rollout_key: str, trial: int, attempt: int) -> None:
        """Returns when this attempt's call may go out. Raises InfrastructureError where none may any more."""

    async def committed(self) -> None:
        """Returns when everything appended so far would outlive this process."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A completed call from the log: its place, what was asked, and its output."""

    call_seq: int
    request_hash: str
    body: str
    texts: Mapping[str, str] = field(default_factory=dict)


# (kind, turn, tool) of an event that is no call.
Note = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Record:
    """What the log has of a task: the calls that were completed, and which other events are there."""

    calls: Sequence[RecordedCall] = ()
    notes: frozenset[Note] = frozenset()


NOTHING = Record()


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How one kind of output becomes a payload and event columns, and comes back.

    `texts` names the long texts that are stored once each, by content, beside the payload.
    """

    kind: EventKind
    encode: Callable[[T, Callable[[str], str]], str]
    decode: Callable[[str, Mapping[str, str]], T]
    columns: Callable[[T], dict[str, Any]]


@dataclass
class Journal:
    """The calls of one attempt at one task. Not shared between tasks.

    Callers set `turn`, `tool` and `alias` before a call; they label its event.
    """

    task: Task
    sink: EventSink
    base: Event
    record: Record = NOTHING
    turn: int = -1
    tool: str = ""
    alias: str = ""
    made: int = 0  # calls completed, replayed ones too; their outputs are in the log, not here
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    live_model_calls: int = 0
    replayed: int = 0
    clock: Callable[[], float] = time.time
    timer: Callable[[], float] = time.monotonic
    watch: Watch | None = None
    keeper: Keeper | None = None
    # Set when the attempt was given up: what still runs of it must pay for nothing more.
    is_closed: bool = False

    def __post_init__(self) -> None:
        self._known = {(call.call_seq, call.request_hash): call for call in self.record.calls}
        self.record = Record(notes=self.record.notes)  # each body leaves when it is served
        self._is_replaying = False
        # What all rows share: a row is made for each call, and `dataclasses.replace` costs ten times as much.
        self._base = {name: getattr(self.base, name) for name in _BASE}
        self.started = self.timer()

    async def call(
        self,
        codec: Codec[T],
        request: Any,
        perform: Callable[[], Awaitable[T]],
        *,
        role: Role = "",
        check: Callable[[T], object] | None = None,
        is_awaited: bool = True,
    ) -> T:
        """The recorded output of this call, or `perform()`'s, recorded before it is returned.

        `is_awaited=False`: the record need not outlive this process before the task goes on, since the
        output costs nothing and can be made again.

        `request` is plain JSON data that decides the output. An output that `check` refuses (by
        raising) is kept as evidence, counted, and never served again. Errors become events and rise.
        """
        seq, request_hash = self.made, digest([codec.kind, request])
        known = self._known.pop((seq, request_hash), None)
        if known is not None:
            self.replayed += 1
            self.made += 1
            self._is_replaying = True
            return self._counted(codec.decode(known.body, known.texts))
        self._is_replaying = False
        await self._admitted()
        row = self._row(codec.kind, call_seq=seq, role=role, request_hash=request_hash)
        started = self.timer()
        try:
            output = await self._watched(row, request, perform)
        except BaseException as error:  # a cancelled call may have been paid for too
            row.duration_s = self.timer() - started
            self.sink.append(_failed(row, error))
            raise
        row.duration_s = self.timer() - started
        self.live_model_calls += codec.kind == "model_call"
        self._counted(output)
        try:
            if check is not None:
                check(output)
        except Exception as error:
            self._write(codec, _failed(row, error), output)
            raise
        self._write(codec, row, output)
        self.made += 1
        if self.keeper is not None and is_awaited:
            await self.keeper.committed()
            self._check_open()  # refused: the next attempt has not seen this output
        return output

    async def _admitted(self) -> None:
        if self.keeper is not None:
            await self.keeper.admit(self.base.rollout_key, self.base.trial, self.base.attempt)
        self._check_open()

    def _check_open(self) -> None:
        if self.is_closed:
            raise InfrastructureError("this attempt was given up; its calls are made by the next one")

    async def _watched(self, row: Event, request: Any, perform: Callable[[], Awaitable[T]]) -> T:
        if self.watch is None:
            return await perform()
        number = self.watch.begin(row, request.get("model", "") if isinstance(request, dict) else "")
        try:
            return await perform()
        finally:
            self.watch.end(number)

    def note(self, kind: EventKind, *, started: float | None = None, **columns: Any) -> None:
        """Add an event that is no call: a turn, a tool call as a whole, a verdict.

        One that an earlier attempt wrote after the same call stands in the log already, and is marked so.
        """
        duration = 0.0 if started is None else self.timer() - started
        tool = columns.get("tool", self.tool)
        is_replayed = self._is_replaying and (kind, self.turn, tool) in self.record.notes
        row = self._row(kind, is_replayed=is_replayed, duration_s=duration, **columns)
        row.t_start -= duration
        self.sink.append(row)

    def _row(self, kind: EventKind, **columns: Any) -> Event:
        place = {"turn": self.turn, "tool": self.tool, "alias": self.alias}
        return Event(**{**self._base, "kind": kind, "t_start": self.clock(), **place, **columns})

    def _write(self, codec: Codec[T], row: Event, output: T) -> None:
        body = codec.encode(output, lambda text: self.sink.payload(text, "text"))
        row.payload_hash = self.sink.payload(body)
        for name, value in codec.columns(output).items():
            setattr(row, name, value)
        self.sink.append(row)

    def _counted(self, output: T) -> T:
        if isinstance(output, ChatReply | Retrieval):
            self.cost_usd += output.cost_usd
        if isinstance(output, ChatReply):
            self.usage = Usage(
                self.usage.prompt_tokens + output.usage.prompt_tokens,
                self.usage.completion_tokens + output.usage.completion_tokens,
                self.usage.cached_tokens + output.usage.cached_tokens,
            )
        return output

    @property
    def elapsed_s(self) -> float:
        return self.timer() - self.started


def _failed(row: Event, error: BaseException) -> Event:
    message = str(error) if isinstance(error, EvalError) else f"{type(error).__name__}: {error}"
    row.status, row.error_kind, row.error = "error", kind_of(error), message[:2000]
    row.retries = getattr(error, "retries", 0)
    return row


def _encode_chat(reply: ChatReply, keep: Callable[[str], str]) -> str:
    # By hand: `asdict` copies what it finds, at the price of all the rest of a row.
    value = {name: getattr(reply, name) for name in _REPLY}
    value["usage"] = {name: getattr(reply.usage, name) for name in _USAGE}
    value["tool_calls"] = [asdict(call) for call in reply.tool_calls]
    return json.dumps(value, ensure_ascii=False)


def _decode_chat(body: str, texts: Mapping[str, str]) -> ChatReply:
    value = json.loads(body)
    calls = tuple(ToolCall(**call) for call in value.pop("tool_calls"))
    return ChatReply(**{**value, "usage": Usage(**value.pop("usage"))}, tool_calls=calls)


def _chat_columns(reply: ChatReply) -> dict[str, Any]:
    return {
        "model": reply.model,
        "endpoint": reply.endpoint,
        "queue_s": reply.queue_s,
        "prefill_s": reply.prefill_s,
        "decode_s": reply.decode_s,
        "prompt_tokens": reply.usage.prompt_tokens,
        "cached_tokens": reply.usage.cached_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "cost_usd": reply.cost_usd,
        "retries": reply.retries,
    }


def _encode_retrieval(found: Retrieval, keep: Callable[[str], str]) -> str:
    hits = [{**asdict(hit), "text": keep(hit.text)} for hit in found.hits]
    value = {"cost_usd": found.cost_usd, "web_calls": found.web_calls, "web_error": found.web_error}
    return json.dumps({"hits": hits, **value}, ensure_ascii=False)


def _decode_retrieval(body: str, texts: Mapping[str, str]) -> Retrieval:
    value = _retrieval(body)
    hits = tuple(Hit(**{**row, "text": texts[row["text"]]}) for row in value.pop("hits"))
    return Retrieval(hits, **value)


def named_texts(body: str) -> set[str]:
    """The names of the texts that stand beside the payload of a retrieval."""
    return {hit["text"] for hit in _retrieval(body)["hits"]}


def _retrieval(body: str) -> dict[str, Any]:
    value = json.loads(body)
    # A run that began with an older version has the bare hits there; it may be resumed.
    return {"hits": value} if isinstance(value, list) else value


def _retrieval_columns(found: Retrieval) -> dict[str, Any]:
    web = sum(hit.source == "tavily" for hit in found.hits)
    return {
        "search_backend": "tavily_fallback" if web else "local_only",
        "local_hits": len(found.hits) - web,
        "web_hits": web,
        "cost_usd": found.cost_usd,
        "detail": found.web_error,
    }


def _encode_run(result: ExecutionResult, keep: Callable[[str], str]) -> str:
    return json.dumps(asdict(result), ensure_ascii=False)


def _decode_run(body: str, texts: Mapping[str, str]) -> ExecutionResult:
    value = json.loads(body)
    return ExecutionResult(**{**value, "isolation": tuple(value["isolation"])})


def _run_columns(result: ExecutionResult) -> dict[str, Any]:
    return {"exit_status": result.exit_status, "detail": ",".join(result.isolation)}


CHAT: Codec[ChatReply] = Codec("model_call", _encode_chat, _decode_chat, _chat_columns)
RETRIEVAL: Codec[Retrieval] = Codec("retrieval", _encode_retrieval, _decode_retrieval, _retrieval_columns)
CODE: Codec[ExecutionResult] = Codec("code", _encode_run, _decode_run, _run_columns)
