"""What a log tells somebody who watches its run: tasks at work, errors by kind, what is spent, how fast.

One pass over a few columns, quick enough to be asked again every few seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_app import events

RECENT_S = 300.0
CALLS = ("model_call", "retrieval", "code")
_COLUMNS = (
    *("kind", "role", "alias", "epoch", "task_id", "trial", "attempt", "t_start", "duration_s", "status"),
    *("error_kind", "error", "worker", "is_replayed", "cost_usd"),
)


@dataclass(frozen=True, slots=True)
class OpenTask:
    """A task of the newest segment without a result; `since` is Unix seconds."""

    task_id: str
    trial: int
    attempt: int
    since: float


@dataclass(frozen=True, slots=True)
class LastError:
    """How often a kind of failure stands in the log, and its newest case; `at` is Unix seconds."""

    error_kind: str
    n: int
    at: float
    kind: str
    task_id: str
    worker: str
    message: str


@dataclass(frozen=True, slots=True)
class Spending:
    """Dollars and calls of the run, and of the last `over_s` seconds; calls are those that go out."""

    cost_usd: float
    errors: int
    over_s: float
    recent_cost_usd: float
    recent_calls: int
    recent_errors: int
    recent_results: int


@dataclass(frozen=True, slots=True)
class Seen:
    """The answer of `look`; errors by kind, the newest first."""

    open_tasks: list[OpenTask]
    errors: list[LastError]
    spending: Spending


def look(run_dir: Path, now: float, recent_s: float = RECENT_S) -> Seen:
    """The log at this moment. Raises RunDirError, StorageError."""
    table = events.columns(run_dir, _COLUMNS)
    is_opinion = pc.and_(pc.equal(table["role"], "judge"), pc.not_equal(table["alias"], ""))
    table = table.filter(pc.invert(pc.or_(pc.fill_null(table["is_replayed"], False), is_opinion)))
    return Seen(_open_tasks(table), _last_errors(table), _spending(table, now, recent_s))


def _open_tasks(table: pa.Table) -> list[OpenTask]:
    if not len(table):
        return []
    newest = table.filter(pc.equal(table["epoch"], pc.max(table["epoch"])))
    ended = {_key(row) for row in _picked(newest, "result")}
    found: dict[tuple[str, int], OpenTask] = {}
    for row in _picked(newest, "attempt"):
        if (key := _key(row)) not in ended:
            known = found.get(key)
            since, attempt = row["t_start"].timestamp(), row["attempt"]
            if known is not None:
                since, attempt = min(since, known.since), max(attempt, known.attempt)
            found[key] = OpenTask(*key, attempt, since)
    return list(found.values())


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["task_id"], row["trial"]


def _picked(table: pa.Table, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        table.filter(pc.equal(table["kind"], kind))
        .select(["task_id", "trial", "attempt", "t_start"])
        .to_pylist()
    )
    return rows


def _last_errors(table: pa.Table) -> list[LastError]:
    failed = table.filter(pc.equal(table["status"], "error")).sort_by("t_start")
    newest = {row["error_kind"] or "unknown": row for row in _one_of_each(failed)}
    counted = pc.value_counts(failed["error_kind"].cast(pa.string()).combine_chunks()).to_pylist()
    counts = {item["values"] or "unknown": item["counts"] for item in counted}
    found = [
        LastError(
            name,
            counts[name],
            row["t_start"].timestamp(),
            row["kind"],
            *(row[column] or "" for column in ("task_id", "worker", "error")),
        )
        for name, row in newest.items()
    ]
    return sorted(found, key=lambda error: -error.at)


def _one_of_each(failed: pa.Table) -> list[dict[str, Any]]:
    """The last row of each error kind."""
    kinds = failed["error_kind"].cast(pa.string())
    rows: list[dict[str, Any]] = []
    for kind in pc.unique(kinds).to_pylist():
        mask = pc.is_null(kinds) if kind is None else pc.equal(kinds, kind)
        own = failed.filter(mask)
        rows += own.slice(len(own) - 1).to_pylist()
    return rows


def _spending(table: pa.Table, now: float, recent_s: float) -> Spending:
    calls = table.filter(pc.is_in(table["kind"].cast(pa.string()), value_set=pa.array(CALLS)))
    ends = pc.add(pc.divide(calls["t_start"].cast(pa.int64()).cast(pa.float64()), 1e6), calls["duration_s"])
    recent = calls.filter(pc.greater(ends, now - recent_s))
    results = table.filter(pc.equal(table["kind"], "result"))
    late = pc.greater(results["t_start"].cast(pa.int64()), int(1e6 * (now - recent_s)))
    return Spending(
        cost_usd=_total(calls["cost_usd"]),
        errors=_errors(calls),
        over_s=recent_s,
        recent_cost_usd=_total(recent["cost_usd"]),
        recent_calls=len(recent),
        recent_errors=_errors(recent),
        recent_results=int(_total(late.cast(pa.int64()))),
    )


def _errors(calls: pa.Table) -> int:
    return int(_total(pc.equal(calls["status"], "error").cast(pa.int64())))


def _total(column: pa.ChunkedArray) -> float:
    return float(pc.sum(column).as_py() or 0.0)
