"""Runs of the engine whose solvers leave evidence outside the system: a file for each call made, and for
each acknowledged."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ray_app import engine, events, lease, planning
from ray_app.journal import CODE, Journal
from ray_app.options import Options
from ray_app.planning import Tally, WorkItem
from ray_app.records import ExecutionResult, Task, TaskResult, Verdict
from ray_app.worker import Solved

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
        if self.poison == "start":
            with suppress(FileExistsError):
                (self.marks / "died-once").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
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
    url: str = ""
    seen: Seen = field(default_factory=Seen)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

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
                stop=self.stop,
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
            while len(self.named("acked")) < number:  # noqa: ASYNC110  (files that other processes make)
                await asyncio.sleep(0.01)

    def check(self, tally: Tally, *, lost: int = 0) -> None:
        """Every task is counted once, and no acknowledged call was made again."""
        assert tally.counts["ok"] == len(TASKS) - lost and tally.pending == 0, tally.line()
        rows = events.results(self.run_dir).to_pylist()
        assert Counter(row["task_id"] for row in rows) == {task.task_id: 1 for task in TASKS}
        assert self.named("repeat") == []
