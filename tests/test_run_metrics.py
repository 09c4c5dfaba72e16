"""A run's figures on Ray's metrics port, of a real local Ray."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ray_app.planning import Tally, WorkItem
from ray_app.pulse import Followed, Pulse
from ray_app.records import Event, Task, TaskResult
from ray_app.run_metrics import RunMetrics
from tests.engine_runs import Seen
from tests.ray_marks import RAY

pytestmark = RAY
TASKS = [Task(f"task/{n}", "question", "answer") for n in range(4)]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The metrics port of a cluster of our own."""
    often = {"metrics_report_interval_ms": 500}
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=often)
    yield ray.nodes()[0]["MetricsExportPort"]
    ray.shutdown()


def series(port: int) -> dict[str, float]:
    """Our gauges by name and tag, those of Ray's own left out."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    found = {}
    for line in lines:
        if match := re.match(r'ray_toolorch_run_(\w+)\{.*run="my-run".*\} (\S+)$', line):
            tag = re.search(r'(?:state|kind|stage|model)="(\w+)"', line)
            found[match.group(1) + (f" {tag.group(1)}" if tag else "")] = float(match.group(2))
    return found


def result(number: int, outcome: str, error_kind: str | None = None) -> TaskResult:
    task = TASKS[number]
    keys = task.task_id, task.rollout_key, task.judge_key, 0, 1
    return TaskResult(*keys, outcome=outcome, error_kind=error_kind, cost_usd=0.25)  # type: ignore[arg-type]


async def test_tasks_cost_failures_and_calls_are_on_rays_metrics_port(port: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "my-run"
    tally = Tally(4)
    followed = Followed(Seen(), tally)
    told = Pulse(run_dir, "w001", epoch=2, interval_s=1000.0)
    older = Pulse(run_dir, "w009", epoch=1, interval_s=1000.0)
    call = Event("model_call", time.time() - 30, role="expert", tool="search")
    number = told.begin(call, "gpt")
    for watch in (told, older):
        watch.begin(Event("code", time.time()))
        watch.beat()
    decided = {"limits": [["gpt", "http://a/v1", 24]], "spent_usd": 1.5, "limit_usd": 6.0}
    meters = RunMetrics(run_dir, 2, lambda: followed.figures() | decided, every_s=0.1)
    for task in TASKS:
        followed.started(WorkItem(task, 0))
    for outcome, kind in (("ok", None), ("failed", "infrastructure")):
        tally.counts[outcome] += 1  # type: ignore[index]
        followed.committed(result(sum(tally.counts.values()) - 1, outcome, kind), tally)

    async def until(**wanted: float) -> dict[str, float]:
        async with asyncio.timeout(60):
            while True:
                found = await asyncio.to_thread(series, port)
                if all(found.get(name.replace("__", " ")) == value for name, value in wanted.items()):
                    return found
                await asyncio.sleep(0.2)

    found = await until(tasks__ok=1, tasks__failed=1, tasks__pending=2, tasks__in_flight=2, cost_usd=0.5)
    assert (found["planned"], found["failures infrastructure"], found["failures judge"]) == (4, 1, 0)
    assert found["tasks_per_minute"] > 0 and found["eta_s"] > 0
    assert (found["calls_in_flight expert"], found["calls_in_flight code"]) == (1, 1)
    assert 29 < found["oldest_call_s expert"] < 90
    assert (found["call_limit gpt"], found["spent_usd"], found["run_cost_limit_usd"]) == (24, 1.5, 6)
    told.end(number)
    told.beat()
    await until(calls_in_flight__expert=0, oldest_call_s__expert=0, calls_in_flight__code=1)
    tally.counts["ok"] += 2
    meters.close()
    await until(tasks__ok=3, tasks__pending=0)
    told.close()
    older.close()
