from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_app import engine, events, lease, planning
from ray_app.errors import ContextOverflow, EndpointError, InfrastructureError, LimitReached
from ray_app.event_writer import EventWriter
from ray_app.journal import CODE, Journal
from ray_app.options import Options
from ray_app.planning import Plan, Tally, WorkItem
from ray_app.records import ExecutionResult, Task, TaskResult, Verdict
from ray_app.worker import Solved

TASKS = [Task(f"task/{n}", f"question {n}", str(n)) for n in range(12)]
CALLS = 3


def row(task: Task, outcome: str, **changes: Any) -> dict[str, Any]:
    base = {
        "rollout_key": task.rollout_key,
        "judge_key": task.judge_key,
        "trial": 0,
        "attempt": 1,
        "outcome": outcome,
        "error_kind": None,
    }
    return base | changes


def test_a_resume_runs_infrastructure_failures_and_owed_verdicts_again() -> None:
    rows = [
        row(TASKS[0], "ok"),
        row(TASKS[1], "limited", error_kind="limit"),
        row(TASKS[2], "failed", error_kind="model"),
        row(TASKS[3], "failed", error_kind="infrastructure", attempt=3),
        row(TASKS[4], "owed", error_kind="judge"),
        row(TASKS[5], "ok", judge_key="of another reference answer"),
    ]
    work = planning.plan(TASKS[:7], 1, rows)
    assert [item.task for item in work.items] == [TASKS[3], TASKS[4], TASKS[5], TASKS[6]]
    assert work.items[0].attempt == 4
    assert work.kept.counts == {"ok": 1, "limited": 1, "failed": 1, "owed": 0}
    assert work.kept.line() == "7 planned = 1 ok + 1 failed + 1 limited + 0 owed + 4 pending"
    assert len(planning.plan(TASKS[:7], 1, rows, retry_failed=True).items) == 5


def test_every_trial_of_a_task_is_work_of_its_own() -> None:
    work = planning.plan(TASKS[:2], 3, [row(TASKS[0], "ok", trial=1)])
    assert [(item.task.task_id, item.trial) for item in work.items] == [
        ("task/0", 0),
        ("task/1", 0),
        ("task/1", 1),
        ("task/0", 2),
        ("task/1", 2),
    ]


@dataclass(frozen=True)
class CountingSolver:
    """Makes three calls a task, each a file of its own, so that a repeated call can be seen."""

    folder: Path
    fault: str = ""

    async def solve(self, task: Task, journal: Journal) -> Solved:
        for number in range(CALLS):
            await journal.call(CODE, [task.task_id, number], partial(self._call, task, number))
        return Solved(task.answer, Verdict(True, "exact"))

    async def _call(self, task: Task, number: int) -> ExecutionResult:
        made = len(list(self.folder.glob(f"{task.rollout_key}-{number}-*")))
        (self.folder / f"{task.rollout_key}-{number}-{made}").touch()
        if number == 1 and made == 0 and task is not None:
            await self._trouble(task)
        return ExecutionResult("out", "", 0, False, 0.0)

    async def _trouble(self, task: Task) -> None:
        if self.fault == "kill" and task.task_id == "task/3":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "endpoint":
            raise EndpointError("endpoint down for a moment")
        if self.fault == "overflow":
            raise ContextOverflow("prompt too long")
        if self.fault == "limit":
            raise LimitReached("no answer within 3 turns")
        if self.fault == "bug":
            raise KeyError("surprise")
        if self.fault == "hang":
            await asyncio.Event().wait()

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class MakeSolver:
    folder: Path
    fault: str = ""

    def __call__(self) -> CountingSolver:
        return CountingSolver(self.folder, self.fault)


@dataclass
class Seen:
    """A watcher that remembers what was committed, and may stop the run after some results."""

    stop: asyncio.Event
    stop_after: int = 10**9
    in_flight: int = 0
    most_in_flight: int = 0
    results: list[TaskResult] = field(default_factory=list)

    def started(self, item: WorkItem) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.stop_after == 0:
            self.stop.set()

    def committed(self, result: TaskResult, tally: Tally) -> None:
        self.in_flight -= 1
        self.results.append(result)
        if len(self.results) >= self.stop_after:
            self.stop.set()

    def tick(self) -> None:
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@dataclass
class Bench:
    """A run directory and a folder of call marks; `run` is one driver's life."""

    run_dir: Path
    marks: Path

    async def run(self, fault: str = "", *, stop_after: int = 10**9, **options: int) -> tuple[Tally, Seen]:
        held = lease.take(self.run_dir)
        settings = replace(Options(self.run_dir, "run", held.epoch, 4, 2, 3), **options)  # type: ignore[arg-type]
        log = EventWriter(self.run_dir, f"e{held.epoch}-driver")
        seen = Seen(asyncio.Event(), stop_after)
        work = self.plan()
        make = MakeSolver(self.marks, fault)
        try:
            tally = await engine.run(work, make, settings, log=log, lease=held, watcher=seen, stop=seen.stop)
        finally:
            log.close()
            held.release()
        return tally, seen

    def plan(self) -> Plan:
        return planning.plan(TASKS, 1, self.results())

    def results(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = (
            events.results(self.run_dir).to_pylist() if (self.run_dir / "log").exists() else []
        )
        return rows

    def calls_made(self) -> Counter[int]:
        """How many (task, call) pairs were made how many times."""
        made = Counter(path.name.rsplit("-", 1)[0] for path in self.marks.iterdir())
        return Counter(made.values())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "marks").mkdir()
    return Bench(tmp_path / "run", tmp_path / "marks")


pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.mark.cluster
async def test_every_task_is_committed_once_with_bounded_work_in_flight(cluster: None, bench: Bench) -> None:
    tally, seen = await bench.run()
    assert tally.line() == "12 planned = 12 ok + 0 failed + 0 limited + 0 owed + 0 pending"
    assert sorted(result.task_id for result in seen.results) == sorted(task.task_id for task in TASKS)
    assert seen.most_in_flight == 4
    assert bench.calls_made() == {1: len(TASKS) * CALLS}
    assert bench.plan().items == ()


@pytest.mark.cluster
async def test_a_killed_worker_is_replaced_and_its_tasks_finish(cluster: None, bench: Bench) -> None:
    tally, _ = await bench.run("kill")
    assert tally.counts["ok"] == len(TASKS) and tally.pending == 0
    assert len(bench.results()) == len(TASKS)


@pytest.mark.cluster
async def test_a_stopped_run_goes_on_without_repeating_a_completed_call(cluster: None, bench: Bench) -> None:
    tally, _ = await bench.run(stop_after=5)
    assert 0 < tally.pending < len(TASKS)
    tally, seen = await bench.run()
    assert tally.counts["ok"] == len(TASKS)
    assert len(seen.results) < len(TASKS)
    assert bench.calls_made() == {1: len(TASKS) * CALLS}


@pytest.mark.cluster
async def test_what_hangs_is_cancelled_by_a_stop_and_stays_pending(cluster: None, bench: Bench) -> None:
    tally, _ = await asyncio.wait_for(bench.run("hang", stop_after=0), 30)
    assert tally.pending == len(TASKS)
    tally, _ = await bench.run()
    assert tally.counts["ok"] == len(TASKS)
    rows = [row for batch in events.read(bench.run_dir, ["kind", "status"]) for row in batch.to_pylist()]
    assert Counter(row["kind"] for row in rows if row["status"] == "ok")["code"] == len(TASKS) * CALLS


@pytest.mark.cluster
async def test_infrastructure_trouble_is_tried_again_from_the_call_that_failed(
    cluster: None, bench: Bench
) -> None:
    tally, seen = await bench.run("endpoint", concurrency=12)
    assert tally.counts["ok"] == len(TASKS)
    assert {result.attempt for result in seen.results} == {2}
    # Only the call that failed was made twice; the one before it was served from the journal.
    assert bench.calls_made() == {1: 2 * len(TASKS), 2: len(TASKS)}


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("fault", "outcome", "kind"),
    [("overflow", "failed", "model"), ("limit", "limited", "limit"), ("bug", "failed", "infrastructure")],
)
async def test_every_other_end_is_a_result_of_its_kind(
    cluster: None, bench: Bench, fault: str, outcome: str, kind: str
) -> None:
    tally, seen = await bench.run(fault, attempts=1, concurrency=12)
    assert {(result.outcome, result.error_kind) for result in seen.results} == {(outcome, kind)}
    assert tally.pending == 0
    assert len(bench.plan().items) == (len(TASKS) if kind == "infrastructure" else 0)


@pytest.mark.cluster
async def test_a_driver_that_lost_its_lease_commits_nothing_more(cluster: None, bench: Bench) -> None:
    held = lease.take(bench.run_dir)
    log = EventWriter(bench.run_dir, "old-driver")
    seen = Seen(asyncio.Event())
    options = Options(bench.run_dir, "run", held.epoch, 4, 1, 1)
    (bench.run_dir / "lease" / "epoch-000002.json").write_text("{}")
    with pytest.raises(Exception, match="replaced by epoch 2"):
        await engine.run(
            bench.plan(), MakeSolver(bench.marks), options, log=log, lease=held, watcher=seen, stop=seen.stop
        )
    log.close()
    assert seen.results == [] and bench.results() == []


@pytest.mark.cluster
async def test_a_run_in_which_only_infrastructure_fails_stops_itself(cluster: None, bench: Bench) -> None:
    with pytest.raises(InfrastructureError, match="4 tasks in a row failed, the last with: KeyError"):
        await bench.run("bug", attempts=1, concurrency=1, give_up_after=4)
    assert len(bench.results()) == 4 and len(bench.plan().items) == len(TASKS)
