"""The worker actor: one process that solves many tasks at once and reports how each attempt ended.

Names no benchmark: a solver comes from the job's factory. What a worker writes is evidence; only what the
driver commits counts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray

from ray_app import lease, pulse, steady, waits
from ray_app.allowance import Allowance
from ray_app.committer import Committer
from ray_app.errors import EvalError, InfrastructureError, StorageError, kind_of
from ray_app.journal import Journal
from ray_app.options import Options
from ray_app.planning import Key, WorkItem
from ray_app.pulse import Pulse
from ray_app.quotas import Grant, WorkerReport
from ray_app.records import Event, Outcome, Task, TaskResult, Verdict
from ray_app.slots import RouteKey, Slots

# No call waits for so long: its place is others' calls, each of which has a deadline.
MOST_WAITED_S = 6 * 3600.0
SHORTEST_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Solved:
    """What a solver makes of a task: a verdict, or the reason why one is still owed."""

    prediction: str
    verdict: Verdict | None = None
    owed: str = ""


class Solver(Protocol):
    """One benchmark's way to solve a task; made once in each worker process.

    One whose model calls can be bounded has `slots()` too: those of each route.
    """

    async def solve(self, task: Task, journal: Journal) -> Solved:
        """Raises LimitReached, ModelError or an InfrastructureError; all else counts as the last."""
        ...

    async def close(self) -> None: ...


SolverFactory = Callable[[], Solver]


@dataclass(frozen=True, slots=True)
class Report:
    """How an attempt ended."""

    result: TaskResult
    is_given_up: bool = False  # its deadline passed and its worker may still be held by it


class Worker:
    """One process with many tasks in flight, its own log stream and its own clients."""

    def __init__(self, make_solver: SolverFactory, options: Options, name: str, checkpoint: Any) -> None:
        pulse.raise_file_limit(options.concurrency)
        self._options = options = options.here()
        steady.agree(options.began)
        node: str = ray.get_runtime_context().get_node_id()
        self._node = node
        self._name = f"{node[:8]}:{os.getpid()}"
        self._committer = Committer(options, name, checkpoint, self._on_refused)
        self._pulse = Pulse(options.run_dir, name, epoch=options.epoch, node=node[:8])
        self._journals: dict[tuple[Key, int], Journal] = {}
        self._given_up: set[asyncio.Task[Solved]] = set()
        self._solver = make_solver()
        slots: Mapping[RouteKey, Slots] = getattr(
            self._solver, "slots", dict
        )()  # a solver without a model client has none
        self._allowance = Allowance(slots, open_calls=lambda: self._pulse.in_flight)

    async def solve(self, item: WorkItem) -> Report:
        """One attempt. Whatever goes wrong is data in the report, never an exception."""
        log = self._committer
        journal = Journal(item.task, log, self._base(item), item.record, watch=self._pulse, keeper=log)
        self._journals[item.key, item.attempt] = journal
        journal.note("attempt")
        try:
            solved = await self._in_time(item.task, journal)
            result = _result(item, journal, solved)
        except Exception as error:
            result = _broken(item, journal, error)
        finally:
            self._journals.pop((item.key, item.attempt), None)
        if result.outcome != "ok" and not self._allowance.may_fail:
            # What ends now may end because the run is about to: it stays pending, and the driver cancels it.
            await asyncio.Event().wait()
        # A result that counts has its evidence in the log: a judge-only pass, say, reads it there.
        try:
            await log.stored()
        except StorageError as error:
            result = _broken(item, journal, error)
        return Report(result, journal.is_closed)

    def _on_refused(self, key: Key, attempt: int) -> None:
        """Of the committer: this attempt is over, so what still runs of it must pay for nothing."""
        if journal := self._journals.get((key, attempt)):
            journal.is_closed = True

    async def _in_time(self, task: Task, journal: Journal) -> Solved:
        """The solver's result. Raises InfrastructureError at the deadline, whatever holds the solver.

        The deadline is of the attempt's own time, but waits that do not end are a hang as well.
        """
        limit_s = self._options.attempt_deadline_s
        waited = waits.begin_attempt()
        if limit_s is None:
            return await self._solver.solve(task, journal)
        solving = asyncio.ensure_future(self._solver.solve(task, journal))
        try:
            done, left_s = set[asyncio.Task[Solved]](), limit_s
            while not done and left_s > 0:
                done, _ = await asyncio.wait({solving}, timeout=max(left_s, SHORTEST_LOOK_S))
                left_s = limit_s + min(waited.total_s, MOST_WAITED_S) - journal.elapsed_s
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

    async def sees_lease(self) -> bool:
        """Whether the driver's run directory is here, and not one of this node's own."""
        newest = await asyncio.to_thread(lease.newest_epoch, self._options.run_dir)
        return newest >= self._options.epoch

    async def exchange(self, grant: Grant) -> WorkerReport:
        """Takes what this worker may do now, tells what it did; answers while its event loop turns."""
        self._committer.allow(may_spend=grant.may_spend)
        self._allowance.spent_usd = self._committer.spent_usd
        return self._allowance.exchange(grant, self._node)

    async def close(self) -> None:
        self._allowance.close()
        try:
            await self._solver.close()
        finally:
            await self._committer.close()
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
        cost_usd=item.record.paid_usd,
    )
    if journal is None:
        return result
    return replace(
        result,
        turns=journal.turn + 1,
        model_calls=journal.live_model_calls,
        replayed_calls=journal.replayed,
        usage=journal.usage,
        cost_usd=journal.paid_usd,
        duration_s=journal.elapsed_s,
    )


def is_retryable(result: TaskResult) -> bool:
    """Whether another attempt may mend it: infrastructure broke, in the rollout or in the judge."""
    return result.error_kind == "infrastructure" or result.outcome == "owed"
