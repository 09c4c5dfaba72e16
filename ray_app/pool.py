"""The worker actors of a run: who runs what, who is dead or stopped, and which task may be to blame.

When a worker dies, any of its tasks may have killed it. They run again in ever smaller company: a task that
was there at one death shares a worker with few, one that was there at two runs alone. So after three deaths
the guilty task is known, and no innocent one was given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from ray_app import pulse, route_limits
from ray_app.checkpoint import CheckpointClient
from ray_app.errors import ConfigError, InfrastructureError
from ray_app.governor import Governor
from ray_app.options import Options
from ray_app.planning import Key, WorkItem
from ray_app.quotas import Grant, WorkerReport
from ray_app.worker import Report, SolverFactory, Worker, unfinished

CLOSE_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 180.0
BEAT_S = 1.0
# Logical cores: workers wait on the network, so many fit on a core.
WORKER_CPUS = 0.05
# By the deaths that a task was there at: how many tasks may share its worker (0: any number).
COMPANY = (0, 64, 1)
# Workers for such suspects at once: this many for each ordinary one, within these bounds.
SUSPECT_WORKERS, FEWEST_SUSPECT_WORKERS, MOST_SUSPECT_WORKERS = 2, 4, 8
# What Ray says of a worker whose constructor raised.
NOT_MADE = "creation task"
# A worker that dies before it has said a word is made so often.
STARTS = 5
# Workers that died, and not their nodes, one after the other without one attempt that came to an end.
DEATHS_IN_A_ROW = 20


class WorkerLost(Exception):
    """The worker of an attempt is gone.

    `is_suspect`: it died or hung, and not its node, so that a task of it may have been the cause;
    `was_alone`: this was its only task.
    """

    def __init__(self, reason: str, *, is_suspect: bool, was_alone: bool) -> None:
        super().__init__(reason)
        self.is_suspect, self.was_alone = is_suspect, was_alone


@dataclass(eq=False)
class _Seat:
    """One worker actor. `company` is the most tasks that it may hold (0: any number)."""

    name: str
    actor: Any
    company: int
    lost: asyncio.Future[WorkerLost]
    node: str = ""
    tasks: dict[Key, WorkItem] = field(default_factory=dict)
    exchange: asyncio.Future[WorkerReport] | None = None
    missed: int = 0

    @property
    def has_room(self) -> bool:
        return not self.company or len(self.tasks) < self.company

    def begin_exchange(self, grant: Grant) -> None:
        self.exchange, self.missed = asyncio.ensure_future(self.actor.exchange.remote(grant)), 0
        _forget(self.exchange)


class WorkerPool:
    """Runs attempts on workers; replaces those that died or answer no more. For one event loop."""

    def __init__(
        self,
        make_solver: SolverFactory,
        options: Options,
        checkpoint: CheckpointClient,
        governor: Governor | None = None,
    ) -> None:
        self._make_solver, self._options, self._checkpoint = make_solver, options, checkpoint
        self._governor = governor or Governor(workers=options.workers)
        self._made = self._deaths_in_a_row = 0
        self._given_up_by: dict[Key, _Seat] = {}
        self._waiting: list[asyncio.Future[None]] = []  # for a place
        self._seats: list[_Seat] = []
        for _ in range(options.workers):
            self._start(company=COMPANY[0])
        self._beating: asyncio.Task[None] | None = None

    def _start(self, company: int) -> _Seat:
        self._made += 1
        name = f"w{self._made:03d}"
        actor = (
            ray.remote(Worker)
            .options(num_cpus=WORKER_CPUS, max_concurrency=10_000, scheduling_strategy="SPREAD")
            .remote(self._make_solver, self._options, name, self._checkpoint.actor)
        )
        seat = _Seat(name, actor, company, asyncio.get_running_loop().create_future())
        # Before its first task, which may hold its event loop at once.
        seat.begin_exchange(self._governor.grant(name))
        _forget(seat.lost)
        self._seats.append(seat)
        return seat

    async def ready(self) -> None:
        """Wait for the workers, each of which must see the run's lease.

        Raises ConfigError where one cannot start or has another disk.
        """
        opening = [asyncio.create_task(self._open(seat)) for seat in list(self._seats)]
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                sees = await asyncio.gather(*opening)
        except TimeoutError:
            raise ConfigError(
                f"workers: {len(self._seats)} actors of {WORKER_CPUS} CPUs did not start in "
                f"{READY_TIMEOUT_S:g} s; free resources of the cluster (`ray status`) or lower `workers`"
            ) from None
        except RayError as error:
            raise InfrastructureError(f"a worker cannot start: {last_line(error)}") from None
        finally:
            for task in opening:
                task.cancel()
        if not all(sees):
            raise ConfigError(
                f"run directory {self._options.run_dir}: not there on every node; put TOOLORCH_HOME or "
                "--run-dir on a folder that all nodes share, or on s3://"
            )
        self._beating = asyncio.create_task(self._beat())

    async def _open(self, seat: _Seat) -> bool:
        """Whether the worker sees the lease, once it answers; another in its place where it, or its node,
        dies before. Raises RayError where workers cannot be made."""
        starts = 1
        while True:
            try:
                sees = await seat.actor.sees_lease.remote()
                if seat.exchange is not None:
                    seat.node = (await asyncio.shield(seat.exchange)).node
                return bool(sees)
            except RayError as error:
                if starts == STARTS or _is_refusal(error):
                    raise
                starts += 1
                self._seats.remove(seat)
                self._governor.lose(seat.name)
                _end(seat)
                # It may have begun to tell of itself: nobody is to look for it.
                run_dir, epoch = self._options.run_dir, self._options.epoch
                await asyncio.to_thread(pulse.mark_lost, run_dir, seat.name, epoch)
                seat = self._start(COMPANY[0])

    def grant(self) -> None:
        """Tell every worker now what it may do: it hears of it before a task that is given to it later."""
        for seat in self._seats:
            self._exchange(seat)

    async def solve(self, item: WorkItem, deaths: int) -> Report:
        """The report of one attempt of a task that was there at `deaths` deaths of workers.

        Raises WorkerLost when its worker died or answers no more; what the worker had committed is in the
        log by then. Raises InfrastructureError when one worker after the other dies.
        """
        seat = await self._take_seat(item, deaths)
        reference = seat.actor.solve.remote(item)
        answer = asyncio.ensure_future(reference)
        try:
            await asyncio.wait({answer, seat.lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise _again(seat.lost.result())
            report = self._heard(item, answer)
            if report.is_given_up:
                self._given_up_by[item.key] = seat
                await self._checkpoint.fence({item.key: item.attempt})
            return report
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayError as error:  # its death has many names: killed, out of memory, never started
            await self._lose(seat, f"worker lost: {last_line(error)}", error)
            raise _again(seat.lost.result()) from None
        finally:
            _forget(answer)
            await self._leave(seat, item)

    def _heard(self, item: WorkItem, answer: asyncio.Future[Report]) -> Report:
        """The report of a worker that lives; an exception that it raised is a failed attempt."""
        try:
            report = answer.result()
        except RayTaskError as error:
            failed = replace(unfinished(item), error_kind="infrastructure", error=last_line(error))
            report = Report(failed)
        self._deaths_in_a_row = 0
        return report

    async def close(self) -> None:
        """Let every worker flush and leave; one that does not within CLOSE_TIMEOUT_S is killed."""
        if self._beating is not None:
            self._beating.cancel()
        closing = [asyncio.ensure_future(seat.actor.close.remote()) for seat in self._seats]
        if closing:
            await asyncio.wait(closing, timeout=CLOSE_TIMEOUT_S)
        for task in closing:
            _forget(task)
        for seat in self._seats:
            _end(seat)

    async def _take_seat(self, item: WorkItem, deaths: int) -> _Seat:
        """A place for `item`: the least busy ordinary worker, or one that suspects share."""
        company = COMPANY[min(deaths, len(COMPANY) - 1)]
        while (seat := self._find(item, company)) is None:
            room = asyncio.get_running_loop().create_future()
            self._waiting.append(room)
            await room
        seat.tasks[item.key] = item
        return seat

    def _find(self, item: WorkItem, company: int) -> _Seat | None:
        seats = [seat for seat in self._seats if seat.company == company and seat.has_room]
        # Not the one that an earlier attempt may still hold, where there is another.
        seats = [seat for seat in seats if seat is not self._given_up_by.get(item.key)] or seats
        if company == 0:
            # One that starts may never do so, and would draw all tasks, being the least busy.
            seats = [seat for seat in seats if seat.node] or seats
            return min(seats, key=lambda seat: len(seat.tasks))
        # Spread over several at once: a death then leaves a quarter of them under suspicion.
        most = max(FEWEST_SUSPECT_WORKERS, SUSPECT_WORKERS * self._options.workers)
        most = min(most, MOST_SUSPECT_WORKERS)
        if sum(seat.company > 0 for seat in self._seats) < most:
            return self._start(company)
        return min(seats, key=lambda seat: len(seat.tasks), default=None)

    async def _leave(self, seat: _Seat, item: WorkItem) -> None:
        seat.tasks.pop(item.key, None)
        is_over = bool(seat.company and not seat.tasks and seat in self._seats)
        if is_over:
            self._seats.remove(seat)
            self._governor.lose(seat.name)
        waiting, self._waiting = self._waiting, []
        for room in waiting:
            if not room.done():
                room.set_result(None)
        if is_over:
            await self._dismiss(seat)
            await self._settle(seat)

    async def _dismiss(self, seat: _Seat) -> None:
        """A worker for suspects that has no more of them: flushed, and away."""
        closing = asyncio.ensure_future(seat.actor.close.remote())
        try:
            await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_S)
        finally:
            _forget(closing)
            _end(seat)

    async def _settle(self, seat: _Seat) -> None:
        """Its last report is up to two seconds older than its last call, which is in the log by now."""
        if not self._governor.counts_money:
            return
        prefix = self._options.writer_prefix(seat.name)
        # What cannot be read stays as it was told: a sum is no reason to end a run. DuckDB has errors of its
        # own for those of a disk that it meets.
        with suppress(Exception):
            spent_usd = await asyncio.to_thread(route_limits.spent_usd, self._options.run_dir, prefix)
            self._governor.settle(seat.name, spent_usd)

    async def _lose(self, seat: _Seat, reason: str, error: Exception | None = None) -> None:
        """Once for each lost worker: end it for sure, replace it, have its tail written, tell its tasks."""
        if seat not in self._seats:
            await asyncio.wait({seat.lost})
            return
        self._seats.remove(seat)
        self._governor.lose(seat.name)
        tasks = dict(seat.tasks)
        try:
            is_node = _node_is_dead(seat.node, error)
            self._deaths_in_a_row += not is_node
            _end(seat)  # what is out of reach for a moment only would go on spending
            if not seat.company:
                self._start(company=0)
            # A disk that stands still must hold up nobody else.
            await asyncio.to_thread(pulse.mark_lost, self._options.run_dir, seat.name, self._options.epoch)
            fences: Mapping[Key, int] = {key: item.attempt for key, item in tasks.items()}
            await self._checkpoint.release(self._options.writer_prefix(seat.name), fences)
        except BaseException as broken:  # nobody may wait for what does not come
            cancelled = isinstance(broken, asyncio.CancelledError)
            seat.lost.set_exception(InfrastructureError("stopped") if cancelled else broken)
            raise
        is_suspect = not is_node and NOT_MADE not in reason
        seat.lost.set_result(WorkerLost(reason, is_suspect=is_suspect, was_alone=len(tasks) == 1))
        await self._settle(seat)
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise InfrastructureError(
                f"{self._deaths_in_a_row} workers died one after the other without finishing anything, the "
                f"last with: {reason}; stopped here, the same command goes on"
            )

    def _exchange(self, seat: _Seat) -> Exception | None:
        """Takes the last report, if it is there, and asks for the next; an error ends the worker."""
        last = seat.exchange
        if last is None or not last.done():
            return None
        error = None if last.cancelled() else last.exception()
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):
            known: Exception = error
            return known
        if error is None and not last.cancelled():
            seat.node = last.result().node
            self._governor.hear(seat.name, last.result())
        seat.begin_exchange(self._governor.grant(seat.name))
        return None

    async def _beat(self) -> None:
        """Tells every worker what it may do and hears what it did, which is its sign of life too. Counted in
        beats of this loop: time in which the driver itself was stopped says nothing of a worker."""
        beat_s = min(BEAT_S, self._options.worker_lease_s / 2)
        lease, start = (
            max(2, round(span / beat_s)) for span in (self._options.worker_lease_s, READY_TIMEOUT_S)
        )
        losing: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(beat_s)
            for seat in list(self._seats):
                error = self._exchange(seat)
                seat.missed += 1
                if error is None and seat.missed < (lease if seat.node else start):
                    continue
                reason = (
                    f"worker lost: {last_line(error)}"
                    if error
                    else f"worker hung for {seat.missed * beat_s:g} s"
                )
                task = asyncio.create_task(self._lose(seat, reason, error))
                losing.add(task)
                task.add_done_callback(losing.discard)
                task.add_done_callback(_forget)


def _end(seat: _Seat) -> None:
    ray.kill(seat.actor)


def _again(lost: WorkerLost) -> WorkerLost:
    """An exception of its own for each task that waits."""
    return WorkerLost(str(lost), is_suspect=lost.is_suspect, was_alone=lost.was_alone)


def _node_is_dead(node: str, error: Exception | None) -> bool:
    # Of a process that died alone its raylet tells at once: where no word comes, the raylet is gone too.
    if isinstance(error, ActorUnavailableError) or (error is not None and "node has died" in str(error)):
        return True
    return any(item["NodeID"] == node and not item["Alive"] for item in ray.nodes())


def _is_refusal(error: RayError) -> bool:
    """A worker that says why it does not start would say so again."""
    return isinstance(error, RayTaskError) or NOT_MADE in str(error)


def _forget(future: asyncio.Future[Any]) -> None:
    """Its exception is known, or of no interest."""
    if future.done() and not future.cancelled():
        future.exception()
    elif not future.done():
        future.add_done_callback(_forget)


def last_line(error: Exception) -> str:
    """The end of Ray's message, where the cause stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[-500:]
