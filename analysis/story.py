"""One task's whole story, from its rows in the log: attempts, turns, and what every call was and gave.

Ids are compared with the log's, never used as a path. Prompts are no part of a story: the log does not hold
them, since they follow from what the calls before gave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from analysis.text import plain
from ray_app import events, extract, journal
from ray_app.errors import UserError

SHOWN_CANDIDATES = 5
NO_TEXT = "(its text is not in the log)"
# How the rows of a task lie one after the other.
ORDER = ("trial", "epoch", "attempt", "t_start")
# What a tool reads from the reply of its expert.
READ = {"search": "query", "enhance_reasoning": "program", "answer": "answer"}
_LITTLE_CHARS = 40  # what a reply has beside the part that was read from it: tags, a fence
_TIMES = ("queue_s", "prefill_s", "decode_s")
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd", "local_hits", "web_hits")
_ENDS = ("exit_status", "outcome", "is_correct", "verdict_method", "confidence", "search_backend", "detail")
_NAMES = ("kind", "role", "tool", "alias", "model", "endpoint", "status", "error_kind", "error")
_COLUMNS = [
    *("task_id", "rollout_key", "category", "answer_type", "worker", "trial", "epoch", "attempt", "turn"),
    *("call_seq", "t_start", "duration_s", "retries", "is_replayed", "payload_hash"),
    *(*_NAMES, *_TIMES, *_COUNTS, *_ENDS),
]


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that a call gave: `name` says what of it (reply, program, stdout, hit 1, ...)."""

    name: str
    text: str


class FoundText(NamedTuple):
    """A document that a retrieval found; its text is the payload `text_hash`."""

    source: str
    document_id: int
    score: float
    text_hash: str

    @property
    def label(self) -> str:
        return f"{self.source}, document {self.document_id}, {self.score:.3f}"


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the log about a turn; `at_s` counts from the start of the attempt.

    `facts` are the columns that this kind of row has, by name. `is_replayed`: it stood in the record of an
    earlier attempt, and nothing was asked again.
    """

    kind: str
    role: str
    tool: str
    alias: str
    model: str
    endpoint: str
    status: str
    error_kind: str
    error: str
    at_s: float
    duration_s: float
    retries: int
    is_replayed: bool
    facts: Mapping[str, Any]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """What was done in one turn, in the order of time; `number` is -1 before and after the rollout."""

    number: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one trial; `t_start` is Unix seconds."""

    trial: int
    epoch: int
    attempt: int
    worker: str
    t_start: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that the log has of a task; the oldest attempt of the first trial first."""

    task_id: str
    rollout_key: str
    category: str
    answer_type: str
    attempts: tuple[Attempt, ...]


def story_of(run_dir: Path, asked: str, trial: int | None = None) -> Story:
    """The story of the task whose id is `asked`, or begins with it, as its rollout key may.

    Raises UserError where no task, or more than one, is meant, RunDirError where there is no run.
    """
    rows = _rows(run_dir, "task_id", asked) or _rows(run_dir, *_meant(run_dir, asked))
    if trial is not None:
        tried = sorted({row["trial"] for row in rows})
        rows = [row for row in rows if row["trial"] == trial]
        if not rows:
            raise UserError(f"task {plain(asked)!r} has no trial {trial}; expected one of {tried}")
    bodies = _bodies(run_dir, rows)
    rows.sort(key=lambda row: tuple(row[name] for name in ORDER))
    first = rows[0]
    attempts = groupby(rows, key=lambda row: (row["trial"], row["epoch"], row["attempt"]))
    return Story(
        **{name: first[name] or "" for name in ("task_id", "rollout_key", "category", "answer_type")},
        attempts=tuple(_attempt(list(group), bodies) for _, group in attempts),
    )


def _rows(run_dir: Path, column: str, value: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        events.read(run_dir, _COLUMNS, where={column: {value}}).read_all().to_pylist()
    )
    return found


def _meant(run_dir: Path, asked: str) -> tuple[str, str]:
    """The column and the whole value of which `asked` is the beginning."""
    names = {"task_id": set[str](), "rollout_key": set[str]()}
    for batch in events.read(run_dir, list(names)):
        for name, values in names.items():
            values.update(pc.unique(batch[name]).to_pylist())
    for name, values in names.items():
        found = sorted(value for value in values if value and asked and value.startswith(asked))
        if len(found) == 1:
            return name, found[0]
        if found:
            shown = ", ".join(plain(value, 40) for value in found[:SHOWN_CANDIDATES])
            more = f" and {len(found) - SHOWN_CANDIDATES} more" if len(found) > SHOWN_CANDIDATES else ""
            raise UserError(f"task {plain(asked)!r} could be {shown}{more}; expected one id or more of it")
    raise UserError(
        f"no task {plain(asked)!r} in {run_dir}; expected an id of this run or its beginning "
        f"(its log has {len(names['task_id'] - {''})} tasks)"
    )


def _bodies(run_dir: Path, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Payloads of the rows, and the texts of documents that they name."""
    rows = [row for row in rows if row["payload_hash"]]
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in rows})
    named = set[str]()
    for row in rows:
        if row["kind"] == "retrieval" and row["payload_hash"] in bodies:
            named |= journal.named_texts(bodies[row["payload_hash"]])
    return bodies | events.read_payloads(run_dir, named) if named else bodies


def _attempt(rows: Sequence[Mapping[str, Any]], bodies: Mapping[str, str]) -> Attempt:
    first = rows[0]
    start = first["t_start"].timestamp()
    # The result is the end of the story, though it stands in no turn of it.
    turns = groupby(rows, key=lambda row: -1 if row["kind"] == "result" else row["turn"])
    return Attempt(
        trial=first["trial"],
        epoch=first["epoch"],
        attempt=first["attempt"],
        worker=first["worker"] or "",
        t_start=start,
        turns=tuple(
            Turn(number, tuple(_step(row, start, bodies) for row in group)) for number, group in turns
        ),
    )


def _step(row: Mapping[str, Any], start: float, bodies: Mapping[str, str]) -> Step:
    facts = {name: row[name] for name in (*_TIMES, *_COUNTS, *_ENDS) if row[name] not in (None, "")}
    return Step(
        **{name: row[name] or "" for name in _NAMES},
        at_s=max(0.0, row["t_start"].timestamp() - start),
        duration_s=row["duration_s"],
        retries=row["retries"] or 0,
        is_replayed=bool(row["is_replayed"]),
        facts=facts,
        pieces=tuple(_pieces(row, bodies)),
    )


def _pieces(row: Mapping[str, Any], bodies: Mapping[str, str]) -> list[Piece]:
    body = bodies.get(row["payload_hash"] or "")
    if body is None:
        return []
    if row["kind"] != "retrieval":
        return pieces_of(row["kind"], row["role"], row["tool"], body)
    hits = hits_of(body)
    if hits is None:
        return [Piece("payload", body)]
    return [
        Piece(f"hit {place} ({hit.label})", bodies.get(hit.text_hash, NO_TEXT))
        for place, hit in enumerate(hits, 1)
    ]


def pieces_of(kind: str, role: str, tool: str, body: str) -> list[Piece]:
    """What a payload says, by the row that it belongs to; the payload as it is where it cannot be read."""
    try:
        if kind == "model_call":
            return _of_reply(json.loads(body), role, tool)
        return _OF_KIND[kind](json.loads(body))
    except (ValueError, KeyError, TypeError, AttributeError):
        return [Piece("payload", body)]


def told_once(pieces: Sequence[Piece]) -> list[Piece]:
    """Without a reply that is hardly more than the part that was read from it."""
    read = max((len(piece.text) for piece in pieces if piece.name in READ.values()), default=-_LITTLE_CHARS)
    return [piece for piece in pieces if piece.name != "reply" or len(piece.text) - read > _LITTLE_CHARS]


def hits_of(body: str) -> list[FoundText] | None:
    """The documents that the payload of a retrieval names; None where it cannot be read."""
    try:
        value = json.loads(body)
        hits = value["hits"] if isinstance(value, dict) else value
        return [
            FoundText(str(hit["source"]), hit["document_id"], float(hit["score"]), str(hit["text"]))
            for hit in hits
        ]
    except (ValueError, KeyError, TypeError):
        return None


def _nothing(text: str) -> str:
    return ""


_READERS: dict[str, Callable[[str], str | None]] = {
    "search": lambda text: extract.tagged(text, "query"),
    "enhance_reasoning": extract.program,
    "answer": extract.answer,
}


def _of_reply(value: Any, role: str, tool: str) -> list[Piece]:
    content = str(value["content"])
    pieces = [Piece("reply", content)] if content.strip() else []
    pieces += [Piece("chose", f"{call['name']} {call['arguments']}") for call in value.get("tool_calls", ())]
    if role == "expert" and (text := _READERS.get(tool, _nothing)(content)):
        pieces.append(Piece(READ[tool], text))
    return pieces


def _of_run(value: Any) -> list[Piece]:
    ending = [Piece("stopped", "at its time limit")] if value["is_timed_out"] else []
    return ending + [Piece(name, value[name]) for name in ("stdout", "stderr") if value[name].strip()]


def _of_result(value: Any) -> list[Piece]:
    verdict = value.get("verdict") or {}
    if verdict.get("method") == "reward":
        return _of_reward(json.loads(verdict["reasoning"]))
    words = [("prediction", value.get("prediction", ""))]
    words += [(name, verdict.get(name, "")) for name in ("extracted", "reasoning")]
    return [Piece(name, str(text)) for name, text in words if text]


def _of_reward(value: Any) -> list[Piece]:
    """Why a dialogue ended, and of what parts its reward is the product."""
    parts = ", ".join(f"{name} {part:g}" for name, part in (value.get("parts") or {}).items())
    words = [("ended", value.get("reason")), ("reward of", parts), ("note", value.get("note"))]
    return [Piece(name, str(text)) for name, text in words if text]


def _of_tool(value: Any) -> list[Piece]:
    return [Piece("error" if value["is_error"] else "result", str(value["text"]))]


def _of_simulation(value: Any) -> list[Piece]:
    """What the dialogue came to; its messages are told above."""
    found = value.get("reward_info") or {}
    pieces = [Piece("ended", str(value["termination_reason"]))]
    if found.get("reward") is not None:
        parts = [f"{name} {part:g}" for name, part in (found.get("reward_breakdown") or {}).items()]
        of = f", the product of {', '.join(parts)}" if parts else ""
        pieces.append(Piece("reward", f"{found['reward']:g}{of}"))
    return pieces + [
        Piece(name.removesuffix("s").replace("_", " "), _check(check))
        for name, checks in found.items()
        for check in (checks if isinstance(checks, list) else [checks])
        if isinstance(check, dict) and name.removesuffix("s").endswith(("check", "assertion"))
    ]


def _check(value: Mapping[str, Any]) -> str:
    """Of a check of tau2's: whether it holds, and what it says."""
    holds = next((value[name] for name in ("met", "action_match", "db_match") if name in value), None)
    said = {name: told for name, told in value.items() if told not in (None, holds)}
    words = {True: "met", False: "missed", None: ""}[holds]
    return f"{words} {json.dumps(said, ensure_ascii=False)}".strip()


_OF_KIND: dict[str, Callable[[Any], list[Piece]]] = {
    "code": _of_run,
    "result": _of_result,
    "tool_call": _of_tool,
    "simulation": _of_simulation,
}
