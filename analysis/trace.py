"""One task, read turn by turn: every event of it in the order of time, with what each call gave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from analysis.text import number, plain
from ray_app import events
from ray_app.errors import UserError

_SHOWN_CHARS = 2000
_COLUMNS = [
    *("task_id", "trial", "epoch", "attempt", "turn", "kind", "role", "tool", "model"),
    *("t_start", "duration_s"),
    *("status", "error", "prompt_tokens", "completion_tokens", "cost_usd", "local_hits", "web_hits"),
    *("exit_status", "outcome", "is_correct", "verdict_method", "is_replayed", "payload_hash"),
]
_DETAILS = (
    *("prompt_tokens", "completion_tokens", "cost_usd", "local_hits", "web_hits", "exit_status", "outcome"),
    *("is_correct", "verdict_method", "error"),
)


def trace(run_dir: Path, task_id: str) -> Iterator[Text]:
    """Lines about the task, oldest event first. Raises UserError where the log has no such task."""
    every = (row for batch in events.read(run_dir, _COLUMNS) for row in batch.to_pylist())
    rows = [row for row in every if row["task_id"] == task_id]
    if not rows:
        raise UserError(f"no event of task {plain(task_id)!r} in {run_dir}; expected a task id of this run")
    rows.sort(key=lambda row: (row["trial"], row["epoch"], row["attempt"], row["t_start"]))
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in rows if row["payload_hash"]})
    place: tuple[Any, ...] = ()
    for row in rows:
        if place != (place := (row["trial"], row["epoch"], row["attempt"], row["turn"])):
            yield Text("trial {}, epoch {}, attempt {}, turn {}".format(*place), style="bold")
        yield Text(f"  {_line(row)}", style="red" if row["status"] != "ok" else "")
        if body := bodies.get(row["payload_hash"]):
            yield Text(_output(body), style="dim")


def _line(row: Mapping[str, Any]) -> str:
    label = " ".join(plain(row[name]) for name in ("kind", "role", "tool", "model") if row[name])
    details = [f"{name}={_value(row[name])}" for name in _DETAILS if row[name] not in (None, "")]
    replayed = ["replayed"] if row["is_replayed"] else []
    return "  ".join([label, f"{number(row['duration_s'])} s", row["status"], *details, *replayed])


def _value(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value) if is_number else plain(value, 300)


def _output(body: str) -> str:
    """What the call gave, indented, line by line printable, cut after a few thousand characters."""
    try:
        text = json.dumps(json.loads(body), indent=1, ensure_ascii=False)
    except ValueError:
        text = body
    cut = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]} ... ({len(text):,} characters)"
    return "\n".join(f"    {plain(line, _SHOWN_CHARS)}" for line in cut.splitlines())
