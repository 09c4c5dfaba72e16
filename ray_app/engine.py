"""From tasks to committed results: the plan, the worker actors, the bounded fan-out.

Names no benchmark: a solver factory comes from the job. Only a result row that the driver commits
counts; everything a worker writes is evidence. At every moment
`planned = ok + failed + limited + owed + pending`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, TaskCancelledError

from ray_app import events, pulse
from ray_app.errors import ConfigError, EvalError, InfrastructureError, kind_of
from ray_app.event_writer import EventWriter
from ray_app.journal import EventSink, Journal, RecordedCall
from ray_app.lease import Lease
from ray_app.pulse import Pulse
from ray_app.records import Event, Outcome, Task, TaskResult, Verdict

CALL_KINDS = ("model_call", "retrieval", "code")
RETRY_PAUSE_S = 1.0
# Failures that say nothing of the model: mended by time, or by the user.
RUN_AGAIN = ("infrastructure", "user")
CLOSE_TIMEOUT_S = 5.0
TICK_S = 1.0
READY_TIMEOUT_S = 180.0
# Logical cores: workers wait on the network, so many fit on a core.
WORKER_CPUS = 0.05


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
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One attempt at one trial of a task, with the calls that earlier attempts completed."""

    task: Task
    trial: int
    attempt: int = 1
    recorded: tuple[RecordedCall, ...] = ()

    @property
    def key(self) -> Key:
        return (self.task.rollout_key, self.trial)


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


@dataclass
class Tally:
    """The accounting identity, kept as results are committed."""

    planned: int
    counts: dict[Outcome, int] = field(
        default_factory=lambda: {"ok": 0, "failed": 0, "limited": 0, "owed": 0}
    )

    @property
    def pending(self) -> int:
        return self.planned - sum(self.counts.values())

    def line(self) -> str:
        parts = " + ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{self.planned} planned = {parts} + {self.pending} pending"


@dataclass(frozen=True)
class Plan:
    """What is left to do, and what the log already counts."""

    items: tuple[WorkItem, ...]
    kept: Tally

    @property
    def skipped(self) -> int:
        return self.kept.planned - len(self.items)


def plan(
    tasks: Sequence[Task], trials: int, results: Iterable[Mapping[str, Any]], *, retry_failed: bool = False
) -> Plan:
    """The work that the counted `results` leave: infrastructure failures and owed verdicts run again.

    A result judged against another reference answer is judged again; its rollout is not repeated.
    """
    counted = {(row["rollout_key"], row["trial"]): row for row in results}
    kept = Tally(len(tasks) * trials)
    items = []
    for trial in range(trials):
        for task in tasks:
            row = counted.get((task.rollout_key, trial))
            if row is not None and _is_final(row, task, retry_failed):
                kept.counts[row["outcome"]] += 1
            else:
                items.append(WorkItem(task, trial, attempt=1 + (row["attempt"] if row else 0)))
    return Plan(tuple(items), kept)


def _is_final(row: Mapping[str, Any], task: Task, retry_failed: bool) -> bool:
    if row["outcome"] == "failed":
        return bool(row["error_kind"] not in RUN_AGAIN and not retry_failed)
    is_judged = row["outcome"] == "ok" and row["judge_key"] == task.judge_key
    return bool(is_judged or row["outcome"] == "limited")


def recorded_calls(run_dir: Path, keys: Collection[Key]) -> dict[Key, tuple[RecordedCall, ...]]:
    """The completed calls of the given (rollout key, trial) pairs, newest record of each call last."""
    wanted, rows = set(keys), []
    columns = ["kind", "status", "rollout_key", "trial", "call_seq", "request_hash", "payload_hash", "epoch"]
    for batch in events.read(run_dir, columns):
        rows += [
            row
            for row in batch.to_pylist()
            if row["kind"] in CALL_KINDS
            and row["status"] == "ok"
            and (row["rollout_key"], row["trial"]) in wanted
        ]
    rows.sort(key=lambda row: (row["call_seq"], row["epoch"]))
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in rows})
    texts = events.read_payloads(
        run_dir, {item["text"] for row in rows if row["kind"] == "retrieval" for item in _hits(row, bodies)}
    )
    found: dict[Key, list[RecordedCall]] = {}
    for row in rows:
        body = bodies.get(row["payload_hash"])
        if body is None:
            continue  # its payload was lost with its process: the call is made again
        named = {item["text"] for item in _hits(row, bodies)} if row["kind"] == "retrieval" else set()
        if not named <= texts.keys():
            continue
        call = RecordedCall(row["call_seq"], row["request_hash"], body, {name: texts[name] for name in named})
        found.setdefault((row["rollout_key"], row["trial"]), []).append(call)
    return {key: tuple(calls) for key, calls in found.items()}


def _hits(row: Mapping[str, Any], bodies: Mapping[str, str]) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = json.loads(bodies.get(row["payload_hash"], "[]"))
    return hits


def with_recorded_calls(work: Plan, run_dir: Path) -> Plan:
    """`work` with the calls that earlier attempts of its items completed."""
    if not (run_dir / "log").exists():
        return work
    recorded = recorded_calls(run_dir, {item.key for item in work.items})
    items = tuple(replace(item, recorded=recorded.get(item.key, ())) for item in work.items)
    return replace(work, items=items)


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
        _empty_result(item, journal),
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
    return replace(_empty_result(item, journal), outcome=outcome, error_kind=kind, error=message[:2000])


def _empty_result(item: WorkItem, journal: Journal) -> TaskResult:
    task = item.task
    return TaskResult(
        task.task_id,
        task.rollout_key,
        task.judge_key,
        item.trial,
        item.attempt,
        "failed",
        turns=journal.turn + 1,
        model_calls=journal.live_model_calls,
        replayed_calls=journal.replayed,
        usage=journal.usage,
        cost_usd=journal.cost_usd,
        duration_s=journal.elapsed_s,
        category=task.category,
        answer_type=task.answer_type,
    )


def is_retryable(result: TaskResult) -> bool:
    """Whether another attempt may mend it: infrastructure broke, in the rollout or in the judge."""
    return result.error_kind == "infrastructure" or result.outcome == "owed"


def worker_name(index: int) -> str:
    return f"w{index:03d}"


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
    message = f"worker lost: {_last_line(error)}"
    task = item.task
    return TaskResult(
        task.task_id,
        task.rollout_key,
        task.judge_key,
        item.trial,
        item.attempt,
        "failed",
        error_kind="infrastructure",
        error=message,
        category=task.category,
        answer_type=task.answer_type,
    )


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
