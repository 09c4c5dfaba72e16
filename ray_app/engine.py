"""From a plan to committed results: the pool of workers, the bounded fan-out, the commits.

Only a result row that the driver commits counts; everything a worker writes is evidence. At every
moment `planned = ok + failed + limited + owed + pending`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, TaskCancelledError

from ray_app import pulse
from ray_app.errors import ConfigError, InfrastructureError
from ray_app.event_writer import EventWriter
from ray_app.journal import EventSink
from ray_app.lease import Lease
from ray_app.planning import RUN_AGAIN, Key, Plan, Tally, WorkItem, recorded_calls
from ray_app.records import Event, TaskResult
from ray_app.worker import Options, Report, SolverFactory, Worker, is_retryable, unfinished, worker_name

RETRY_PAUSE_S = 1.0
CLOSE_TIMEOUT_S = 5.0
TICK_S = 1.0
READY_TIMEOUT_S = 180.0
# Logical cores: workers wait on the network, so many fit on a core.
WORKER_CPUS = 0.05


class WorkerPool:
    """The worker actors; a dead one is replaced, and its tasks run again elsewhere."""

    def __init__(self, make_solver: SolverFactory, options: Options) -> None:
        self._make_solver, self._options = make_solver, options
        self._made = 0
        self._names: dict[Any, str] = {}
        self._given_up_by: dict[Key, Any] = {}
        self._busy: dict[Any, int] = {self._start(): 0 for _ in range(options.workers)}

    def _start(self) -> Any:
        self._made += 1
        actor = ray.remote(Worker).options(
            num_cpus=WORKER_CPUS, max_concurrency=10_000, scheduling_strategy="SPREAD"
        )
        worker = actor.remote(self._make_solver, self._options, self._made)
        self._names[worker] = worker_name(self._made)
        return worker

    def _choose(self, key: Key) -> Any:
        """The least busy worker, but for the one that this task may still hang in."""
        others = [worker for worker in self._busy if worker is not self._given_up_by.get(key)]
        return min(others or self._busy, key=lambda worker: self._busy[worker])

    async def ready(self, lease_path: Path) -> None:
        """Wait for the workers. Raises ConfigError where one cannot start or has another disk."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                seen = await asyncio.gather(*(worker.sees.remote(lease_path) for worker in self._busy))
        except TimeoutError:
            raise ConfigError(
                f"workers: {len(self._busy)} actors of {WORKER_CPUS} CPUs did not start in "
                f"{READY_TIMEOUT_S:g} s; free resources of the cluster (`ray status`) or lower `workers`"
            ) from None
        except RayError as error:
            raise InfrastructureError(f"a worker cannot start: {_last_line(error)}") from None
        if not all(seen):
            raise ConfigError(
                f"run directory {self._options.run_dir}: not there on every node; put TOOLORCH_HOME or "
                "--run-dir on a folder that all nodes share"
            )

    async def solve(self, item: WorkItem) -> Report:
        """The report of one attempt. Raises RayActorError when its worker died."""
        worker = self._choose(item.key)
        self._busy[worker] += 1
        reference = worker.solve.remote(item)
        try:
            report: Report = await reference
            if report.is_given_up:
                self._given_up_by[item.key] = worker
            return report
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayActorError:
            if self._busy.pop(worker, None) is not None:
                self._busy[self._start()] = 0
                pulse.mark_lost(self._options.run_dir, self._names.pop(worker), self._options.epoch)
            raise
        finally:
            if worker in self._busy:
                self._busy[worker] -= 1

    async def close(self) -> None:
        """Let every worker flush and leave; one that does not within CLOSE_TIMEOUT_S is killed."""
        closing = [asyncio.ensure_future(worker.close.remote()) for worker in self._busy]
        if closing:
            await asyncio.wait(closing, timeout=CLOSE_TIMEOUT_S)
        for task in closing:
            if task.done() and not task.cancelled():
                task.exception()
        for worker in self._busy:
            ray.kill(worker)


@dataclass
class Breaker:
    """Ends a run in which nothing but infrastructure failures comes back: they would only cost time."""

    limit: int
    in_a_row: int = 0

    def follow(self, results: Iterable[TaskResult]) -> None:
        """Raises InfrastructureError, with the last reason, after `limit` failures in a row."""
        for result in results:
            is_broken = result.outcome == "failed" and result.error_kind in RUN_AGAIN
            self.in_a_row = self.in_a_row + 1 if is_broken else 0
            if self.in_a_row >= self.limit:
                raise InfrastructureError(
                    f"{self.in_a_row} tasks in a row failed, the last with: {result.error}; stopped here, "
                    "the same command goes on"
                )


class Watcher(Protocol):
    """Is told of every start and every committed result (the progress display)."""

    def started(self, item: WorkItem) -> None: ...

    def committed(self, result: TaskResult, tally: Tally) -> None: ...

    def tick(self) -> None: ...


async def run(
    work: Plan,
    make_solver: SolverFactory,
    options: Options,
    *,
    log: EventWriter,
    lease: Lease,
    watcher: Watcher,
    stop: asyncio.Event,
) -> Tally:
    """Solve `work` with at most `options.concurrency` tasks in flight; commit each result once.

    Setting `stop` ends it cleanly: what is in flight is cancelled and stays pending for the resume.
    Raises StorageError when another driver has taken the run or the log cannot be written.
    """
    pool = WorkerPool(make_solver, options)
    breaker = Breaker(options.give_up_after)
    tally = replace(work.kept, counts=dict(work.kept.counts))
    waiting = iter(work.items)
    active: set[asyncio.Task[TaskResult]] = set()
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await pool.ready(lease.path)
        while not stop.is_set():
            while len(active) < options.concurrency and (item := next(waiting, None)) is not None:
                watcher.started(item)
                active.add(asyncio.create_task(_attempts(item, pool, options)))
            if not active:
                break
            done, _ = await asyncio.wait(
                active | {stopped}, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED
            )
            watcher.tick()
            lease.check()  # a driver that was replaced must stop spending, not only stop committing
            ended = {task for task in active if task in done}
            active -= ended
            finished = [task.result() for task in ended]
            if finished:
                await _commit(finished, tally, options, log=log, lease=lease, watcher=watcher)
                breaker.follow(finished)
    finally:
        stopped.cancel()
        for task in active:
            task.cancel()
        await asyncio.gather(*active, return_exceptions=True)
        await pool.close()
    return tally


async def _attempts(item: WorkItem, pool: WorkerPool, options: Options) -> TaskResult:
    """The result of the first attempt that infrastructure does not break, or of the last one."""
    last = item.attempt + options.attempts - 1
    while True:
        try:
            report = await pool.solve(item)
        except (RayError, TaskCancelledError) as error:
            # The worker's death loses its memory, not its log: what it flushed is not asked again.
            recorded = await asyncio.to_thread(recorded_calls, options.run_dir, {item.key})
            report = Report(_lost(item, error), recorded.get(item.key, ()))
        if not is_retryable(report.result) or item.attempt >= last:
            return report.result
        pause_s = RETRY_PAUSE_S * 2 ** (item.attempt % options.attempts) * random.uniform(0.5, 1.5)
        await asyncio.sleep(pause_s)
        item = replace(item, attempt=item.attempt + 1, recorded=report.calls)


def _lost(item: WorkItem, error: Exception) -> TaskResult:
    return replace(unfinished(item), error_kind="infrastructure", error=f"worker lost: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    """The end of Ray's message, where the cause stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[-500:]


async def _commit(
    results: Sequence[TaskResult],
    tally: Tally,
    options: Options,
    *,
    log: EventWriter,
    lease: Lease,
    watcher: Watcher,
) -> None:
    """Write the result rows, durably, then count them; refused once another driver has the run."""
    lease.check()
    for result in results:
        log.append(result_event(result, options, log))
    await asyncio.to_thread(log.flush)
    for result in results:
        tally.counts[result.outcome] += 1
        watcher.committed(result, tally)


def result_event(result: TaskResult, options: Options, sink: EventSink) -> Event:
    """The commit record of a result; the prediction and the verdict's words are in its payload."""
    verdict = result.verdict
    body = {"prediction": result.prediction, "verdict": asdict(verdict) if verdict else None}
    return Event(
        kind="result",
        t_start=time.time(),
        duration_s=result.duration_s,
        run_id=options.run_id,
        epoch=options.epoch,
        rollout_key=result.rollout_key,
        judge_key=result.judge_key,
        task_id=result.task_id,
        trial=result.trial,
        attempt=result.attempt,
        turn=result.turns,
        outcome=result.outcome,
        status="error" if result.outcome == "failed" else "ok",
        error_kind=result.error_kind,
        error=result.error,
        is_correct=verdict.is_correct if verdict else None,
        verdict_method=verdict.method if verdict else "",
        confidence=verdict.confidence if verdict else None,
        model=verdict.judge_model if verdict else "",
        prompt_tokens=result.usage.prompt_tokens,
        cached_tokens=result.usage.cached_tokens,
        completion_tokens=result.usage.completion_tokens,
        cost_usd=result.cost_usd,
        category=result.category,
        answer_type=result.answer_type,
        payload_hash=sink.payload(json.dumps(body, ensure_ascii=False)),
        detail=json.dumps({"model_calls": result.model_calls, "replayed_calls": result.replayed_calls}),
    )
