"""The values that travel between modules: frozen (but for `Event`, a row in the making, of which there are
thousands a second), picklable, free of behaviour that does IO.

`Event` is one row of the event log (`events.py` holds the matching Arrow schema). Ids that come
from data stay data: nothing here turns one into a path.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_app.errors import ErrorKind

AnswerType = Literal["exactMatch", "multipleChoice", "reward"]
Outcome = Literal["ok", "failed", "limited", "owed"]
EventKind = Literal[
    "run_start",
    "attempt",
    "turn",
    "model_call",
    "overflow",
    "tool_call",
    "retrieval",
    "code",
    "simulation",
    "verdict",
    "result",
    "run_end",
    "limit",
    "warning",
]
Role = Literal["", "orchestrator", "expert", "user", "judge"]
Status = Literal["ok", "error", "invalid"]


def digest(value: Any) -> str:
    """SHA-256 (32 hex digits) of the canonical JSON of `value`; equal values give equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A lone surrogate, which a dataset or a model may hold, has no UTF-8 form.
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Task:
    """One question. `scope` holds the allowed document ids; None means the whole corpus."""

    task_id: str
    question: str
    answer: str
    answer_type: AnswerType = "exactMatch"
    category: str = ""
    raw_subject: str = ""
    images: tuple[str, ...] = ()
    scope: tuple[int, ...] | None = None
    rollout_key: str = field(init=False)
    judge_key: str = field(init=False)

    def __post_init__(self) -> None:
        # The position in the file is no part of the key: a reordered file resumes. The id is, so
        # that two rows with the same text stay two tasks.
        scope = None if self.scope is None else sorted(set(self.scope))
        rollout = digest([self.task_id, self.question, list(self.images), scope])
        object.__setattr__(self, "rollout_key", rollout)
        object.__setattr__(self, "judge_key", digest([rollout, self.answer, self.answer_type]))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model's request to run a tool; `arguments` is the raw JSON text, unchecked."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `images` are data or http URLs, sent as image parts after the text.

    `tool_calls` are an assistant's, `tool_call_id` says which of them a tool's message answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    images: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the endpoint reports them, or `is_estimated` where it reports none. Cached are of the
    prompt, reasoning of the completion."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    is_estimated: bool = False


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A model's answer, with where it came from and what it took (seconds, US dollars).

    `queue_s` is all that came before the attempt that was answered; `faults` names what the attempts before
    it met, in order ("429,500"; `faults.py` has the names).
    """

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = ""
    usage: Usage = Usage()
    model: str = ""
    endpoint: str = ""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cost_usd: float = 0.0
    retries: int = 0
    faults: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """One retrieved document. `score` is the inner product with the query (web hits: -1, -2, ...)."""

    document_id: int
    text: str
    score: float
    source: Literal["local", "tavily"] = "local"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What one retrieval brought: local hits, best first, then web hits (scores -1, -2, ...).

    `cost_usd` and `web_calls` are what it paid to the web: answers that were cached, or paid for by another
    retrieval that asked the same at the same time, are free. `web_error` says in one line what went wrong
    with a web fallback, "" where nothing did; the hits that came all the same are there.
    """

    hits: tuple[Hit, ...]
    cost_usd: float = 0.0
    web_calls: int = 0
    web_error: str = ""


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """What a sandboxed program did and cost. `isolation` names the layers that really held."""

    stdout: str
    stderr: str
    exit_status: int
    is_timed_out: bool
    duration_s: float
    isolation: tuple[str, ...] = ()
    cost_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a prediction is right, and who says so.

    `confidence` is the model's own, 0 to 1, where the protocol asks for it.
    """

    is_correct: bool
    method: Literal["exact", "judge", "empty", "reward"]
    extracted: str = ""
    reasoning: str = ""
    confidence: float | None = None
    judge_model: str = ""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How one attempt at a task ended. Only a result that the driver committed counts.

    `cost_usd` is what all calls of the task have cost in any attempt; `usage` is of those that led here.
    """

    task_id: str
    rollout_key: str
    judge_key: str
    trial: int
    attempt: int
    outcome: Outcome
    prediction: str = ""
    verdict: Verdict | None = None
    error_kind: ErrorKind | None = None
    error: str = ""
    turns: int = 0
    model_calls: int = 0
    replayed_calls: int = 0
    usage: Usage = Usage()
    cost_usd: float = 0.0
    duration_s: float = 0.0
    category: str = ""
    answer_type: str = ""


@dataclass(slots=True)
class Event:
    """One row of the event log, not to be changed once it is appended.

    `t_start` is wall time (Unix seconds) that no step of the clock moves, `*_s` are monotonic spans.
    `payload_hash` points into the payload table; `request_hash` is the digest of what was asked, so
    that a replay can tell whether a recorded reply still answers the same request. `context_tokens` is the
    gathered text in a prompt, `context_cut` what had no room; an `overflow` is a prompt that the endpoint
    called too long, after which a shorter one went out within the same call.
    """

    kind: EventKind
    t_start: float
    duration_s: float = 0.0
    run_id: str = ""
    epoch: int = 0
    rollout_key: str = ""
    judge_key: str = ""
    task_id: str = ""
    trial: int = 0
    attempt: int = 0
    turn: int = -1
    call_seq: int = -1
    role: Role = ""
    tool: str = ""
    alias: str = ""
    model: str = ""
    endpoint: str = ""
    status: Status = "ok"
    error_kind: ErrorKind | None = None
    error: str = ""
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost_usd: float | None = None
    retries: int = 0
    search_backend: str = ""
    local_hits: int | None = None
    web_hits: int | None = None
    exit_status: int | None = None
    outcome: Outcome | None = None
    is_correct: bool | None = None
    verdict_method: str = ""
    confidence: float | None = None
    category: str = ""
    answer_type: str = ""
    is_replayed: bool = False
    request_hash: str = ""
    payload_hash: str = ""
    detail: str = ""
    worker: str = ""
    web_calls: int | None = None
    context_tokens: int | None = None
    context_cut: int | None = None
    error_type: str | None = None  # the class behind `error`, which `error_kind` only groups
    is_estimated: bool | None = None  # the tokens and their price: the endpoint told none
