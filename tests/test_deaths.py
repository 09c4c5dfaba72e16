"""What dies, stops or fills up during a run, on a real Ray cluster: nothing acknowledged is paid twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from ray_app import engine, events, lease, planning
from ray_app.checkpoint import NAMESPACE, actor_name
from ray_app.errors import StorageError
from ray_app.journal import CODE, Journal
from ray_app.options import Options
from ray_app.planning import Tally, WorkItem
from ray_app.records import ExecutionResult, Task, TaskResult, Verdict
from ray_app.worker import Solved

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
]
TASKS = [Task(f"task/{n}", f"question {n}", str(n)) for n in range(40)]
CALLS = 6
CALL_S = 0.05


@dataclass(frozen=True)
class MarkingSolver:
    """Leaves a file for each call made and for each acknowledged, so that a repeat is seen from outside."""

    marks: Path
    poison: str = ""  # what happens in the middle of task 7, every time

    async def solve(self, task: Task, journal: Journal) -> Solved:
        (self.marks / f"pid-{os.getpid()}").touch()
        for number in range(CALLS):
            name = f"{task.rollout_key}-{number}"
            await journal.call(CODE, [task.task_id, number], partial(self._call, task, name))
            (self.marks / f"acked-{name}").touch()
        return Solved(task.answer, Verdict(True, "exact"))

    async def _call(self, task: Task, name: str) -> ExecutionResult:
        is_repeat = (self.marks / f"acked-{name}").exists()
        (self.marks / f"{'repeat' if is_repeat else 'call'}-{name}-{time.monotonic_ns()}").touch()
        await asyncio.sleep(CALL_S)
        if task.task_id == "task/7" and name.endswith("-2"):
            if self.poison == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.poison == "hang":
                time.sleep(3600)  # noqa: ASYNC251  (that is the fault: the whole event loop stands)
        return ExecutionResult("out" * 100, "", 0, False, 0.0)

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class MakeSolver:
    marks: Path
    poison: str = ""

    def __call__(self) -> MarkingSolver:
        return MarkingSolver(self.marks, self.poison)


@dataclass
class Seen:
    """A watcher that keeps the results."""

    results: list[TaskResult] = field(default_factory=list)

    def started(self, item: WorkItem) -> None:
        pass

    def committed(self, result: TaskResult, tally: Tally) -> None:
        self.results.append(result)

    def tick(self) -> None:
        pass


@dataclass
class Run:
    """A run directory, and what its solvers left beside it."""

    run_dir: Path
    marks: Path
    poison: str = ""
    seen: Seen = field(default_factory=Seen)

    async def drive(self, **options: Any) -> Tally:
        """One driver's life, from its lease to its closed log."""
        held = lease.take(self.run_dir)
        settings = replace(Options(self.run_dir, "run", held.epoch, 20, 2, 3), **options)
        log = settings.writer("driver")
        rows = events.results(self.run_dir).to_pylist() if (self.run_dir / "log").exists() else []
        try:
            return await engine.run(
                planning.plan(TASKS, 1, rows),
                MakeSolver(self.marks, self.poison),
                settings,
                log=log,
                lease=held,
                watcher=self.seen,
                stop=asyncio.Event(),
            )
        finally:
            held.release()
            await asyncio.to_thread(log.close)

    def named(self, prefix: str) -> list[str]:
        return [path.name for path in self.marks.glob(f"{prefix}-*")]

    def workers(self) -> list[int]:
        """The processes that have solved something, and still live."""
        return [
            pid for pid in (int(name.split("-")[1]) for name in self.named("pid")) if psutil.pid_exists(pid)
        ]

    async def until_acked(self, number: int) -> None:
        async with asyncio.timeout(60):
            while len(self.named("acked")) < number:
                await asyncio.sleep(0.01)

    def check(self, tally: Tally, *, lost: int = 0) -> None:
        """Every task is counted once, and no acknowledged call was made again."""
        assert tally.counts["ok"] == len(TASKS) - lost and tally.pending == 0, tally.line()
        rows = events.results(self.run_dir).to_pylist()
        assert Counter(row["task_id"] for row in rows) == {task.task_id: 1 for task in TASKS}
        assert self.named("repeat") == []


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "marks").mkdir()
    return Run(tmp_path / "run", tmp_path / "marks")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@asynccontextmanager
async def meanwhile(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Runs `work` beside the block; what went wrong in it fails the test."""
    task = asyncio.ensure_future(work())
    try:
        yield
    finally:
        await task


def checkpoint_processes() -> list[int]:
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "ray::Checkpoint" in " ".join(process.cmdline())
    ]


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_killed_worker_costs_no_acknowledged_call(cluster: None, run: Run, seed: int) -> None:
    async def kill() -> None:
        for share in range(1, 3):
            await run.until_acked(share * seed * 40)
            os.kill(run.workers()[-1], signal.SIGKILL)

    async with meanwhile(kill):
        tally = await run.drive()
    run.check(tally)
    assert max(result.attempt for result in run.seen.results) >= 2
    assert any(result.replayed_calls for result in run.seen.results if result.attempt > 1)


async def test_a_killed_checkpoint_actor_costs_nothing_and_comes_back(cluster: None, run: Run) -> None:
    killed: list[int] = []

    async def kill() -> None:
        await run.until_acked(60)
        killed.extend(checkpoint_processes())
        assert len(killed) == 1
        os.kill(killed[0], signal.SIGKILL)

    async with meanwhile(kill):
        tally = await run.drive()
    run.check(tally)
    assert {result.attempt for result in run.seen.results} == {1}
    with pytest.raises(ValueError, match="look up actor"):  # it goes when the run has ended
        ray.get_actor(actor_name(run.run_dir), namespace=NAMESPACE)


async def test_what_a_killed_worker_had_only_in_the_checkpoint_actor_is_in_the_log(
    cluster: None, run: Run
) -> None:
    async def kill() -> None:
        await run.until_acked(30)
        for pid in run.workers():
            os.kill(pid, signal.SIGKILL)

    async with meanwhile(kill):
        tally = await run.drive()
    run.check(tally)
    ids = [row["event_id"] for batch in events.read(run.run_dir, ["event_id"]) for row in batch.to_pylist()]
    assert len(ids) == len(set(ids))


async def test_a_worker_that_is_stopped_past_its_lease_is_replaced_and_counts_for_nothing(
    cluster: None, run: Run
) -> None:
    stopped: list[int] = []

    async def stop() -> None:
        await run.until_acked(40)
        stopped.append(run.workers()[-1])
        os.kill(stopped[0], signal.SIGSTOP)
        await run.until_acked(len(TASKS) * CALLS)  # the others have ended it all without this one
        os.kill(stopped[0], signal.SIGCONT)

    async with meanwhile(stop):
        tally = await run.drive(worker_lease_s=4.0)
    run.check(tally)
    assert {result.attempt for result in run.seen.results} == {1, 2}


@pytest.mark.parametrize("poison", ["kill", "hang"])
async def test_a_task_that_takes_its_worker_with_it_is_isolated_and_the_others_are_not(
    cluster: None, run: Run, poison: str
) -> None:
    run.poison = poison
    tally = await run.drive(worker_lease_s=2.0)
    run.check(tally, lost=1)
    (failed,) = [result for result in run.seen.results if result.outcome == "failed"]
    assert failed.task_id == "task/7" and failed.error_kind == "infrastructure"
    assert "isolated: 3 workers died with this task, the last while it ran alone" in failed.error


async def test_the_death_of_a_node_accuses_no_task(run: Run) -> None:
    ray.shutdown()
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
    }
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    try:

        async def kill() -> None:
            await run.until_acked(60)
            cluster.remove_node(second, allow_graceful=False)

        async with meanwhile(kill):
            tally = await run.drive(workers=4)
        run.check(tally)
        assert max(result.attempt for result in run.seen.results) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False)
    if mount.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes what is left of the disk."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            return ballast


async def test_a_disk_that_is_full_for_a_while_is_waited_for(
    cluster_again: None, run: Run, small_disk: Path
) -> None:
    run.run_dir = small_disk / "run"

    async def fill_and_free() -> None:
        await run.until_acked(60)
        ballast = fill(small_disk)
        made = -1
        async with asyncio.timeout(60):
            while made != (made := len(run.named("call"))) or made == 0:  # nothing more goes out
                await asyncio.sleep(1.0)
        assert made < len(TASKS) * CALLS, "the run ended on a full disk"
        ballast.unlink()

    async with meanwhile(fill_and_free):
        tally = await run.drive()
    run.check(tally)
    assert {result.attempt for result in run.seen.results} == {1}


async def test_a_disk_that_stays_full_ends_the_run_and_the_resume_repeats_nothing_of_it(
    cluster_again: None, run: Run, small_disk: Path
) -> None:
    run.run_dir = small_disk / "run"
    ballast: list[Path] = []

    async def fill_it() -> None:
        await run.until_acked(60)
        ballast.append(fill(small_disk))

    with pytest.raises(StorageError, match="No space left on device"):
        async with meanwhile(fill_it):
            await run.drive(storage_patience_s=2.0)
    ballast[0].unlink()
    counted = events.results(run.run_dir).num_rows
    run.seen.results.clear()
    tally = await run.drive()
    assert tally.counts["ok"] == len(TASKS) and len(run.seen.results) == len(TASKS) - counted


@pytest.fixture
def cluster_again() -> Iterator[None]:
    if not ray.is_initialized():
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
