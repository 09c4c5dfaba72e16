"""Every outside call of a task, recorded once and served again on resume.

A task is a deterministic function of its calls' outputs (model replies, retrieved documents, code
output). So the checkpoint of a task is the list of its completed calls: a resumed task runs from
the start, is given each recorded output whose request is still the same, and goes on live where the
record ends, in mid-turn. What is recorded is only outputs; prompts follow from them.

A replay is the same with a record that is whole (`Record.end`): calls that failed are in it too, and what
is not in it never goes out.

A call counts as completed when its keeper has it: then it outlives this process (`committer.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from ray_app import steady
from ray_app.errors import Diverged, EvalError, InfrastructureError, kind_of, recorded
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
from ray_app.waits import waiting

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
class RecordedError:
    """How a call failed, as its event tells."""

    kind: str
    name: str  # of its class
    message: str

    @property
    def is_cancelled(self) -> bool:
        """Whether it was stopped from outside: by a time limit, or with its run."""
        return self.message.startswith("CancelledError:")

    def error(self) -> EvalError:
        return recorded(self.kind, self.name, self.message)


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call from the log: its place, what was asked, and its output.

    `label` says what it was, for people. One with an `error` failed; its `body` is then "", or the output
    that was refused.
    """

    call_seq: int
    request_hash: str
    body: str
    texts: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    error: RecordedError | None = None


# (kind, turn, tool) of an event that is no call.
Note = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class End:
    """How a recorded task ended. `by_time`: an end that its calls do not lead to (a time limit, a death)."""

    by_time: RecordedError | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What the log has of a task: the calls that were completed, and which other events are there.

    With an `end` it is a whole one, to be replayed: no call goes out beside it.
    """

    calls: Sequence[RecordedCall] = ()
    notes: frozenset[Note] = frozenset()
    paid_usd: float = 0.0  # for all its calls, those that failed or were made twice too
    end: End | None = None


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
    # Of the calls that led here, replayed ones too: what the limits of the task count.
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    # Of every call of the task in any attempt: what its events in the log add up to. A replay pays nothing.
    paid_usd: float = 0.0
    live_model_calls: int = 0
    replayed: int = 0
    clock: Callable[[], float] = steady.now
    timer: Callable[[], float] = time.monotonic
    watch: Watch | None = None
    keeper: Keeper | None = None
    # Asked before each call, recorded ones too, so that a resume stops where the run did.
    guard: Callable[[Journal], None] | None = None
    # Set when the attempt was given up: what still runs of it must pay for nothing more.
    is_closed: bool = False
    # Of a replay: its task came to its recorded end, or asked for more than is recorded.
    is_over: bool = False

    def __post_init__(self) -> None:
        self._known = {(call.call_seq, call.request_hash): call for call in self.record.calls}
        self.paid_usd = self.record.paid_usd
        self.record = replace(self.record, calls=())  # each body leaves when it is served
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
        columns: Mapping[str, Any] | None = None,
        is_awaited: bool = True,
    ) -> T:
        """The recorded output of this call, or `perform()`'s, recorded before it is returned.

        `request` is plain JSON data that decides the output; `columns`, read when the call has ended, are
        further ones of its event. An output that `check` refuses (by raising) is kept as evidence, counted,
        and never served again. Errors become events and rise. `is_awaited=False`: the record need not
        outlive this process before the task goes on, since the output costs nothing and can be made again.
        """
        if self.guard is not None:
            self.guard(self)
        seq, request_hash = self.made, request_digest(codec, request)
        known = self._known.pop((seq, request_hash), None)
        if self.record.end is not None:
            row = self._row(codec.kind, call_seq=seq, role=role, request_hash=request_hash, is_replayed=True)
            return self._replayed(codec, row, known, self.record.end)
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
            _put(row, columns)
            self.sink.append(self._with_price(_failed(row, error), error))
            raise
        row.duration_s = self.timer() - started
        _put(row, columns)
        self.live_model_calls += codec.kind == "model_call"
        self.paid_usd += _price(output)
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

    def _replayed(self, codec: Codec[T], row: Event, known: RecordedCall | None, end: End) -> T:
        """The recorded output, told of in the log as when it came. Raises the recorded error, or Diverged."""
        if known is None:
            raise self._past_the_record(row, end)
        output = self._counted(codec.decode(known.body, known.texts)) if known.body else None
        if known.error is not None:
            row.status, row.error_kind = "error", known.error.error().kind
            row.error, row.error_type = known.error.message, known.error.name
        if output is None:
            self.sink.append(row)
        else:
            self._write(codec, row, output)
        if known.error is not None:
            self.is_over = known.error.is_cancelled and end.by_time is not None
            raise (end.by_time if self.is_over and end.by_time else known.error).error()
        assert output is not None
        self.replayed += 1
        self.made += 1
        return output

    def _past_the_record(self, row: Event, end: End) -> EvalError:
        """What a call meets that is not recorded: the end that came there by time, or Diverged."""
        self.is_over = True
        if end.by_time is not None and not self._recorded_ahead():
            return end.by_time.error()
        error = Diverged(self._divergence(row))
        self.sink.append(_failed(row, error))
        return error

    def _recorded_ahead(self) -> list[RecordedCall]:
        return [call for (seq, _), call in self._known.items() if seq >= self.made]

    def _divergence(self, row: Event) -> str:
        there = [call for call in self._recorded_ahead() if call.call_seq == row.call_seq]
        label = call_label(row.kind, row.role, row.tool, row.alias)
        where = f"diverged: turn {row.turn}, call {row.call_seq}, {label}"
        if not there:
            return f"{where}: one call more than was recorded"
        if there[-1].label != label:
            return f"{where}: recorded was {there[-1].label}"
        asked = f"{there[-1].request_hash[:8]} recorded, {row.request_hash[:8]} now"
        return f"{where}: it is asked otherwise than recorded (digest of the request: {asked})"

    async def _admitted(self) -> None:
        if self.keeper is not None:
            with waiting():
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
        is_known = self._is_replaying and (kind, self.turn, tool) in self.record.notes
        is_replayed = is_known or self.record.end is not None
        row = self._row(kind, is_replayed=is_replayed, duration_s=duration, **columns)
        row.t_start -= duration
        self.sink.append(row)

    def _row(self, kind: EventKind, **columns: Any) -> Event:
        place = {"turn": self.turn, "tool": self.tool, "alias": self.alias}
        return Event(**{**self._base, "kind": kind, "t_start": self.clock(), **place, **columns})

    def _write(self, codec: Codec[T], row: Event, output: T) -> None:
        body = codec.encode(output, lambda text: self.sink.payload(text, "text"))
        row.payload_hash = self.sink.payload(body)
        _put(row, codec.columns(output))
        self.sink.append(row)

    def _with_price(self, row: Event, error: BaseException) -> Event:
        """The row of a failed call; where the endpoint answered all the same, with what it took."""
        reply = getattr(error, "reply", None)
        if isinstance(reply, ChatReply):
            _put(row, _chat_columns(reply))
            self.paid_usd += reply.cost_usd
            self._counted(reply)
        return row

    def _counted(self, output: T) -> T:
        self.cost_usd += _price(output)
        if isinstance(output, ChatReply):
            self.usage = Usage(
                self.usage.prompt_tokens + output.usage.prompt_tokens,
                self.usage.completion_tokens + output.usage.completion_tokens,
                self.usage.cached_tokens + output.usage.cached_tokens,
                self.usage.reasoning_tokens + output.usage.reasoning_tokens,
            )
        return output

    @property
    def elapsed_s(self) -> float:
        return self.timer() - self.started


def request_digest(codec: Codec[Any], request: Any) -> str:
    """By which a call is found again in the record of any run: of what is asked, and nothing else."""
    return digest([codec.kind, request])


def call_label(kind: str, role: str, tool: str, alias: str) -> str:
    """What a call is, in words: `search/search-1 model_call`, `judge model_call`."""
    return f"{f'{tool}/{alias}' if tool else role} {kind}".strip()


def _price(output: object) -> float:
    return output.cost_usd if isinstance(output, ChatReply | Retrieval | ExecutionResult) else 0.0


def _put(row: Event, columns: Mapping[str, Any] | None) -> None:
    for name, value in (columns or {}).items():
        setattr(row, name, value)


def _failed(row: Event, error: BaseException) -> Event:
    message = str(error) if isinstance(error, EvalError) else f"{type(error).__name__}: {error}"
    row.status, row.error_kind, row.error = "error", kind_of(error), message[:2000]
    row.error_type = type(error).__name__
    row.model = getattr(error, "model", row.model)
    _put(row, tried(error))
    return row


def tried(error: BaseException) -> dict[str, Any]:
    """Columns of a model call that failed: where it went last, how often, and what its attempts met."""
    return {
        "endpoint": getattr(error, "endpoint", ""),
        "retries": getattr(error, "retries", 0),
        "detail": getattr(error, "faults", ""),
    }


def _encode_chat(reply: ChatReply, keep: Callable[[str], str]) -> str:
    # By hand: `asdict` copies what it finds, at the price of all the rest of a row.
    value = {name: getattr(reply, name) for name in _REPLY}
    value["usage"] = {name: getattr(reply.usage, name) for name in _USAGE}
    if not reply.usage.is_estimated:
        del value["usage"]["is_estimated"]  # so that older records keep their bytes, which a replay compares
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
        "reasoning_tokens": reply.usage.reasoning_tokens,
        "cost_usd": reply.cost_usd,
        "is_estimated": reply.usage.is_estimated or None,
        "retries": reply.retries,
        "detail": reply.faults,
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
        "web_calls": found.web_calls,
        "cost_usd": found.cost_usd,
        "detail": found.web_error,
    }


def _encode_run(result: ExecutionResult, keep: Callable[[str], str]) -> str:
    return json.dumps(asdict(result), ensure_ascii=False)


def _decode_run(body: str, texts: Mapping[str, str]) -> ExecutionResult:
    value = json.loads(body)
    return ExecutionResult(**{**value, "isolation": tuple(value["isolation"])})


def _run_columns(result: ExecutionResult) -> dict[str, Any]:
    isolation = ",".join(result.isolation)
    return {"exit_status": result.exit_status, "cost_usd": result.cost_usd, "detail": isolation}


CHAT: Codec[ChatReply] = Codec("model_call", _encode_chat, _decode_chat, _chat_columns)
RETRIEVAL: Codec[Retrieval] = Codec("retrieval", _encode_retrieval, _decode_retrieval, _retrieval_columns)
CODE: Codec[ExecutionResult] = Codec("code", _encode_run, _decode_run, _run_columns)
