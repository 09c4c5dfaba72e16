"""A replay beside the run that it replays: the same decisions, or where a task first takes another one.

Two runs of a task are equal when they made the same calls in the same order (turn, tool, alias, digest of
the request), each with the same output to the byte, and came to the same prediction, verdict and outcome.
Times, costs, workers and the words of an infrastructure failure are no decisions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ray_app.planning import Key
from ray_app.recording import Row, calls, counted, label

SHOWN = 20
NOTHING = "nothing: it had ended"


@dataclass(frozen=True, slots=True)
class Decision:
    """One call that a task made, and what came back: the hash of its output, and whether it failed."""

    turn: int
    call_seq: int
    label: str
    request: str
    output: str
    status: str

    def beside(self, other: Decision | None) -> str:
        """This decision in words that tell it from `other`."""
        if other is None or self.label != other.label:
            return self.label
        if self.request != other.request:
            return f"{self.label}, request {self.request[:8]}"
        if self.status != other.status:
            return f"{self.label}, {self.status}"
        if self.output != other.output:
            return f"{self.label}, output {self.output[:8]}"
        return f"{self.label}, turn {self.turn}"


@dataclass(frozen=True, slots=True)
class Trace:
    """What a task did and came to. `answer` is the hash of its prediction and verdict."""

    task_id: str
    decisions: tuple[Decision, ...]
    outcome: str
    error_kind: str
    answer: str


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference of a task. `turn` and `call` are -1 where only the result differs."""

    task_id: str
    trial: int
    turn: int
    call: int
    recorded: str
    now: str


@dataclass(frozen=True)
class Comparison:
    """`replayed` tasks, and those of them that diverged. `missing` have no result in the record, or here;
    `lost` are those of them that have one there."""

    replayed: int
    diverged: tuple[Divergence, ...]
    missing: int
    differences: tuple[str, ...]
    lost: int = 0

    @property
    def equal(self) -> int:
        return self.replayed - len(self.diverged)

    @property
    def exit_code(self) -> int:
        return 1 if self.diverged or self.lost or not self.replayed else 0

    def line(self) -> str:
        lost = f"; {self.lost} recorded have no result here" if self.lost else ""
        never = self.missing - self.lost
        missing = f"; {never} of the plan have nothing to compare" if never else ""
        return f"{self.replayed} tasks, {self.equal} equal, {len(self.diverged)} diverged{lost}{missing}"

    def figures(self) -> dict[str, Any]:
        """For scripts: plain JSON data."""
        names = ("task_id", "trial", "turn", "call", "recorded", "now")
        return {
            "replayed": self.replayed,
            "equal": self.equal,
            "diverged": [{name: getattr(one, name) for name in names} for one in self.diverged],
            "missing": self.missing,
            "lost": self.lost,
            "differences": list(self.differences),
            "exit_code": self.exit_code,
        }


def compare(
    old: Mapping[Key, Trace], new: Mapping[Key, Trace], planned: int, differences: tuple[str, ...] = ()
) -> Comparison:
    """`new`, task by task, beside `old`."""
    both = sorted(old.keys() & new.keys(), key=lambda key: (new[key].task_id, key))
    found = (first_difference(old[key], new[key], key[1]) for key in both)
    diverged = tuple(one for one in found if one)
    lost = len(old.keys() - new.keys())
    return Comparison(len(both), diverged, planned - len(both), differences, lost)


def first_difference(old: Trace, new: Trace, trial: int = 0) -> Divergence | None:
    """Where the two part, or None where they are equal."""
    for there, here in zip_longest(old.decisions, new.decisions):
        if there == here:
            continue
        place = here or there
        recorded = there.beside(here) if there else NOTHING
        now = here.beside(there) if here else NOTHING
        if there and here and there.label == here.label:
            now = now.replace(here.label, "the same", 1)
        return Divergence(new.task_id, trial, place.turn, place.call_seq, recorded, now)
    for one, other in ((old.outcome, new.outcome), (old.error_kind, new.error_kind)):
        if one != other:
            return Divergence(new.task_id, trial, -1, -1, one or "no error", other or "no error")
    if old.answer != new.answer:
        return Divergence(new.task_id, trial, -1, -1, f"answer {old.answer[:8]}", f"answer {new.answer[:8]}")
    return None


def traces(run_dir: Path, keys: Mapping[Key, Any] | None = None) -> dict[Key, Trace]:
    """What each task of a run did on the way to its counted result; of `keys` only, where given."""
    results = {key: row for key, row in counted(run_dir).items() if keys is None or key in keys}
    found = calls(run_dir, results) if results else {}
    return {key: _trace(results[key], rows) for key, rows in found.items()}


def _trace(result: Row, rows: list[Row]) -> Trace:
    """Of the calls of all attempts, those on the way to `result`.

    The attempt that counts has rows of what it asked itself; what it was served stands in earlier ones.
    """
    rows = sorted(rows, key=lambda row: (row["epoch"], row["attempt"]))
    last = (result["epoch"], result["attempt"])
    own = [row for row in rows if (row["epoch"], row["attempt"]) == last]
    path: dict[int, Row] = {}
    for row in rows:
        if row["status"] == "ok" and (row["epoch"], row["attempt"]) <= last:
            path[row["call_seq"]] = row
    asked = sum(row["status"] == "ok" and not row["is_replayed"] for row in own)
    made = json.loads(result["detail"] or "{}").get("replayed_calls", 0) + asked
    taken = [row for seq, row in path.items() if seq < made] + [row for row in own if row["status"] != "ok"]
    taken.sort(key=lambda row: (row["call_seq"], row["status"] == "ok", row["t_start"]))
    return Trace(
        result["task_id"],
        tuple(map(_decision, taken)),
        result["outcome"],
        result["error_kind"] or "",
        result["payload_hash"],
    )


def _decision(row: Row) -> Decision:
    status = row["status"] if row["status"] == "ok" else f"failed ({row['error_kind']})"
    return Decision(
        row["turn"], row["call_seq"], label(row), row["request_hash"], row["payload_hash"] or "", status
    )


def page(found: Comparison, recorded: Path) -> RenderableType:
    """What differs, for people: the first tasks that diverged, with the decision recorded and the one now."""
    parts: list[RenderableType] = []
    if found.differences:
        parts.append(Text(f"Not as in {recorded.name}: {', '.join(found.differences)}"))
    if found.diverged:
        table = Table(box=box.HORIZONTALS, title="First other decision", title_justify="left")
        for name in ("task", "turn", "call", "recorded", "now"):
            table.add_column(name, overflow="fold")
        for one in found.diverged[:SHOWN]:
            place = ("result", "") if one.call < 0 else (str(one.turn), str(one.call))
            name = f"{one.task_id}#{one.trial}" if one.trial else one.task_id
            table.add_row(*map(Text, (name, *place, one.recorded, one.now)))
        parts.append(table)
    if len(found.diverged) > SHOWN:
        parts.append(Text(f"and {len(found.diverged) - SHOWN} more; --json has all"))
    return Group(*parts, Text(f"Replay of {recorded.name}: {found.line()}"))
