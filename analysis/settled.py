"""What one run says of each task: its settled trials, averaged.

A result says something of the models where it is right, wrong, limited, or failed by the model's own fault:
these are settled. What failed for another reason, is owed or pending says nothing yet.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_app import events, object_store

_COLUMNS = (
    *("task_id", "trial", "rollout_key", "judge_key", "category", "outcome", "error_kind", "is_correct"),
    *("cost_usd", "duration_s", "prompt_tokens", "completion_tokens", "turn", "detail"),
    *("kind", "epoch", "t_start", "event_id"),
)


@dataclass(frozen=True, slots=True)
class Side:
    """One task in one run: its settled trials. `seconds` None where a resume cut its time short.

    `outcomes` says of each of them (by number) whether it is right.
    """

    rollout_key: str
    judge_key: str
    category: str
    right: int
    trials: int
    cost_usd: float
    seconds: float | None
    tokens: float
    turns: float
    outcomes: tuple[tuple[int, bool], ...] = ()

    @property
    def share(self) -> Fraction:
        return Fraction(self.right, self.trials)


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of one run by id: those with settled trials, those without; what the run says of itself."""

    run_dir: str
    settled: Mapping[str, Side]
    unsettled: frozenset[str]
    facts: Mapping[str, Any]

    @property
    def ids(self) -> frozenset[str]:
        return self.unsettled.union(self.settled)


def read_tasks(run_dir: Path, categories: Collection[str] = (), trials: Collection[int] = ()) -> Tasks:
    """The counted results of a run; an empty selection takes all. Raises RunDirError, StorageError."""
    table = events.columns(run_dir, _COLUMNS)
    results = table.filter(pc.equal(table["kind"], "result"))
    counted = results.take(pa.array(events.last_committed(results), pa.int64())).to_pylist()
    starts = table.filter(pc.equal(table["kind"], "run_start")).select(["epoch", "t_start", "detail"])
    newest: Mapping[str, Any] = max(
        starts.to_pylist(), key=lambda row: (row["epoch"], row["t_start"]), default={}
    )
    kept = [
        row
        for row in counted
        if (not categories or row["category"] in categories) and (not trials or row["trial"] in trials)
    ]
    return tasks_of(kept, _facts(newest.get("detail", "")), object_store.place(run_dir))


def _facts(detail: str) -> dict[str, Any]:
    try:
        facts = json.loads(detail)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def tasks_of(results: Iterable[Mapping[str, Any]], facts: Mapping[str, Any], run_dir: str = "") -> Tasks:
    """Counted results by task; `results` have the columns of the log."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        rows.setdefault(row["task_id"], []).append(row)
    settled = {task_id: side for task_id, trials in rows.items() if (side := _side(trials)) is not None}
    return Tasks(run_dir, settled, frozenset(rows.keys() - settled.keys()), facts)


def _side(rows: Sequence[Mapping[str, Any]]) -> Side | None:
    settled = [row for row in rows if is_settled(row)]
    if not settled:
        return None
    n = len(settled)
    outcomes = tuple((row["trial"], row["outcome"] == "ok" and row["is_correct"] is True) for row in settled)
    whole = [row["duration_s"] for row in settled if not _replayed(row["detail"] or "")]
    return Side(
        rollout_key=settled[0]["rollout_key"],
        judge_key=settled[0]["judge_key"],
        category=settled[0]["category"] or "",
        right=sum(is_right for _, is_right in outcomes),
        trials=n,
        cost_usd=sum(row["cost_usd"] or 0.0 for row in settled) / n,
        seconds=sum(whole) / len(whole) if whole else None,
        tokens=sum((row["prompt_tokens"] or 0) + (row["completion_tokens"] or 0) for row in settled) / n,
        turns=sum(row["turn"] or 0 for row in settled) / n,
        outcomes=outcomes,
    )


def is_settled(row: Mapping[str, Any]) -> bool:
    """Whether a result says something of the models."""
    return row["outcome"] in ("ok", "limited") or (
        row["outcome"] == "failed" and row["error_kind"] == "model"
    )


def _replayed(detail: str) -> int:
    """How many calls of a result were served from the record: its time is that of the rest alone."""
    try:
        return int(json.loads(detail)["replayed_calls"]) if detail else 0
    except (ValueError, KeyError, TypeError):
        return 0
