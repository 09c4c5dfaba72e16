"""The simulations of a run that count: of each counted result the newest one that the log has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ray_app import events

Key = tuple[str, int]  # rollout key and trial
_COLUMNS = ["rollout_key", "trial", "epoch", "attempt", "category", "task_id", "payload_hash", "event_id"]


class Counted(NamedTuple):
    """One simulation; `run` is tau2's SimulationRun as JSON data."""

    domain: str
    task_id: str
    trial: int
    run: dict[str, Any]


def counted_simulations(run_dir: Path) -> dict[Key, Counted]:
    """By rollout key and trial; a result without a simulation (its attempt failed) has none."""
    if not (run_dir / "log").exists():
        return {}
    counted = {(row["rollout_key"], row["trial"]) for row in events.results(run_dir).to_pylist()}
    latest: dict[Key, Mapping[str, Any]] = {}
    for row in _rows(run_dir):
        key = row["rollout_key"], row["trial"]
        if key in counted and (key not in latest or _age(latest[key]) < _age(row)):
            latest[key] = row
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in latest.values()})
    return {
        key: Counted(row["category"], row["task_id"], row["trial"], json.loads(bodies[row["payload_hash"]]))
        for key, row in latest.items()
        if row["payload_hash"] in bodies
    }


def _rows(run_dir: Path) -> Iterator[Mapping[str, Any]]:
    for batch in events.read(run_dir, _COLUMNS, where={"kind": {"simulation"}}):
        yield from batch.to_pylist()


def _age(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["epoch"], row["attempt"]
