"""The plan of a run: what the log already counts, what is left, and the calls that were completed.

Pure but for `recorded_calls`, which reads the event log. Names no benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_app import events
from ray_app.journal import RecordedCall
from ray_app.records import Outcome, Task

CALL_KINDS = ("model_call", "retrieval", "code")
# Failures that say nothing of the model: mended by time, or by the user.
RUN_AGAIN = ("infrastructure", "user")
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One attempt at one trial of a task, with the calls that earlier attempts completed."""

    task: Task
    trial: int
    attempt: int = 1
    recorded: tuple[RecordedCall, ...] = ()

    @property
    def key(self) -> Key:
        return (self.task.rollout_key, self.trial)


@dataclass
class Tally:
    """The accounting identity, kept as results are committed."""

    planned: int
    counts: dict[Outcome, int] = field(
        default_factory=lambda: {"ok": 0, "failed": 0, "limited": 0, "owed": 0}
    )

    @property
    def pending(self) -> int:
        return self.planned - sum(self.counts.values())

    def line(self) -> str:
        parts = " + ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{self.planned} planned = {parts} + {self.pending} pending"


@dataclass(frozen=True)
class Plan:
    """What is left to do, and what the log already counts."""

    items: tuple[WorkItem, ...]
    kept: Tally

    @property
    def skipped(self) -> int:
        return self.kept.planned - len(self.items)


def plan(
    tasks: Sequence[Task], trials: int, results: Iterable[Mapping[str, Any]], *, retry_failed: bool = False
) -> Plan:
    """The work that the counted `results` leave: infrastructure failures and owed verdicts run again.

    A result judged against another reference answer is judged again; its rollout is not repeated.
    """
    counted = {(row["rollout_key"], row["trial"]): row for row in results}
    kept = Tally(len(tasks) * trials)
    items = []
    for trial in range(trials):
        for task in tasks:
            row = counted.get((task.rollout_key, trial))
            if row is not None and _is_final(row, task, retry_failed):
                kept.counts[row["outcome"]] += 1
            else:
                items.append(WorkItem(task, trial, attempt=1 + (row["attempt"] if row else 0)))
    return Plan(tuple(items), kept)


def _is_final(row: Mapping[str, Any], task: Task, retry_failed: bool) -> bool:
    if row["outcome"] == "failed":
        return bool(row["error_kind"] not in RUN_AGAIN and not retry_failed)
    is_judged = row["outcome"] == "ok" and row["judge_key"] == task.judge_key
    return bool(is_judged or row["outcome"] == "limited")


def recorded_calls(run_dir: Path, keys: Collection[Key]) -> dict[Key, tuple[RecordedCall, ...]]:
    """The completed calls of the given (rollout key, trial) pairs, newest record of each call last."""
    wanted, rows = set(keys), []
    columns = ["kind", "status", "rollout_key", "trial", "call_seq", "request_hash", "payload_hash", "epoch"]
    for batch in events.read(run_dir, columns):
        rows += [
            row
            for row in batch.to_pylist()
            if row["kind"] in CALL_KINDS
            and row["status"] == "ok"
            and (row["rollout_key"], row["trial"]) in wanted
        ]
    rows.sort(key=lambda row: (row["call_seq"], row["epoch"]))
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in rows})
    texts = events.read_payloads(
        run_dir, {item["text"] for row in rows if row["kind"] == "retrieval" for item in _hits(row, bodies)}
    )
    found: dict[Key, list[RecordedCall]] = {}
    for row in rows:
        body = bodies.get(row["payload_hash"])
        if body is None:
            continue  # its payload was lost with its process: the call is made again
        named = {item["text"] for item in _hits(row, bodies)} if row["kind"] == "retrieval" else set()
        if not named <= texts.keys():
            continue
        call = RecordedCall(row["call_seq"], row["request_hash"], body, {name: texts[name] for name in named})
        found.setdefault((row["rollout_key"], row["trial"]), []).append(call)
    return {key: tuple(calls) for key, calls in found.items()}


def _hits(row: Mapping[str, Any], bodies: Mapping[str, str]) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = json.loads(bodies.get(row["payload_hash"], "[]"))
    return hits


def with_recorded_calls(work: Plan, run_dir: Path) -> Plan:
    """`work` with the calls that earlier attempts of its items completed."""
    if not (run_dir / "log").exists():
        return work
    recorded = recorded_calls(run_dir, {item.key for item in work.items})
    items = tuple(replace(item, recorded=recorded.get(item.key, ())) for item in work.items)
    return replace(work, items=items)
