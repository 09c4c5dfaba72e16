"""A judge-only pass: ask another judge about the counted results of a run, beside the first verdicts.

Makes no rollout call and writes no result row. Every call and every verdict carries the pass's label; a
pass that is run again asks only for what is not stored under it. `opinions.py` says what that is.

Needs no Ray cluster: the calls go out from this process, with the run's lease held. Nothing is deployed
here; a judge that is a `service:` of the Serve config must run, and is asked on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_app import events, lease, opinions, rundir
from ray_app.chat import Router, cost
from ray_app.driver import MIN_FAILURES_IN_A_ROW
from ray_app.errors import ConfigError, EvalError, InfrastructureError, StorageError, kind_of
from ray_app.event_writer import EventWriter
from ray_app.journal import Journal
from ray_app.opinions import Item, JudgePass
from ray_app.planning import RUN_AGAIN
from ray_app.preview import ASSUMED_USAGE
from ray_app.progress import LINE_EVERY_S
from ray_app.records import Event, Usage, Verdict
from ray_app.slots import RouteKey, Slots
from ray_app.tools.base import Caller

# What storage has not taken by then would be lost with this process.
STORAGE_PATIENCE_S = 5.0


@dataclass
class Tally:
    """How the verdicts that one command went for ended. `owed`: the judge's reply held none."""

    epoch: int
    planned: int = 0
    judged: int = 0
    owed: int = 0
    failed: int = 0
    last_error: str = ""
    stopped_by: int | None = None

    @property
    def exit_code(self) -> int:
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        return 1 if self.failed else 3 if self.owed else 0

    def line(self) -> str:
        pending = self.planned - self.judged - self.owed - self.failed
        return (
            f"{self.planned} to judge = {self.judged} judged + {self.owed} owed + {self.failed} failed "
            f"+ {pending} pending"
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """Judge calls and US dollars: of one epoch, and of all passes under the label."""

    calls: int
    cost_usd: float
    calls_total: int
    cost_usd_total: float


def carry_out(asked: JudgePass, say: Callable[[str], None]) -> Tally:
    """Ask for every verdict that is not stored yet, holding the run's lease.

    Raises EvalError with one line for the user. SIGINT and SIGTERM end it early; what is stored stays.
    """
    with _owned(asked.job.run_dir) as held:
        left = opinions.plan(asked).left
        if not left:
            say(f"Nothing left to judge under {asked.label!r}. No model is called.")
            return Tally(held.epoch)
        if any(opinions.needs_asking(item, asked) for item in left) and (
            problem := asyncio.run(route_problem(asked))
        ):
            raise ConfigError(problem)
        return asyncio.run(_judge_all(asked, left, held, say))


def spent(asked: JudgePass, epoch: int) -> Spent:
    """What the passes under this label called and paid, failed and unreadable calls included."""
    query = """
        select count(*) filter (epoch = $epoch), coalesce(sum(cost_usd) filter (epoch = $epoch), 0.0),
               count(*), coalesce(sum(cost_usd), 0.0)
        from events where kind = 'model_call' and role = 'judge' and alias = $label
    """
    with events.connect(asked.job.run_dir) as log:
        return Spent(*log.execute(query, {"epoch": epoch, "label": asked.label}).fetchall()[0])


def expected_cost(asked: JudgePass, calls: int) -> float:
    """US dollars of `calls` judge calls, at the mean size of the run's own where it made any."""
    query = """
        select avg(prompt_tokens), avg(completion_tokens) from events
        where kind = 'model_call' and role = 'judge' and status = 'ok'
    """
    with events.connect(asked.job.run_dir) as log:
        prompt, completion = log.execute(query).fetchall()[0]
    usage = ASSUMED_USAGE if prompt is None else Usage(round(prompt), round(completion))
    return calls * cost(usage, asked.job.config.models[asked.judge.model])


async def route_problem(asked: JudgePass) -> str:
    """What is wrong with the judge's endpoint, and what to do; "" when it answers."""
    config = asked.job.config
    name = asked.judge.model
    router = _router(asked)
    try:
        problem = await router.probe(name)
    finally:
        await router.close()
    served = [endpoint.service for endpoint in config.models[name].endpoints if endpoint.service]
    remedy = f"start it with `serve run {config.services}`" if served else f"start it, or mend models.{name}"
    return f"judge model {name}: {problem}; {remedy}" if problem else ""


@contextmanager
def _owned(run_dir: Path) -> Iterator[lease.Lease]:
    try:
        held = lease.take(run_dir)
    except OSError as error:
        raise rundir.unusable(run_dir, error) from None
    try:
        yield held
    except OSError as error:
        name = error.filename or run_dir
        raise StorageError(f"{name}: {error.strerror or error}; what was judged is kept, run again") from None
    finally:
        held.release()


def _router(asked: JudgePass) -> Router:
    """Of the judge's routes alone, so that no key of a rollout model is needed."""
    name = asked.judge.model
    return Router({name: asked.job.config.models[name]}, asked.job.serve_config.urls())


@dataclass
class _Bench:
    """One pass under way: the client, the log, the lease and the count."""

    asked: JudgePass
    caller: Caller
    log: EventWriter
    held: lease.Lease
    tally: Tally
    say: Callable[[str], None]
    in_a_row: int = 0

    async def work(self, waiting: Iterator[Item]) -> None:
        """Judge what `waiting` gives; several of these share one iterator."""
        for item in waiting:
            self.held.check()  # a driver that was replaced must stop spending
            if self.log.failing_s > STORAGE_PATIENCE_S:
                raise StorageError(self.log.failure)
            journal = self._journal(item)
            try:
                verdict = await self._verdict(item, journal)
            except StorageError:
                raise
            except Exception as error:
                self._count(error)
            else:
                self._store(item, journal, verdict)

    async def _verdict(self, item: Item, journal: Journal) -> Verdict:
        return await self.asked.reviewer.verdict(self.caller, journal, item.task, item.subject)

    def _journal(self, item: Item) -> Journal:
        base = Event(
            kind="verdict",
            t_start=0.0,
            run_id=self.asked.job.run_dir.name,
            epoch=self.held.epoch,
            rollout_key=item.task.rollout_key,
            judge_key=item.task.judge_key,
            task_id=item.task.task_id,
            trial=item.trial,
            attempt=item.attempt,
            category=item.task.category,
            answer_type=item.task.answer_type,
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )
        return Journal(item.task, self.log, base, alias=self.asked.label)

    def _store(self, item: Item, journal: Journal, verdict: Verdict) -> None:
        self.held.check()
        journal.note(
            "verdict",
            role="judge",
            is_correct=verdict.is_correct,
            verdict_method=verdict.method,
            confidence=verdict.confidence,
            model=verdict.judge_model,
            request_hash=item.request,
            payload_hash=self.log.payload(json.dumps(asdict(verdict), ensure_ascii=False)),
            detail=json.dumps(self.asked.settings),
        )
        self.tally.judged += 1
        self.in_a_row = 0

    def _count(self, error: Exception) -> None:
        """An endpoint that broke is a failure; a judge that gave no verdict owes one."""
        is_broken = kind_of(error) in RUN_AGAIN
        message = str(error) if isinstance(error, EvalError) else f"{type(error).__name__}: {error}"
        self.tally.failed += is_broken
        self.tally.owed += not is_broken
        self.tally.last_error = message
        self.in_a_row = self.in_a_row + 1 if is_broken else 0
        if self.in_a_row >= max(MIN_FAILURES_IN_A_ROW, self.asked.job.config.concurrency):
            raise InfrastructureError(
                f"{self.in_a_row} judge calls in a row failed, the last with: {message}; stopped here, "
                "the same command goes on"
            )

    async def tell(self, slots: Mapping[RouteKey, Slots]) -> None:
        """A line now and then, until it is cancelled: also, and above all, while no call comes back."""
        while True:
            await asyncio.sleep(LINE_EVERY_S)
            refused = [
                f"{route.pausing} calls wait for {key.url}: {route.refusal}"
                for key, route in slots.items()
                if route.pausing
            ]
            self.say("; ".join([self.tally.line(), *refused]))


async def _judge_all(
    asked: JudgePass, left: Sequence[Item], held: lease.Lease, say: Callable[[str], None]
) -> Tally:
    config, canary = asked.job.config, asked.job.data.canary
    writer_id = f"e{held.epoch:04d}-judge-{uuid.uuid4().hex[:8]}"
    metadata = {"canary": canary} if canary else None
    log = EventWriter(asked.job.run_dir, writer_id, metadata=metadata, epoch=held.epoch)
    router, tally, waiting = _router(asked), Tally(held.epoch, len(left)), iter(left)
    bench = _Bench(asked, Caller(router, config.models), log, held, tally, say)
    workers = [asyncio.create_task(bench.work(waiting)) for _ in range(min(config.concurrency, len(left)))]
    teller = asyncio.create_task(bench.tell(router.slots))
    _stop_on_signals(workers, tally)
    try:
        await asyncio.gather(*workers)
    except asyncio.CancelledError:
        if tally.stopped_by is None:
            raise
    finally:
        for task in (*workers, teller):
            task.cancel()
        await asyncio.gather(*workers, teller, return_exceptions=True)
        await router.close()
        await asyncio.to_thread(log.close)
    return tally


def _stop_on_signals(workers: Sequence[asyncio.Task[None]], tally: Tally) -> None:
    def stop(number: int) -> None:
        tally.stopped_by = number
        for worker in workers:
            worker.cancel()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
