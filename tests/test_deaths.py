"""What dies, stops or fills up during a run, on a real Ray cluster: nothing acknowledged is paid twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from ray_app import events
from ray_app.checkpoint import NAMESPACE, actor_name
from ray_app.errors import StorageError
from tests.disks import fill, mounted
from tests.engine_runs import CALLS, TASKS, Run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
]


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


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
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
        with suppress(ProcessLookupError):  # where its raylet has not killed it
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
    tally = await run.drive(worker_lease_s=2.0, concurrency=6)
    run.check(tally, lost=1)
    (failed,) = [result for result in run.seen.results if result.outcome == "failed"]
    assert failed.task_id == "task/7" and failed.error_kind == "infrastructure"
    assert "isolated: 3 workers died with this task, the last while it ran alone" in failed.error


async def test_a_worker_that_dies_as_it_starts_is_made_again(cluster: None, run: Run) -> None:
    run.poison = "start"
    tally = await run.drive()
    assert run.named("died") == ["died-once"]
    run.check(tally)
    assert {result.attempt for result in run.seen.results} == {1}


async def test_a_node_that_is_cut_off_and_comes_back_accuses_no_task_and_counts_for_nothing(run: Run) -> None:
    ray.shutdown()
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 500,
        "health_check_failure_threshold": 4,
    }
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
    processes: list[psutil.Process] = []

    async def cut_off() -> None:
        await run.until_acked(60)
        processes.extend([raylet, *raylet.children(recursive=True)])
        for process in processes:
            process.suspend()
        await run.until_acked(len(TASKS) * CALLS)
        for process in processes:
            process.resume()

    try:
        async with meanwhile(cut_off):
            tally = await run.drive(concurrency=10)
        run.check(tally)
        assert max(result.attempt for result in run.seen.results) >= 2
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "2m") as folder:
        yield folder


async def test_a_disk_that_is_full_for_a_while_is_waited_for(
    cluster_again: None, run: Run, small_disk: Path
) -> None:
    run.run_dir = small_disk / "run"

    async def fill_and_free() -> None:
        await run.until_acked(60)
        ballast = fill(small_disk)
        made = -1
        async with asyncio.timeout(60):
            # Nothing more goes out.
            while made != (made := len(run.named("call"))):  # noqa: ASYNC110
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
