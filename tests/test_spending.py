"""A run-wide spending limit, with real workers: it stops, nothing is lost, and more money goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from ray_app import engine, events, lease, planning, route_limits
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

    def __post_init__(self) -> None:
        self._slots = Slots()

    def slots(self) -> Mapping[RouteKey, Slots]:
        return {KEY: self._slots}

    async def solve(self, task: Task, journal: Journal) -> Solved:
        for number in range(CALLS):
            if task.task_id == "task/20" and number == 2 and not (self.folder / "killed").exists():
                (self.folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            await journal.call(CHAT, {"model": KEY.model, "number": number}, self._ask)
        return Solved(task.answer, Verdict(True, "exact"))

    async def _ask(self) -> ChatReply:
        await self._slots.acquire()
        try:
            await asyncio.sleep(CALL_S)
        finally:
            self._slots.release(Sample("ok", CALL_S, completion_tokens=1))
        return ChatReply("said", model=KEY.model, cost_usd=CALL_USD)

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class MakePaid:
    folder: Path

    def __call__(self) -> PaidSolver:
        return PaidSolver(self.folder)


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
