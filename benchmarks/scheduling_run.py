"""A real run through the engine: pilot, forecast, the rest, with tasks that only take their time and cost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.engine import session
from benchmarks.figures import Figure
from benchmarks.scheduling_world import Shape, World, world
from ray_app import engine, events, foresight, lease, ordering, outlook, planning
from ray_app.foresight import Place, Rest
from ray_app.journal import CODE, Journal
from ray_app.options import Options
from ray_app.ordering import Asked
from ray_app.planning import Tally, WorkItem
from ray_app.records import ExecutionResult, Task, TaskResult, Verdict
from ray_app.worker import Solved

WORKERS = 2
SEED = 7


@dataclass(frozen=True)
class TimedSolver:
    """One call a task, which takes what the world says."""

    found: World
    scale: float

    async def solve(self, task: Task, journal: Journal) -> Solved:
        await journal.call(CODE, [task.task_id], partial(self._call, task))
        return Solved(task.answer, Verdict(True, "exact"))

    async def _call(self, task: Task) -> ExecutionResult:
        seconds = self.scale * self.found.durations_s[task.rollout_key]
        await asyncio.sleep(seconds)
        cost = self.found.costs_usd[task.rollout_key]
        return ExecutionResult("", "", 0, False, seconds, cost_usd=cost)

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class MakeSolver:
    found: World
    scale: float

    def __call__(self) -> TimedSolver:
        return TimedSolver(self.found, self.scale)


class Silent:
    """A watcher that does not."""

    def started(self, item: WorkItem) -> None:
        pass

    def committed(self, result: TaskResult, tally: Tally) -> None:
        pass

    def tick(self) -> None:
        pass


async def real(folder: Path, tasks: int, slots: int, mean_s: float) -> list[Figure]:
    """A pilot of 5 %, then the rest; each is a command's life, from its lease to its closed log."""
    found = world(SEED, tasks, Shape())
    scale = mean_s / float(np.mean(list(found.durations_s.values())))
    run_dir = folder / "run"
    with session():
        await _command(run_dir, found, scale, slots, Asked(pilot=max(tasks // 20, foresight.FEWEST)))
        seen = outlook.history(run_dir)
        assert seen is not None
        left = _plan(run_dir, found, Asked())
        rest = Rest([ordering.stratum(item.task) for item in left.items], np.full(len(left.items), np.nan))
        told = foresight.forecast(outlook.sample(seen.measured, {}, ordering.Durations()), rest, Place(slots))
        assert told is not None
        await _command(run_dir, found, scale, slots, Asked())
    after = outlook.history(run_dir)
    assert after is not None
    wall_s, cost_usd = after.spans_s[2], after.spent_usd - seen.spent_usd
    return list(_figures(told, wall_s, cost_usd, len(after.results), tasks))


def _figures(
    told: foresight.Forecast, wall_s: float, cost_usd: float, counted: int, tasks: int
) -> Iterator[Figure]:
    name = f"a real run through the engine, {tasks} tasks"
    yield Figure(f"{name}: counted after pilot and rest", counted, "==", tasks)
    for what, held, came, unit in (
        ("wall", told.wall_s, wall_s, "s"),
        ("cost", told.cost_usd, cost_usd, "$"),
    ):
        yield Figure(f"{name}: {what} of the rest, foretold at least", held.low, unit=unit)
        yield Figure(f"{name}: {what} of the rest, came", came, ">=", held.low, unit)
        yield Figure(f"{name}: {what} of the rest, foretold at most", held.high, ">=", came, unit)


def _plan(run_dir: Path, found: World, asked: Asked) -> planning.Plan:
    rows = events.results(run_dir).to_pylist() if (run_dir / "log").exists() else []
    work = planning.plan(found.tasks, 1, rows)
    return ordering.arranged(work, found.tasks, asked, ordering.Durations())


async def _command(run_dir: Path, found: World, scale: float, slots: int, asked: Asked) -> Tally:
    work = _plan(run_dir, found, asked)
    held = lease.take(run_dir)
    options = Options(run_dir, "bench", held.epoch, slots, WORKERS, attempts=1)
    log = options.writer("driver")
    try:
        return await engine.run(
            work,
            MakeSolver(found, scale),
            options,
            log=log,
            lease=held,
            watcher=Silent(),
            stop=asyncio.Event(),
        )
    finally:
        await asyncio.to_thread(log.close)
        held.release()
