"""From a plan to committed results: the bounded fan-out, the attempts at a task, the commits.

Only a result row that the driver commits counts; everything a worker writes is evidence. At every
moment `planned = ok + failed + limited + owed + pending`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from ray_app import steady
from ray_app.checkpoint import CheckpointClient, connect
from ray_app.errors import InfrastructureError, StorageError
from ray_app.event_writer import EventWriter
from ray_app.governor import Governor
from ray_app.journal import EventSink, Record
from ray_app.lease import Lease, Unconfirmed
from ray_app.options import Options
from ray_app.planning import RUN_AGAIN, Key, Plan, Tally, WorkItem
from ray_app.pool import WorkerLost, WorkerPool
from ray_app.recorded import Recorder
from ray_app.recording import Readahead
from ray_app.records import Event, TaskResult
from ray_app.sharing import Sharing
from ray_app.worker import SolverFactory, is_retryable, unfinished

RETRY_PAUSE_S = 1.0
STORAGE_RETRY_S = 0.25
TICK_S = 1.0
# A task that was there when so many workers died, and alone with the last, is not tried again.
DEATHS = 3


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
    governor: Governor | None = None,
) -> Tally:
    """Solve `work` with at most `options.concurrency` tasks in flight; commit each result once.

    Setting `stop` ends it cleanly: what is in flight is cancelled and stays pending for the resume. So does
    reaching the spending limit of `governor`, once the calls that were out have ended.
    Raises StorageError when another driver has taken the run or the log cannot be written.
    """
    governor = governor or Governor(workers=options.workers)
    # First, as it takes as long to start as the workers do.
    sharing = Sharing(governor, options.url or str(options.run_dir)) if governor.is_shared else None
    checkpoint = await connect(options)
    pool = WorkerPool(make_solver, options, checkpoint, governor)
    attempts = Attempts(pool, _records(work, options), options)
    tally = replace(work.kept, counts=dict(work.kept.counts))
    commits = Commits(options, log, lease, checkpoint, watcher, tally, stop)
    waiting = iter(work.items)
    active: set[asyncio.Task[TaskResult]] = set()
    stopped = asyncio.ensure_future(stop.wait())
    is_ours = True
    try:
        await _or_stopped(pool.ready(), stopped)
        if sharing is not None:
            await _or_stopped(sharing.joined(), stopped)
            pool.grant()  # what other runs leave, before the first call
        while not stop.is_set():
            # What is not counted yet holds its place, or storage that is slow would fill the memory.
            while (
                is_ours
                and governor.may_spend
                and len(active) + commits.uncounted < options.concurrency
                and (item := next(waiting, None)) is not None
            ):
                watcher.started(item)
                active.add(asyncio.create_task(attempts.run(item)))
            if not active and not commits.uncounted:
                break
            busy = commits.under_way()
            done, _ = await asyncio.wait(
                active | busy | {stopped}, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED
            )
            watcher.tick()
            for change in governor.tick():
                log.append(replace(change, run_id=options.run_id, epoch=options.epoch))
            if governor.is_spent_out:
                stop.set()
            # A driver that was replaced must stop spending, not only stop committing.
            is_ours = commits.is_ours()
            ended = active & done
            active -= ended
            commits.add([task.result() for task in ended])
        await commits.settled()
    finally:
        stopped.cancel()
        for task in active:
            task.cancel()
        await asyncio.gather(*active, return_exceptions=True)
        await pool.close()
        if sharing is not None:
            await sharing.close()
        await checkpoint.close()
    return tally


class Records(Protocol):
    """Gives the record of a task; `recorded.Recorder` of a run that is resumed."""

    async def before(self, key: Key) -> Record: ...

    async def now(self, key: Key) -> Record: ...


def _records(work: Plan, options: Options) -> Records:
    if options.replays is not None:
        return Readahead(options.replays, [item.key for item in work.items])
    return Recorder(options.run_dir, options.storage_patience_s)


async def _or_stopped(work: Coroutine[Any, Any, None], stopped: asyncio.Future[Any]) -> None:
    """Waits for `work`, but not when the run is stopped."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True)
class Attempts:
    """One task after the other attempt, until infrastructure breaks none or too many."""

    pool: WorkerPool
    recorder: Records
    options: Options

    async def run(self, item: WorkItem) -> TaskResult:
        """The result of the first attempt that infrastructure does not break, or of the last one."""
        failures = deaths = 0
        record = self.recorder.before
        while True:
            item = replace(item, record=await record(item.key))
            try:
                report = await self.pool.solve(item, deaths)
            except WorkerLost as lost:
                deaths += lost.is_suspect
                if lost.was_alone and deaths >= DEATHS:
                    return _isolated(item, deaths, lost)
            else:
                failures += 1
                if not is_retryable(report.result) or failures >= self.options.attempts:
                    return report.result
                await asyncio.sleep(RETRY_PAUSE_S * 2**failures * random.uniform(0.25, 0.75))
            item, record = replace(item, attempt=item.attempt + 1), self.recorder.now


def _isolated(item: WorkItem, deaths: int, lost: WorkerLost) -> TaskResult:
    error = f"isolated: {deaths} workers died with this task, the last while it ran alone ({lost})"
    return replace(unfinished(item), error_kind="infrastructure", error=error)


@dataclass
class Commits:
    """The results on their way to the log: written durably in groups, then counted, each once."""

    options: Options
    log: EventWriter
    lease: Lease
    checkpoint: CheckpointClient
    watcher: Watcher
    tally: Tally
    stop: asyncio.Event
    uncounted: int = 0
    _waiting: list[TaskResult] = field(default_factory=list)
    _writing: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._breaker = Breaker(self.options.give_up_after)

    def add(self, results: Sequence[TaskResult]) -> None:
        self._waiting += results
        self.uncounted += len(results)

    def under_way(self) -> set[asyncio.Task[Any]]:
        """The group that is being written, for those who wait. Raises what broke the last one."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()
        if self._writing is None and self._waiting:
            group, self._waiting = self._waiting, []
            self._writing = asyncio.create_task(self._commit(group))
        return set() if self._writing is None else {self._writing}

    async def settled(self) -> None:
        """Returns when all that was added is counted, however the run was stopped."""
        while under_way := self.under_way():
            await asyncio.wait(under_way)

    async def _commit(self, group: Sequence[TaskResult]) -> None:
        """Refused once another driver has the run, or once a task has a newer attempt."""
        while not self.is_ours():  # noqa: ASYNC110  (nothing tells when storage works again)
            await asyncio.sleep(STORAGE_RETRY_S)
        refused = await self.checkpoint.finish({(r.rollout_key, r.trial): r.attempt for r in group})
        accepted = [r for r in group if (r.rollout_key, r.trial) not in refused]
        for result in accepted:
            self.log.append(result_event(result, self.options, self.log))
        await self._stored()
        for result in accepted:
            self.tally.counts[result.outcome] += 1
            self.watcher.committed(result, self.tally)
        self.uncounted -= len(group)
        self._breaker.follow(accepted)

    async def _stored(self) -> None:
        """Storage that fails for a while is waited for: what was paid for is not thrown away."""
        while True:
            try:
                return await asyncio.to_thread(self.log.flush)
            except StorageError:
                self.is_ours()  # or nothing is to be waited for
                if self.log.failing_s > self._patience_s:
                    raise
                await asyncio.sleep(STORAGE_RETRY_S)

    @property
    def _patience_s(self) -> float:
        """A run that is stopped has to be gone in 10 s."""
        return min(self.options.storage_patience_s, 2.0 if self.stop.is_set() else math.inf)

    def is_ours(self) -> bool:
        """Whether the lease is known to hold; False while storage that fails leaves it open.

        Raises StorageError when another driver has the run, or when it stays open for too long.
        """
        try:
            self.lease.check()
        except Unconfirmed:
            if self.lease.unconfirmed_s > self._patience_s:
                raise
            return False
        return True


def result_event(result: TaskResult, options: Options, sink: EventSink) -> Event:
    """The commit record of a result; the prediction and the verdict's words are in its payload."""
    verdict = result.verdict
    body = {"prediction": result.prediction, "verdict": asdict(verdict) if verdict else None}
    return Event(
        kind="result",
        t_start=steady.now(),
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
