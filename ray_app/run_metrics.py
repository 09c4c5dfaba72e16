"""What a run tells Prometheus, through Ray's own metrics port: the figures of `analysis watch`, by run.

Published by the driver every two seconds while it drives: tasks by state, rate, time to the end, dollars,
failures by kind, the limit of calls in flight of each route, the dollars of the run's budget, and the calls
in flight by stage as the processes of the run last told (`pulse.py`). On an object store the latter are as
old as the driver's mirror of it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from ray.util.metrics import Gauge

from ray_app import pulse
from ray_app.errors import ErrorKind

EVERY_S = 2.0
# A process that has not told for so long says nothing of now.
STALE_S = 15.0
STATES = ("ok", "failed", "limited", "owed", "pending", "in_flight")
STAGES = ("orchestrator", "expert", "judge", "retrieval", "code")


class RunMetrics:
    """Gauges of one run, kept up to date by a thread until `close`. Made where Ray is connected."""

    def __init__(
        self, run_dir: Path, epoch: int, figures: Callable[[], Mapping[str, Any]], every_s: float = EVERY_S
    ) -> None:
        self._run_dir, self._epoch, self._figures, self._every_s = run_dir, epoch, figures, every_s
        self._run = {"run": run_dir.name}
        self._tasks = _gauge("tasks", "tasks by where they are", "state")
        self._planned = _gauge("planned", "tasks planned")
        self._rate = _gauge("tasks_per_minute", "tasks that ended, per minute of this command")
        self._eta = _gauge("eta_s", "seconds to the end at that rate; -1 while nobody knows")
        self._cost = _gauge("cost_usd", "dollars of the results committed by this command")
        self._failures = _gauge("failures", "results without a verdict, of this command", "kind")
        self._calls = _gauge("calls_in_flight", "outside calls that have begun and not ended", "stage")
        self._oldest = _gauge("oldest_call_s", "age of the oldest call in flight; 0 without one", "stage")
        self._limit = _gauge("call_limit", "calls that may be open at once, of a route", "model", "endpoint")
        self._spent = _gauge("spent_usd", "dollars that count against limits.run_cost_usd")
        self._budget = _gauge("run_cost_limit_usd", "limits.run_cost_usd")
        self._stop = threading.Event()
        self.publish()
        self._thread = threading.Thread(target=self._tend, name="run-metrics", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Set every gauge to what is known now."""
        figures = self._figures()
        for state in STATES:
            self._tasks.set(figures[state], {**self._run, "state": state})
        self._planned.set(figures["planned"], self._run)
        self._rate.set(figures["per_min"], self._run)
        self._eta.set(-1.0 if figures["eta_s"] is None else figures["eta_s"], self._run)
        self._cost.set(figures["cost_usd"], self._run)
        for kind in get_args(ErrorKind):
            self._failures.set(figures["failures"].get(kind, 0), {**self._run, "kind": kind})
        self._publish_limits(figures)
        self._publish_calls()

    def _publish_limits(self, figures: Mapping[str, Any]) -> None:
        for model, url, limit, *_ in figures.get("limits", ()):
            self._limit.set(limit, {**self._run, "model": model, "endpoint": url})
        if "limit_usd" in figures:
            self._spent.set(figures["spent_usd"], self._run)
            self._budget.set(figures["limit_usd"], self._run)

    def _publish_calls(self) -> None:
        now = time.time()
        counts, oldest = Counter[str](), dict[str, float]()
        for status in pulse.read(self._run_dir):
            if status.epoch == self._epoch and status.ended is None and now - status.beat < STALE_S:
                for group in status.groups:
                    stage = group.role or group.kind
                    counts[stage] += group.n
                    oldest[stage] = max(oldest.get(stage, 0.0), now - group.since)
        for stage in {*STAGES, *counts}:  # one that is over is set to nothing, not left as it was
            tags = {**self._run, "stage": stage}
            self._calls.set(counts[stage], tags)
            self._oldest.set(oldest.get(stage, 0.0), tags)

    def close(self) -> None:
        """Publish the last state, and stop."""
        self._stop.set()
        self._thread.join()
        self.publish()

    def _tend(self) -> None:
        while not self._stop.wait(self._every_s):
            self.publish()


def _gauge(name: str, description: str, *tags: str) -> Gauge:
    return Gauge(f"toolorch_run_{name}", description=description, tag_keys=("run", *tags))
