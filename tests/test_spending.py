"""Limits with real workers: a run's money, where nothing is lost and more of it goes on; and places that runs
of a cluster share."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from ray_app import engine, events, lease, planning, route_limits, sharing
from ray_app.checkpoint import NAMESPACE
from ray_app.concurrency import Bounds
from ray_app.governor import Governor, Policy
from ray_app.journal import CHAT, Journal
from ray_app.options import Options
from ray_app.planning import Tally
from ray_app.records import ChatReply, Task, Verdict
from ray_app.slots import RouteKey, Sample, Slots
from ray_app.worker import Solved
from tests.engine_runs import Seen
from tests.ray_marks import RAY

pytestmark = RAY

KEY = RouteKey("paid", "http://127.0.0.1:1/v1")
TASKS = [Task(f"task/{n}", f"question {n}", str(n)) for n in range(24)]
CALLS, CALL_S, CALL_USD, IN_FLIGHT, MOST_OPEN = 5, 0.25, 0.01, 8, 6
PAID = "select task_id, call_seq from events where kind = 'model_call' and status = 'ok'"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@dataclass
class PaidSolver:
    """Asks a model that costs, through slots as a chat client has them; dies once, in task 20."""

    folder: Path
    key: RouteKey

    def __post_init__(self) -> None:
        self._slots = Slots()
        self._died = self.folder / "killed"

    def slots(self) -> Mapping[RouteKey, Slots]:
        return {self.key: self._slots}

    async def solve(self, task: Task, journal: Journal) -> Solved:
        for number in range(CALLS):
            if (self.key, task.task_id, number) == (KEY, "task/20", 2) and not self._died.exists():
                self._died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            await journal.call(CHAT, {"model": self.key.model, "number": number}, self._ask)
        return Solved(task.answer, Verdict(True, "exact"))

    async def _ask(self) -> ChatReply:
        await self._slots.acquire()
        try:
            await asyncio.sleep(CALL_S)
        finally:
            self._slots.release(Sample("ok", CALL_S, completion_tokens=1))
        return ChatReply("said", model=self.key.model, cost_usd=CALL_USD)

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class MakePaid:
    folder: Path
    key: RouteKey = KEY

    def __call__(self) -> PaidSolver:
        return PaidSolver(self.folder, self.key)


async def drive(run_dir: Path, limit_usd: float) -> tuple[Tally, Governor]:
    held = lease.take(run_dir)
    options = Options(run_dir, "run", held.epoch, IN_FLIGHT, 2, 3)
    has_log = (run_dir / "log").exists()
    rows = events.results(run_dir).to_pylist() if has_log else []
    before = route_limits.spent_usd(run_dir) if has_log else 0.0
    bounds = {KEY: Bounds(MOST_OPEN, MOST_OPEN, MOST_OPEN)}
    governor = Governor(Policy(bounds, limit_usd, before), workers=2)
    log = options.writer("driver")
    try:
        tally = await engine.run(
            planning.plan(TASKS, 1, rows),
            MakePaid(run_dir),
            options,
            log=log,
            lease=held,
            watcher=Seen(),
            stop=asyncio.Event(),
            governor=governor,
        )
    finally:
        held.release()
        await asyncio.to_thread(log.close)
    return tally, governor


async def test_a_run_stops_at_its_spending_limit_and_goes_on_with_a_higher_one(
    cluster: None, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    whole = len(TASKS) * CALLS * CALL_USD
    tally, governor = await drive(run_dir, limit_usd=0.2)
    # What was in flight is neither failed nor limited, and the log has what the driver was told.
    assert tally.counts["failed"] == tally.counts["limited"] == tally.counts["owed"] == 0
    assert tally.pending > 0 and not governor.may_spend
    spent = route_limits.spent_usd(run_dir)
    assert abs(governor.spent_usd - spent) < 1e-9
    # No more than what is open for the two exchanges that a worker may take to be heard and told.
    assert 0.2 <= spent <= 0.2 + CALL_USD * MOST_OPEN * (1 + 2.5 / CALL_S) and spent < whole
    with events.connect(run_dir) as log:
        # Only those that still waited for a place were cancelled: no call that had gone out was lost.
        query = "select count(*) from events where kind = 'model_call' and status <> 'ok'"
        assert log.execute(query).fetchall()[0][0] <= IN_FLIGHT - MOST_OPEN
    # The same limit starts nothing; a higher one completes the run, and pays for no call again.
    again, _ = await drive(run_dir, limit_usd=0.2)
    assert again.pending == tally.pending and abs(route_limits.spent_usd(run_dir) - spent) < 1e-9
    tally, governor = await drive(run_dir, limit_usd=10.0)
    assert tally.counts["ok"] == len(TASKS) and tally.pending == 0
    with events.connect(run_dir) as log:
        calls = log.execute(PAID).fetchall()
        limits = log.execute("select model, endpoint, detail from events where kind = 'limit'").fetchall()
    assert Counter(Counter(calls).values()) == {1: len(TASKS) * CALLS}
    assert abs(route_limits.spent_usd(run_dir) - whole) < 1e-9
    # Of the worker that was killed meanwhile, the calls that it had no time to report are counted too.
    assert (run_dir / "killed").exists()
    logged = {name: route_limits.spent_usd(run_dir, f"e0003-{name}-") for name in governor.gone_usd}
    assert governor.gone_usd == pytest.approx(logged) and max(logged.values()) > 0
    assert {(model, url, json.loads(detail)["new"]) for model, url, detail in limits} == {(*KEY, MOST_OPEN)}


SHARED = RouteKey("shared", "http://127.0.0.1:1/v1")


async def begin(run_dir: Path, governor: Governor, stop: asyncio.Event) -> Tally:
    """A run that asks at `SHARED`, until it is stopped."""
    lent = lease.take(run_dir)
    options = Options(run_dir, "run", lent.epoch, IN_FLIGHT, 1, 3)
    log = options.writer("driver")
    work = planning.plan([Task(f"task/{n}", f"question {n}", str(n)) for n in range(2000)], 1, [])
    try:
        return await engine.run(
            work,
            MakePaid(run_dir, SHARED),
            options,
            log=log,
            lease=lent,
            watcher=Seen(),
            stop=stop,
            governor=governor,
        )
    finally:
        lent.release()
        await asyncio.to_thread(log.close)


async def test_two_runs_share_one_limit_also_after_the_actor_that_decides_it_was_killed(
    cluster: None, tmp_path: Path
) -> None:
    bounds = Bounds(start=MOST_OPEN, most=MOST_OPEN)
    governors = [Governor(Policy({SHARED: bounds}), is_shared=True) for _ in range(2)]
    stops = [asyncio.Event() for _ in governors]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    runs = [asyncio.create_task(begin(*run)) for run in zip(folders, governors, stops, strict=True)]

    async def until(holds: Callable[[list[list[int]]], bool]) -> None:
        """`holds` of each run's share, with the limit of all and their number where they are several."""
        async with asyncio.timeout(60):
            while not holds([governor.figures()["limits"][0][2:] for governor in governors]):
                await asyncio.sleep(0.05)
                assert not runs[0].done(), runs[0].result()

    def are_even(limits: list[list[int]]) -> bool:
        shares, limit = [one[0] for one in limits], sum(one[0] for one in limits)
        is_whole = all(one[1:] == [limit, 2] for one in limits)
        return is_whole and limit >= MOST_OPEN and max(shares) - min(shares) <= 1

    try:
        await until(are_even)
        actor = ray.get_actor(sharing.actor_name(), namespace=NAMESPACE)
        killed = (await actor.holds.remote())["pid"]
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(60):
            while not await decides_again(actor, killed):  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.05)
        await until(are_even)
        # And one that ends says so: the other needs not wait for its lease.
        stops[1].set()
        assert (await runs[1]).counts["failed"] == 0
        await until(lambda limits: limits[0] == [MOST_OPEN])
    finally:
        for stop in stops:
            stop.set()
        tallies = await asyncio.gather(*runs)
    assert [tally.counts["failed"] for tally in tallies] == [0, 0]


async def decides_again(actor: Any, killed: int) -> bool:
    """Whether both runs have joined the actor that took the place of the one that was killed."""
    try:
        holds = await actor.holds.remote()
    except RayError:
        return False
    return bool(holds["pid"] != killed and holds["runs"] == 2)
