"""The worker actor: one process that solves many tasks at once and reports how each attempt ended.

Names no benchmark: a solver comes from the job's factory. What a worker writes is evidence; the driver
commits.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import ray

from ray_app import pulse
from ray_app.errors import EvalError, InfrastructureError, kind_of
from ray_app.event_writer import EventWriter
from ray_app.journal import Journal, RecordedCall
from ray_app.planning import WorkItem
from ray_app.pulse import Pulse
from ray_app.records import Event, Outcome, Task, TaskResult, Verdict


@dataclass(frozen=True, slots=True)
class Solved:
    """What a solver makes of a task: a verdict, or the reason why one is still owed."""

    prediction: str
    verdict: Verdict | None = None
    owed: str = ""


class Solver(Protocol):
    """One benchmark's way to solve a task; made once in each worker process."""

    async def solve(self, task: Task, journal: Journal) -> Solved:
        """Raises LimitReached, ModelError or an InfrastructureError; all else counts as the last."""
        ...

    async def close(self) -> None: ...


SolverFactory = Callable[[], Solver]


@dataclass(frozen=True, slots=True)
class Report:
    """An attempt's result, and its completed calls for the next attempt if there must be one."""

    result: TaskResult
    calls: tuple[RecordedCall, ...] = ()
    is_given_up: bool = False  # its deadline passed and its worker may still be held by it


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is carried out; nothing here changes what is measured."""

    run_dir: Path
    run_id: str
    epoch: int
    concurrency: int
    workers: int
    attempts: int
    give_up_after: int = 1_000_000
    canary: str = ""  # of the dataset, carried in the metadata of every log file
    # Holds even where a call ignores its cancellation; None: calls have deadlines of their own.
    attempt_deadline_s: float | None = None

    def writer(self, name: str) -> EventWriter:
        """A log writer of its own for each process start, whatever else writes to this run."""
        writer_id = f"e{self.epoch:04d}-{name}-{uuid.uuid4().hex[:8]}"
        metadata = {"canary": self.canary} if self.canary else None
        return EventWriter(self.run_dir, writer_id, metadata=metadata)


class Worker:
    """One process with many tasks in flight, its own log stream and its own clients."""

    def __init__(self, make_solver: SolverFactory, options: Options, index: int) -> None:
        pulse.raise_file_limit(options.concurrency)
        self._options = options
        node = ray.get_runtime_context().get_node_id()[:8]
        self._name = f"{node}:{os.getpid()}"
        self._log = options.writer(worker_name(index))
        self._pulse = Pulse(options.run_dir, worker_name(index), epoch=options.epoch, node=node)
        self._given_up: set[asyncio.Task[Solved]] = set()
        self._solver = make_solver()

    async def solve(self, item: WorkItem) -> Report:
        """One attempt. Whatever goes wrong is data in the report, never an exception."""
        journal = Journal(item.task, self._log, self._base(item), item.recorded, watch=self._pulse)
        journal.note("attempt")
        try:
            solved = await self._in_time(item.task, journal)
            result = _result(item, journal, solved)
        except Exception as error:
            result = _broken(item, journal, error)
        await asyncio.to_thread(self._log.flush)
        return Report(result, tuple(journal.calls) if is_retryable(result) else (), journal.is_closed)

    async def _in_time(self, task: Task, journal: Journal) -> Solved:
        """The solver's result. Raises InfrastructureError at the deadline, whatever holds the solver."""
        limit_s = self._options.attempt_deadline_s
        if limit_s is None:
            return await self._solver.solve(task, journal)
        solving = asyncio.ensure_future(self._solver.solve(task, journal))
        try:
            done, _ = await asyncio.wait({solving}, timeout=limit_s)
        finally:
            solving.cancel()  # does nothing to one that is done
        if done:
            return solving.result()
        journal.is_closed = True
        self._given_up.add(solving)  # a task that nobody holds may be collected while it runs
        solving.add_done_callback(self._forget)
        raise InfrastructureError(f"no end within {limit_s:g} s (deadline of an attempt): given up")

    def _forget(self, solving: asyncio.Task[Solved]) -> None:
        self._given_up.discard(solving)
        if not solving.cancelled():
            solving.exception()  # known: what an attempt that was given up still says counts for nothing

    async def sees(self, path: Path) -> bool:
        """Whether this worker's node has the run directory of the driver, and not one of its own."""
        return await asyncio.to_thread(path.exists)

    async def close(self) -> None:
        await self._solver.close()
        await asyncio.to_thread(self._log.close)
        await asyncio.to_thread(self._pulse.close)

    def _base(self, item: WorkItem) -> Event:
        return Event(
            kind="attempt",
            t_start=0.0,
            run_id=self._options.run_id,
            epoch=self._options.epoch,
            rollout_key=item.task.rollout_key,
            judge_key=item.task.judge_key,
            task_id=item.task.task_id,
            trial=item.trial,
            attempt=item.attempt,
            category=item.task.category,
            answer_type=item.task.answer_type,
            worker=self._name,
        )


def _result(item: WorkItem, journal: Journal, solved: Solved) -> TaskResult:
    is_owed = solved.verdict is None
    return replace(
        unfinished(item, journal),
        outcome="owed" if is_owed else "ok",
        prediction=solved.prediction,
        verdict=solved.verdict,
        error_kind="judge" if is_owed else None,
        error=solved.owed,
    )


def _broken(item: WorkItem, journal: Journal, error: Exception) -> TaskResult:
    kind = kind_of(error)
    message = str(error) if isinstance(error, EvalError) else f"{type(error).__name__}: {error}"
    outcome: Outcome = "limited" if kind == "limit" else "failed"
    return replace(unfinished(item, journal), outcome=outcome, error_kind=kind, error=message[:2000])


def unfinished(item: WorkItem, journal: Journal | None = None) -> TaskResult:
    """The result of an attempt before anything is known of its end; without a journal, of none at all."""
    task = item.task
    result = TaskResult(
        task_id=task.task_id,
        rollout_key=task.rollout_key,
        judge_key=task.judge_key,
        trial=item.trial,
        attempt=item.attempt,
        outcome="failed",
        category=task.category,
        answer_type=task.answer_type,
    )
    if journal is None:
        return result
    return replace(
        result,
        turns=journal.turn + 1,
        model_calls=journal.live_model_calls,
        replayed_calls=journal.replayed,
        usage=journal.usage,
        cost_usd=journal.cost_usd,
        duration_s=journal.elapsed_s,
    )


def is_retryable(result: TaskResult) -> bool:
    """Whether another attempt may mend it: infrastructure broke, in the rollout or in the judge."""
    return result.error_kind == "infrastructure" or result.outcome == "owed"


def worker_name(index: int) -> str:
    return f"w{index:03d}"
