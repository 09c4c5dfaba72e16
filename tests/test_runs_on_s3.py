"""Runs of the engine on a real S3 server: outages, and another machine that goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ray_app import compaction, events, object_store
from tests.engine_runs import CALLS, TASKS, Run
from tests.s3_server import BUCKET, S3Server, s3_server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
]
URL = f"s3://{BUCKET}/runs/one"
OUTAGE_S = 10.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3 server, and a cluster whose processes know it."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as found:
        for name, value in found.env.items():
            patch.setenv(name, value)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield found
        ray.shutdown()


@pytest.fixture
def run(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "home"))
    url = f"{URL}-{tmp_path.name}"
    (tmp_path / "marks").mkdir()
    return Run(object_store.attach(url), tmp_path / "marks", url=url)


def on_another_machine(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on `run` is what a machine sees that has only the bucket."""
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "another home"))
    run.run_dir = object_store.local(run.url)


async def test_a_store_that_is_away_for_10_s_costs_neither_task_nor_call(
    server: S3Server, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def outage() -> None:
        await run.until_acked(60)
        server.stop()
        await asyncio.sleep(OUTAGE_S)
        server.resume()

    async with asyncio.TaskGroup() as group:
        group.create_task(outage())
        tally = await run.drive(url=run.url)
    run.check(tally)
    assert {result.attempt for result in run.seen.results} == {1}
    counted = events.results(run.run_dir).num_rows
    await asyncio.to_thread(compaction.compact, run.run_dir)
    names = list(object_store.ObjectStore(run.url).list())
    assert [name for name in names if name.endswith(".arrows")] == []
    assert sum(name.endswith(".parquet") for name in names) == 2
    on_another_machine(run, tmp_path, monkeypatch)
    assert events.results(run.run_dir).num_rows == counted == len(TASKS)


async def test_another_machine_goes_on_from_the_bucket_and_repeats_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop() -> None:
        await run.until_acked(len(TASKS) * CALLS // 2)
        run.stop.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(stop())
        tally = await run.drive(url=run.url)
    assert 0 < tally.pending < len(TASKS)
    run.stop.clear()
    on_another_machine(run, tmp_path, monkeypatch)
    run.check(await run.drive(url=run.url))
