"""What a log tells somebody who watches its run: tasks at work, errors by kind, dollars, rates, limits.

Quick enough to be asked again every few seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.log import RunLog

RECENT_S = 300.0
CALLS = ("model_call", "retrieval", "code")
COLUMNS = (
    *("task_id", "trial", "attempt", "t_start", "duration_s", "cost_usd"),
    *("error_kind", "error", "worker", "model", "endpoint", "detail"),
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
class LimitChange:
    """The newest change of how many calls a route may have open: from, to, why, when (Unix seconds).

    `old` is None where the limit was set first. `n` counts the changes of the newest segment.
    """

    old: int | None
    new: int
    reason: str
    at: float
    n: int


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
    """The answer of `look`; errors by kind, the newest first; changes of limits by model and endpoint."""

    open_tasks: list[OpenTask]
    errors: list[LastError]
    spending: Spending
    changes: Mapping[tuple[str, str], LimitChange]


def look(log: RunLog, now: float, recent_s: float = RECENT_S) -> Seen:
    """What `log`, opened with `COLUMNS`, says at this moment."""
    spending = _spending(log, now, recent_s)
    return Seen(_open_tasks(log), _last_errors(log), spending, _changes(log))


def _open_tasks(log: RunLog) -> list[OpenTask]:
    if not len(log.epochs):
        return []
    newest = log.live & (log.ints("epoch") == log.epochs[-1])
    ended = set(_keys(log, np.flatnonzero(newest & log.kind("result"))))
    begun = np.flatnonzero(newest & log.kind("attempt"))
    attempts, starts = log.ints("attempt")[begun].tolist(), log.ints("t_start")[begun].tolist()
    found: dict[tuple[str, int], OpenTask] = {}
    for key, attempt, start in zip(_keys(log, begun), attempts, starts, strict=True):
        if key not in ended:
            known = found.get(key, OpenTask(*key, attempt, start / 1e6))
            found[key] = OpenTask(*key, max(attempt, known.attempt), min(start / 1e6, known.since))
    return list(found.values())


def _keys(log: RunLog, rows: NDArray[np.int64]) -> list[tuple[str, int]]:
    tasks, trials = log.words("task_id"), log.ints("trial")[rows].tolist()
    return [
        (tasks.names[code], trial) for code, trial in zip(tasks.codes[rows].tolist(), trials, strict=True)
    ]


def _last_errors(log: RunLog) -> list[LastError]:
    rows = np.flatnonzero(log.live & log.words("status").is_in("error"))
    kinds, starts = log.words("error_kind"), log.ints("t_start")
    found = []
    for code in np.unique(kinds.codes[rows]).tolist():
        own = rows[kinds.codes[rows] == code]
        newest = own[starts[own].argmax()]
        words = (log.words(name) for name in ("kind", "task_id", "worker", "error"))
        texts = [column.names[column.codes[newest]] for column in words]
        found.append(LastError(kinds.names[code] or "unknown", len(own), float(starts[newest]) / 1e6, *texts))
    return sorted(found, key=lambda error: -error.at)


def _spending(log: RunLog, now: float, recent_s: float) -> Spending:
    calls = log.live & log.kind(*CALLS)
    failed = calls & log.words("status").is_in("error")
    starts = log.ints("t_start") / 1e6
    recent = calls & (starts + np.nan_to_num(log.numbers("duration_s")) > now - recent_s)
    cost = np.nan_to_num(log.numbers("cost_usd"))
    return Spending(
        cost_usd=float(cost[calls].sum()),
        errors=int(failed.sum()),
        over_s=recent_s,
        recent_cost_usd=float(cost[recent].sum()),
        recent_calls=int(recent.sum()),
        recent_errors=int((failed & recent).sum()),
        recent_results=int((log.live & log.kind("result") & (starts > now - recent_s)).sum()),
    )


def _changes(log: RunLog) -> dict[tuple[str, str], LimitChange]:
    if not len(log.epochs):
        return {}
    rows = np.flatnonzero(log.kind("limit") & (log.ints("epoch") == log.epochs[-1]))
    models, endpoints, details = (log.words(name) for name in ("model", "endpoint", "detail"))
    found: dict[tuple[str, str], LimitChange] = {}
    for row in rows[np.argsort(log.ints("t_start")[rows], kind="stable")].tolist():
        route = models.names[models.codes[row]], endpoints.names[endpoints.codes[row]]
        before = found[route].n if route in found else 0
        told = json.loads(details.names[details.codes[row]])
        at = float(log.ints("t_start")[row]) / 1e6
        found[route] = LimitChange(told["old"], told["new"], told["reason"], at, before + 1)
    return found
