"""The plan of a run: what the log already counts, and what is left. Pure; names no benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_app.journal import NOTHING, Record
from ray_app.records import Outcome, Task

# Failures that say nothing of the model: mended by time, or by the user.
RUN_AGAIN = ("infrastructure", "user")
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One attempt at one trial of a task, with what the log has of earlier attempts."""

    task: Task
    trial: int
    attempt: int = 1
    record: Record = NOTHING

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
    """What is left to do, and what the log already counts.

    `later` is what is left for another command.
    """

    items: tuple[WorkItem, ...]
    kept: Tally
    later: tuple[WorkItem, ...] = ()

    @property
    def left(self) -> tuple[WorkItem, ...]:
        """All that is not counted yet."""
        return self.items + self.later

    @property
    def skipped(self) -> int:
        return self.kept.planned - len(self.left)


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
