"""Small run directories with known content, written by the real event writer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_app.event_writer import EventWriter
from ray_app.journal import Codec
from ray_app.records import Event

START_S = 1_780_000_000.0
_BASE = Event(kind="turn", t_start=START_S, run_id="r", epoch=1, attempt=1)


def write_run(run_dir: Path, rows: Iterable[Event], writer_id: str = "w") -> Path:
    """A run directory that holds `rows`, in this order."""
    writer = EventWriter(run_dir, writer_id)
    for row in rows:
        writer.append(row)
    writer.close()
    return run_dir


def event(kind: Any, at_s: float = 0.0, task: str = "", **columns: Any) -> Event:
    """An event `at_s` seconds after the run's start."""
    keys = {"task_id": task, "rollout_key": f"rollout-{task}", "judge_key": f"judge-{task}"} if task else {}
    return replace(_BASE, kind=kind, t_start=START_S + at_s, **{**keys, **columns})


def run_start(planned: int, **facts: Any) -> Event:
    return event("run_start", detail=json.dumps({"planned": planned, "protocol": "own", **facts}))


def tool_call(tool: str, duration_s: float, **columns: Any) -> Event:
    return event("tool_call", task="a", tool=tool, duration_s=duration_s, **columns)


def model_call(role: str, duration_s: float = 1.0, **columns: Any) -> Event:
    return event("model_call", **{"task": "a", "role": role, "duration_s": duration_s, **columns})


def result(task: str, outcome: str, is_correct: bool | None = None, **columns: Any) -> Event:
    return event("result", task=task, outcome=outcome, is_correct=is_correct, **columns)


class Teller:
    """Writes the rows of one task as its journal would, outputs and all."""

    def __init__(self, log: EventWriter, task: str) -> None:
        self.log, self.task = log, task

    def call(self, codec: Codec[Any], output: Any, at_s: float, **columns: Any) -> None:
        body = self.log.payload(codec.encode(output, lambda text: self.log.payload(text, "text")))
        self.note(codec.kind, at_s, **{**codec.columns(output), "payload_hash": body, **columns})

    def note(self, kind: str, at_s: float, **columns: Any) -> None:
        self.log.append(event(kind, at_s, self.task, category="Math", answer_type="exactMatch", **columns))

    def result(self, at_s: float, prediction: str, outcome: str, is_correct: bool, **columns: Any) -> None:
        body = self.log.payload(json.dumps({"prediction": prediction, "verdict": {"reasoning": "it is"}}))
        told = {"outcome": outcome, "is_correct": is_correct, "payload_hash": body, **columns}
        self.note("result", at_s, **told)
