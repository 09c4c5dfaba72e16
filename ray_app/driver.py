"""A job from its checked inputs to its exit code: lease, services, engine, report.

Exit codes: 0 everything accounted for and nothing failed, 1 failures, 2 the user's mistake (nothing
was started), 3 verdicts owed, 130 or 143 stopped by SIGINT or SIGTERM; the same command resumes. Of a
replay: 0 the same decisions, 1 others.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from ray_app import (
    compaction,
    comparison,
    engine,
    events,
    lease,
    object_store,
    outlook,
    planning,
    pulse,
    ray_cluster,
    route_limits,
    rundir,
    services,
    steady,
)
from ray_app.adopt import Adoption
from ray_app.chat import Router
from ray_app.compaction import Compactor
from ray_app.config import BaseRun
from ray_app.dataset import TaskSet
from ray_app.engine_metrics import EngineMetrics
from ray_app.errors import ConfigError, EvalError, InfrastructureError, StorageError, UserError
from ray_app.event_writer import EventWriter
from ray_app.governor import Governor, Policy
from ray_app.options import STORAGE_PATIENCE_S, Options
from ray_app.ordering import NOTHING_ASKED, Asked
from ray_app.progress import Display
from ray_app.prompting import Prompts
from ray_app.recording import Recording
from ray_app.records import Event, EventKind, Task
from ray_app.run_metrics import RunMetrics
from ray_app.services import ServeConfig
from ray_app.worker import SolverFactory

PIPE_WIDTH = 120
IDENTITY_FILES = ("identity.yaml", "config.yaml")
# So many failures of infrastructure in a row say that something is down, whatever runs at once.
MIN_FAILURES_IN_A_ROW = 20
STORAGE_RETRY_S = 0.5
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One benchmark run, read and checked; nothing is started yet. Each benchmark has its own kind.

    `identity` is what else than the config must be equal on a resume. A job that `replays` another run
    asks nothing outside: no service is deployed, no key is read.
    """

    config: BaseRun
    data: TaskSet
    prompts: Prompts
    identity: Mapping[str, str]
    run_dir: Path
    serve_config: ServeConfig
    replays: Recording | None = None

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.data.tasks

    @property
    def tasks_by_id(self) -> dict[str, Task]:
        return {task.task_id: task for task in self.data.tasks}

    def keys(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The API keys that the config names. Raises ConfigError for one that is not set."""
        missing = [name for name in self.config.key_names() if not environ.get(name)]
        if missing:
            raise ConfigError(
                f"api_key_env {missing[0]}: the variable is empty; export it or drop api_key_env"
            )
        return {name: environ[name] for name in self.config.key_names()}

    def facts(self) -> dict[str, Any]:
        """What every score of this run is printed with."""
        routes = self.config.routes()
        return {
            "planned": len(self.tasks) * self.config.trials,
            "benchmark": self.config.benchmark,
            "protocol": self.protocol_label(),
            "orchestrator": routes["orchestrator"],
            "judge_model": routes["judge"],
            "prompt_digest": self.prompts.digest + ("" if self.prompts.is_bundled else " (user's prompts)"),
            "dataset": self.data.source,
            "left_out": dict(self.data.left_out),
            "trials": self.config.trials,
            **self.own_facts(),
            "unpriced": ", ".join(self.config.unpriced()),
            "commit": rundir.commit(),
        }

    def own_facts(self) -> dict[str, Any]:
        """What else a score of this benchmark is printed with."""
        return {}

    def protocol_label(self) -> str:
        """The protocol as a score may name it."""
        raise NotImplementedError

    def plan_line(self) -> str:
        """One line about the tasks, for `--plan`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Command:
    """How a job is carried out: where it prints, and what the user asked for beside the config.

    `solver_for` makes the solver factory once the services' addresses are known; `check` asks the
    services once they are up, before anything is paid, and returns what of them a resume must share.
    """

    console: Console
    solver_for: Callable[[Mapping[str, str]], SolverFactory]
    check: Callable[[Mapping[str, str]], Coroutine[None, None, dict[str, str]]]
    is_fresh: bool = False
    retry_failed: bool = False
    json_path: Path | None = None
    with_pictures: bool = True
    asked: Asked = NOTHING_ASKED

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command left its run."""

    tally: planning.Tally
    epoch: int
    stopped_by: int | None = None
    later: int = 0  # tasks that this command was not to do

    @property
    def exit_code(self) -> int:
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        counts = self.tally.counts
        return 1 if counts["failed"] or self.tally.pending > self.later else 3 if counts["owed"] else 0


class Stopped(BaseException):
    """SIGINT or SIGTERM before the engine runs: nothing is in flight yet."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


async def check_routes(config: BaseRun, router: Router) -> None:
    """Ask every route once. Raises ConfigError for one that does not answer; closes the router."""
    try:
        for name in config.models_used():
            if problem := await router.probe(name):
                raise ConfigError(f"model {name}: {problem}; start it, or mend models.{name}")
    finally:
        await router.close()


def make_plan(job: Job, *, retry_failed: bool, asked: Asked = NOTHING_ASKED) -> planning.Plan:
    """What the run directory leaves to do, in its order; everything, where there is none yet."""
    has_run = rundir.check_resumable(job.run_dir, job.config, job.identity)
    results = events.results(job.run_dir).to_pylist() if has_run and (job.run_dir / "log").exists() else []
    work = planning.plan(job.tasks, job.config.trials, results, retry_failed=retry_failed)
    if job.replays is None:
        return outlook.arranged(job, work, results, asked)
    known = job.replays.results
    return replace(work, items=tuple(item for item in work.items if item.key in known))


def carry_out(job: Job, command: Command) -> int:
    """Run what is left of `job`, commit it, report it; the exit code.

    Raises EvalError with one line for the user, Stopped when a signal comes before the engine runs.
    """
    if command.json_path is not None and not command.json_path.absolute().parent.is_dir():
        raise ConfigError(f"--json {command.json_path}: no such folder; make it first")
    pulse.raise_file_limit(job.config.concurrency)
    with _owned(job) as held:
        if not held.is_exclusive:
            command.say(
                f"{object_store.place(job.run_dir)}: this store has no conditional put, so two drivers that "
                "start at the same moment may both run for a while; what they commit is still counted once"
            )
        work = make_plan(job, retry_failed=command.retry_failed, asked=command.asked)
        if work.items:
            with signals_raise():
                ending = _run(job, work, command, held)
        else:
            of = " of the pilot" if work.later else ""
            command.say(f"Nothing left to run{of}: {work.kept.line()}. No model is called.")
            ending = Ending(work.kept, held.epoch, later=len(work.later))
        # The lease is held to the end: a log may be compacted only while nobody else writes to it.
        if job.replays is not None:
            return finish_replay(job, job.replays, ending, command)
        finish(job, ending, command, held)
        if command.asked.pilot is not None:
            _tell_of_pilot(job, ending, command)
    return ending.exit_code


def adopt(job: Job, adoption: Adoption) -> str:
    """Commit the adopted results that the run does not have yet; says how many."""
    if job.protocol_label() != "toolorchestra":
        raise ConfigError(
            f"--adopt: such results were judged by toolorchestra, this run is {job.protocol_label()}"
        )
    with _owned(job) as held:
        left = {item.key for item in make_plan(job, retry_failed=False).items}
        taken = [result for result in adoption.results if (result.rollout_key, result.trial) in left]
        options = _options(job, held, len(taken))
        log = options.writer("adopt")
        log.append(_mark("run_start", options, json.dumps(job.facts() | {"adopted": len(taken)})))
        for result in taken:
            log.append(engine.result_event(result, options, log))
        log.close()
    return f"{adoption.line()}; {len(taken)} of them were not in the run yet"


@contextmanager
def _owned(job: Job) -> Iterator[lease.Lease]:
    """The run directory with its lease. Refused: another run's directory, another driver's run."""
    try:
        rundir.check_resumable(job.run_dir, job.config, job.identity)
        held = lease.take(job.run_dir)
    except OSError as error:
        raise rundir.unusable(job.run_dir, error) from None
    try:
        object_store.refresh(job.run_dir)  # what the last driver left before this one took the run
        rundir.open_run(job.run_dir, job.config, job.identity)
        object_store.push(job.run_dir, IDENTITY_FILES)
        yield held
    except OSError as error:
        name = error.filename or job.run_dir
        raise StorageError(
            f"{name}: {error.strerror or error}; what was committed is kept, run again"
        ) from None
    finally:
        held.release()


def _options(job: Job, held: lease.Lease, items: int) -> Options:
    config = job.config
    options = Options(
        run_dir=job.run_dir,
        run_id=job.run_dir.name,
        epoch=held.epoch,
        concurrency=config.concurrency,
        workers=max(1, min(config.workers, items)),
        attempts=config.attempts,
        give_up_after=max(MIN_FAILURES_IN_A_ROW, config.concurrency),
        canary=job.data.canary,
        attempt_deadline_s=_attempt_deadline_s(config.limits.wall_s),
        url=object_store.place(job.run_dir) if object_store.store_of(job.run_dir) else "",
    )
    if job.replays is None:
        return options
    # What failed in the record fails again, at once and however often.
    return replace(
        options, replays=job.replays.run_dir, attempts=1, give_up_after=sys.maxsize, attempt_deadline_s=None
    )


@dataclass(frozen=True, slots=True)
class Bounded:
    """What bounds a run's calls, and what it is told of the engines."""

    governor: Governor
    metrics: EngineMetrics


def _bounded(job: Job, urls: Mapping[str, str], options: Options, command: Command) -> Bounded:
    if job.replays is not None:  # it calls nobody
        return Bounded(Governor(workers=options.workers), EngineMetrics({}))
    models = job.config.called()
    pages = ray_cluster.metrics_pages()
    metrics = EngineMetrics(route_limits.sources(models, urls, pages))
    limit_usd = job.config.limits.run_cost_usd
    before_usd = 0.0
    if limit_usd is not None and (job.run_dir / "log").is_dir():
        before_usd = route_limits.spent_usd(job.run_dir)
    policy = Policy(route_limits.bounds(models, urls), limit_usd, before_usd)
    governor = Governor(
        policy, pressure=metrics.of, workers=options.workers, is_shared=True, warn=command.say
    )
    return Bounded(governor, metrics)


def _attempt_deadline_s(wall_s: float | None) -> float | None:
    """Twice the task's own limit, and the judge's time: only what ignores its cancellation gets there."""
    return None if wall_s is None else 2 * wall_s + 120


def _run(job: Job, work: planning.Plan, command: Command, held: lease.Lease) -> Ending:
    started, began = time.time(), steady.clock_s()
    ray_cluster.connect(command.say)
    raise_on_signals()  # Ray has put its own handler in place
    urls = _serve(job, command) if job.replays is None else {}
    make_solver = command.solver_for(urls)
    options = _options(job, held, len(work.items))
    bounded = _bounded(job, urls, options, command)
    # A driver that wakes up must not write the results that it had in hand when it was stopped.
    log = options.writer("driver", guard=held.check)
    try:
        with ray_cluster.watched(partial(_end_without_cluster, log, command)), closed_at_the_end(log, held):
            return asyncio.run(
                _drive(job, work, make_solver, options, command, log=log, held=held, bounded=bounded)
            )
    finally:
        # Where the clock was set back meanwhile, logs of this run are older than its beginning.
        since = min(started, time.time() - (steady.clock_s() - began))
        ray_cluster.keep_service_logs(job.run_dir, since=since)


def _end_without_cluster(log: EventWriter, command: Command, line: str) -> None:
    """Ends this process at once: whatever waits for Ray in it now waits for ever."""
    with suppress(StorageError):
        log.sync()
    report_error(InfrastructureError(line), command.console)
    sys.stdout.flush()
    os._exit(1)


def _serve(job: Job, command: Command) -> dict[str, str]:
    """Deploys what is missing and asks it once; the addresses of the services."""
    needed = services.needed(job.config)
    services.ensure(job.serve_config, needed, fresh=command.is_fresh, say=command.say)
    head = ray_cluster.head_address()
    urls = job.serve_config.urls(head)
    if needed:
        asyncio.run(services.wait_for_proxy(job.serve_config.proxy(head)))
    rundir.confirm(job.run_dir, asyncio.run(command.check(urls)))
    object_store.push(job.run_dir, IDENTITY_FILES)
    return urls


@contextmanager
def closed_at_the_end(log: EventWriter, held: lease.Lease) -> Iterator[None]:
    """Closes the log at the end; after an error, that is what the user is told, not what closing says."""
    try:
        yield
    except BaseException:
        with suppress(StorageError):
            log.close()
        raise
    patiently(log.close, held)


def patiently(
    work: Callable[[], Result], held: lease.Lease | None = None, patience_s: float = STORAGE_PATIENCE_S
) -> Result:
    """What `work` returns; while storage fails it is done again, as during the run, and the user is told.

    Raises the OSError or StorageError that is left when the patience is over or another driver has the run.
    """
    give_up, said = time.monotonic() + patience_s, ""
    while True:
        try:
            return work()
        except (OSError, StorageError) as error:
            if (held is not None and held.is_lost) or time.monotonic() > give_up:
                raise
            if str(error) != said:
                said = str(error)
                print(f"warning: {said}; tried again for up to {patience_s:g} s", file=sys.stderr, flush=True)
            time.sleep(STORAGE_RETRY_S)


async def _drive(
    job: Job,
    work: planning.Plan,
    make_solver: SolverFactory,
    options: Options,
    command: Command,
    *,
    log: EventWriter,
    held: lease.Lease,
    bounded: Bounded,
) -> Ending:
    stop = asyncio.Event()
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, caught, stop, command)
    record = (
        job.facts()
        | dict(job.identity)
        | {"dataset_sha256": job.data.sha256, "config_digest": job.config.digest}
    )
    rundir.write_json(job.run_dir / "provenance.json", record | rundir.provenance())
    object_store.push(job.run_dir, ["provenance.json"])
    foretold = outlook.outlook(job, work, command.asked)
    told = {"forecast": foretold.content()} if foretold and not work.later else {}
    log.append(_mark("run_start", options, json.dumps(job.facts() | told)))
    for line in foretold.lines() if told and foretold else ():
        command.say(line)
    governor = bounded.governor
    display = Display(
        work.kept,
        marker=job.config.benchmark.upper(),
        console=command.console,
        waits=lambda: _waits(governor),
    )
    for task_id in _skipped(job, work):
        display.skipped(task_id)
    followed = pulse.Followed(display, work.kept)

    def figures() -> dict[str, Any]:
        return followed.figures() | governor.figures()

    heart = pulse.Pulse(job.run_dir, "driver", epoch=held.epoch, figures=figures)
    meters = RunMetrics(job.run_dir, held.epoch, figures)
    following = asyncio.create_task(bounded.metrics.follow())
    compactor = Compactor.start(job.run_dir, f"e{held.epoch:04d}")
    try:
        tally = await engine.run(
            work,
            make_solver,
            options,
            log=log,
            lease=held,
            watcher=followed,
            stop=stop,
            governor=governor,
        )
    finally:
        following.cancel()
        display.close()
        meters.close()
        heart.close()
        await asyncio.to_thread(compactor.stop)
    log.append(_mark("run_end", options, tally.line()))
    if tally.pending and governor.stopped_for:
        command.say(governor.stopped_for)
    elif tally.pending and not governor.may_spend:
        command.say(
            f"limits.run_cost_usd: ${governor.spent_usd:.4f} of ${job.config.limits.run_cost_usd:g} spent; "
            "nothing more was called, and what is pending goes on with a higher limit and the same command"
        )
    stopped_by = caught[0] if caught and tally.pending > len(work.later) else None
    return Ending(tally, options.epoch, stopped_by, len(work.later))


def _waits(governor: Governor) -> str:
    return ", ".join(f"{n} calls of {model} wait for {url}" for model, url, n, _ in governor.refused())


def _on_signal(number: int, caught: list[int], stop: asyncio.Event, command: Command) -> None:
    caught.append(number)
    stop.set()
    command.say(f"{signal.Signals(number).name}: stopping; what is in flight stays pending for the next run")


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped inside; what stood before stands after."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    raise_on_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)


def raise_on_signals() -> None:
    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)


def _mark(kind: EventKind, options: Options, detail: str) -> Event:
    return Event(kind=kind, t_start=steady.now(), run_id=options.run_id, epoch=options.epoch, detail=detail)


def _skipped(job: Job, work: planning.Plan) -> list[str]:
    left = {item.key for item in work.left}
    trials = range(job.config.trials)
    return [task.task_id for trial in trials for task in job.tasks if (task.rollout_key, trial) not in left]


def finish(job: Job, ending: Ending, command: Command, held: lease.Lease) -> None:
    """Compact the log of an ended run, analyse it, print the page that people read, write the figures."""
    from analysis import tables  # matplotlib and scipy behind it take a second

    # Whoever stopped the run wants it gone in seconds.
    patience_s = STORAGE_PATIENCE_S if ending.stopped_by is None else 0.0
    output, figures = patiently(lambda: _written(job, ending, command), held, patience_s)
    command.console.print(tables.summary_page(output.run))
    command.console.print(tables.tools_page(output.tools))
    command.say(f"Accounting: {ending.tally.line()}")
    calls, total = figures["model_calls"], figures["model_calls_total"]
    command.say(f"Model calls: {calls} by this command, {total} by the run so far")
    place = object_store.place(job.run_dir)
    if output.pictures:
        command.say(f"Pictures: {output.overview} and {len(output.pictures) - 1} more beside it")
    else:
        command.say(f"Pictures: not drawn; `python -m analysis plots {place}` does")
    command.say(f"Run directory: {place}")
    if command.json_path is not None:
        rundir.write_json(command.json_path, figures)


def _written(job: Job, ending: Ending, command: Command) -> tuple[Any, dict[str, Any]]:
    """The analysis and the figures, both in the run directory; may be done again."""
    from analysis.report import analyse

    if ending.tally.pending == 0:
        compaction.compact(job.run_dir)
    output = analyse(job.run_dir, with_pictures=command.with_pictures and ending.stopped_by is None)
    figures = _figures(job, ending, output.run)
    rundir.write_json(job.run_dir / "summary.json", figures)
    object_store.push(job.run_dir, ["summary.json", "analysis", "logs"])
    return output, figures


def _tell_of_pilot(job: Job, ending: Ending, command: Command) -> None:
    """What the rest will take and cost, and how to go on."""
    if ending.stopped_by is not None or ending.tally.pending > ending.later:
        command.say("The pilot is not complete; the same command goes on with it")
        return
    left = make_plan(job, retry_failed=False, asked=replace(command.asked, pilot=None))
    for line in outlook.page(job, left, command.asked):
        command.say(line)
    command.say(
        f"Pilot done: {ending.later:,} of {ending.tally.planned:,} tasks are left. The same command with "
        "--plan in place of --pilot shows this again; without either it goes on with the rest"
    )


def finish_replay(job: Job, recorded: Recording, ending: Ending, command: Command) -> int:
    """Compare the replay with what it replays, print and write that; the exit code: 1 where they differ."""
    here = {(task.rollout_key, trial) for task in job.tasks for trial in range(job.config.trials)}
    keys = {key: row for key, row in recorded.results.items() if key in here}
    differences = tuple(recorded.differences(job.config, job.identity))
    old, new = comparison.traces(recorded.run_dir, keys), comparison.traces(job.run_dir, keys)
    found = comparison.compare(old, new, len(here), differences)
    code = found.exit_code if ending.stopped_by is None else ending.exit_code
    command.console.print(comparison.page(found, recorded.run_dir))
    command.say(f"Accounting: {ending.tally.line()}. Nothing was asked outside or paid.")
    command.say(f"Run directory: {object_store.place(job.run_dir)}")
    places = {"run_dir": str(job.run_dir), "replay_of": str(recorded.run_dir)}
    figures = found.figures() | places | {"exit_code": code}
    rundir.write_json(job.run_dir / "summary.json", figures)
    object_store.push(job.run_dir, ["summary.json"])
    if command.json_path is not None:
        rundir.write_json(command.json_path, figures)
    return code


def _figures(job: Job, ending: Ending, run: Any) -> dict[str, Any]:
    account = run.accounting
    interval = account.interval
    calls = _model_calls(job.run_dir)
    return {
        "planned": account.planned,
        **{name: getattr(account, name) for name in ("ok", "failed", "limited", "owed", "pending")},
        "accuracy": account.accuracy,
        "interval": [interval.low, interval.high] if interval else None,
        "protocol": job.protocol_label(),
        "judge_model": job.config.routes()["judge"],
        "prompt_digest": job.prompts.digest,
        "model_calls": calls.get(ending.epoch, 0),
        "model_calls_total": sum(calls.values()),
        "cost_usd": run.totals.cost_usd,
        "exit_code": ending.exit_code,
        "run_dir": str(job.run_dir),
    }


def _model_calls(run_dir: Path) -> dict[int, int]:
    """Model calls made, by epoch: failed and repeated ones count, replayed ones are no calls."""
    query = f"""
        select epoch, count(*) from events
        where kind = 'model_call' and not coalesce(is_replayed, false) and not {events.SECOND_OPINION}
        group by epoch
    """
    with events.connect(run_dir) as log:
        return dict(log.execute(query).fetchall())


def make_console() -> Console:
    """The terminal as it is; a pipe or a file wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def report_error(error: EvalError, console: Console) -> int:
    """Print the one line of an error and return its exit code."""
    line = f"error: {' '.join(str(error).split())}"
    console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    return 2 if isinstance(error, UserError) else 1
