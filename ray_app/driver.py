"""A job from its checked inputs to its exit code: lease, services, engine, report.

Exit codes: 0 everything accounted for and nothing failed, 1 failures, 2 the user's mistake (nothing
was started), 3 verdicts owed, 130 or 143 stopped by SIGINT or SIGTERM; the same command resumes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_app import engine, event_writer, events, lease, rundir, services
from ray_app.adopt import Adoption
from ray_app.config import RunConfig
from ray_app.dataset import TaskSet
from ray_app.errors import ConfigError, EvalError, UserError
from ray_app.event_writer import EventWriter
from ray_app.progress import Display
from ray_app.prompting import Prompts
from ray_app.records import Event, Task
from ray_app.sandbox import NAMESPACES
from ray_app.services import ServeConfig

SolverFor = Callable[[Mapping[str, str]], engine.SolverFactory]
Check = Callable[["Job"], Coroutine[None, None, None]]
# Our services and workers wait far more than they compute: more logical cores than real ones.
MIN_LOGICAL_CPUS = 4
MAX_LOG_BYTES = 4 << 20
PIPE_WIDTH = 120


@dataclass(frozen=True)
class Job:
    """One benchmark run, read and checked; nothing is started yet."""

    config: RunConfig
    data: TaskSet
    prompts: Prompts
    run_dir: Path
    serve_config: ServeConfig
    isolation: tuple[str, ...]

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.data.tasks

    @property
    def tasks_by_id(self) -> dict[str, Task]:
        return {task.task_id: task for task in self.data.tasks}

    @property
    def identity(self) -> dict[str, str]:
        """What else than the config must be equal on a resume."""
        return {"prompt_digest": self.prompts.digest, "dataset_sha256": self.data.sha256}

    def facts(self) -> dict[str, Any]:
        """What every score of this run is printed with."""
        config = self.config
        return {
            "planned": len(self.tasks) * config.trials,
            "benchmark": config.benchmark,
            "protocol": config.protocol,
            "orchestrator": config.orchestrator.model,
            "judge_model": config.judge.model,
            "prompt_digest": self.prompts.digest + ("" if self.prompts.is_bundled else " (user's prompts)"),
            "dataset": self.data.source,
            "scope_policy": config.dataset.policy,
            "left_out": dict(self.data.left_out),
            "trials": config.trials,
            "sandbox": self._sandbox_fact(),
            "commit": rundir.commit(),
        }

    def _sandbox_fact(self) -> str:
        if not self.config.code.enabled:
            return "code execution off"
        missing = [layer for layer in NAMESPACES if layer not in self.isolation]
        held = " ".join(self.isolation)
        return f"{held}; NOT ISOLATED: {' '.join(missing)}" if missing else held


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command left its run."""

    tally: engine.Tally
    epoch: int
    stopped_by: int | None = None

    @property
    def exit_code(self) -> int:
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        counts = self.tally.counts
        return 1 if counts["failed"] or self.tally.pending else 3 if counts["owed"] else 0


def make_plan(job: Job, *, retry_failed: bool) -> engine.Plan:
    """What the run directory leaves to do; everything, where there is none yet."""
    has_log = rundir.check_resumable(job.run_dir, job.config, job.identity) and (job.run_dir / "log").exists()
    results = events.results(job.run_dir).to_pylist() if has_log else []
    return engine.plan(job.tasks, job.config.trials, results, retry_failed=retry_failed)


def carry_out(
    job: Job, solver_for: SolverFor, check: Check, *, console: Console, fresh: bool, retry_failed: bool
) -> Ending:
    """Run what is left of `job` and commit it. Raises EvalError with one line for the user.

    `check` is asked once the services are up and before anything is paid.
    """
    make_plan(job, retry_failed=retry_failed)  # another config is refused before anything is touched
    rundir.open_run(job.run_dir, job.config, job.identity)
    held = lease.take(job.run_dir)
    try:
        work = make_plan(job, retry_failed=retry_failed)
        if not work.items:
            console.print(f"Nothing left to run: {work.kept.line()}. No model is called.", highlight=False)
            return Ending(work.kept, held.epoch)
        return _run(job, work, solver_for, check, held, console=console, fresh=fresh)
    finally:
        held.release()


def adopt(job: Job, adoption: Adoption) -> str:
    """Commit the adopted results that the run does not have yet; says how many."""
    rundir.open_run(job.run_dir, job.config, job.identity)
    held = lease.take(job.run_dir)
    try:
        left = {item.key for item in make_plan(job, retry_failed=False).items}
        taken = [result for result in adoption.results if (result.rollout_key, result.trial) in left]
        options = _options(job, held, len(taken))
        log = options.writer("adopt")
        for result in taken:
            log.append(engine.result_event(result, options, log))
        log.close()
    finally:
        held.release()
    return f"{adoption.line()}; {len(taken)} of them were not in the run yet"


def _options(job: Job, held: lease.Lease, items: int) -> engine.Options:
    config = job.config
    workers = max(1, min(config.workers, items))
    return engine.Options(
        run_dir=job.run_dir,
        run_id=job.run_dir.name,
        epoch=held.epoch,
        concurrency=config.concurrency,
        workers=workers,
        attempts=config.attempts,
        canary=job.data.canary,
    )


def _run(
    job: Job,
    work: engine.Plan,
    solver_for: SolverFor,
    check: Check,
    held: lease.Lease,
    *,
    console: Console,
    fresh: bool,
) -> Ending:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    connect(say)
    services.ensure(job.serve_config, services.needed(job.config), fresh=fresh, say=say)
    asyncio.run(check(job))
    make_solver = solver_for(job.serve_config.urls(head_address()))
    work = engine.with_recorded_calls(work, job.run_dir)
    options = _options(job, held, len(work.items))
    log = options.writer("driver")
    try:
        return asyncio.run(_drive(job, work, make_solver, options, log=log, held=held, console=console))
    finally:
        log.close()
        keep_service_logs(job.run_dir)


async def _drive(
    job: Job,
    work: engine.Plan,
    make_solver: engine.SolverFactory,
    options: engine.Options,
    *,
    log: EventWriter,
    held: lease.Lease,
    console: Console,
) -> Ending:
    stop = asyncio.Event()
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, caught, stop, console)
    facts = job.facts() | {"provenance": rundir.provenance()}
    rundir.write_json(
        job.run_dir / "provenance.json", facts | job.identity | {"config_digest": job.config.digest}
    )
    log.append(_mark("run_start", options, json.dumps(job.facts())))
    display = Display(work.kept, marker=job.config.benchmark.upper(), console=console)
    for task_id in _skipped(job, work):
        display.skipped(task_id)
    try:
        tally = await engine.run(work, make_solver, options, log=log, lease=held, watcher=display, stop=stop)
    finally:
        display.close()
    log.append(_mark("run_end", options, tally.line()))
    return Ending(tally, options.epoch, caught[0] if caught else None)


def _on_signal(number: int, caught: list[int], stop: asyncio.Event, console: Console) -> None:
    caught.append(number)
    stop.set()
    name = signal.Signals(number).name
    console.print(f"{name}: stopping; what is in flight stays pending for the next run", highlight=False)


def _mark(kind: Any, options: engine.Options, detail: str) -> Event:
    return Event(kind=kind, t_start=time.time(), run_id=options.run_id, epoch=options.epoch, detail=detail)


def _skipped(job: Job, work: engine.Plan) -> list[str]:
    left = {item.key for item in work.items}
    trials = range(job.config.trials)
    return [task.task_id for trial in trials for task in job.tasks if (task.rollout_key, trial) not in left]


def connect(say: Any) -> None:
    """Connect to the Ray cluster that is running, or start one on this machine for this job."""
    import ray

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        # A submitted job has its working directory; everyone else imports this checkout.
        quiet["runtime_env"] = {"env_vars": {"PYTHONPATH": str(rundir.PACKAGE)}}
    asked = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if asked == "local":
            raise ConnectionError
        ray.init(address=asked, **quiet)
        say(f"Ray: connected to {ray.get_runtime_context().gcs_address}")
    except ConnectionError as error:
        if "multiple" in str(error):
            raise ConfigError(f"several Ray clusters run on this machine; choose one: {error}") from None
        if asked not in {"auto", "local"}:
            raise ConfigError(f"RAY_ADDRESS {asked}: no Ray cluster answers there ({error})") from None
        cpus = max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)
        context = ray.init(address="local", num_cpus=cpus, include_dashboard=True, **quiet)
        say(f"Ray: started on this machine; dashboard http://{context.dashboard_url}")


def head_address() -> str:
    """The address of the cluster's head node, where the Serve proxy answers."""
    import ray

    for node in ray.nodes():
        if "node:__internal_head__" in node["Resources"]:
            return str(node["NodeManagerAddress"])
    return "127.0.0.1"


def keep_service_logs(run_dir: Path) -> None:
    """Copy the end of this node's Serve logs (services, model servers) into the run directory."""
    import ray

    if not ray.is_initialized():
        return
    node = ray._private.worker._global_node  # the session folder has no public name
    source = Path(node.get_logs_dir_path()) / "serve" if node else None
    if source is None or not source.is_dir():
        return
    target = run_dir / "logs"
    target.mkdir(exist_ok=True)
    for path in source.glob("*.log"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - MAX_LOG_BYTES))
            (target / path.name).write_bytes(file.read())


def finish(job: Job, ending: Ending, json_path: Path | None, console: Console) -> dict[str, Any]:
    """Compact the log of an ended run, analyse it, print the page that people read, return the figures."""
    from analysis import tables
    from analysis.report import analyse

    if ending.tally.pending == 0:
        event_writer.compact(job.run_dir)
    output = analyse(job.run_dir)
    figures = _figures(job, ending, output.run)
    console.print(tables.summary_page(output.run))
    console.print(tables.tools_page(output.tools))
    console.print(f"Accounting: {ending.tally.line()}", highlight=False)
    calls, total = figures["model_calls"], figures["model_calls_total"]
    console.print(f"Model calls: {calls} by this command, {total} by the run so far", highlight=False)
    console.print(
        f"Pictures: {output.overview} and {len(output.pictures) - 1} more beside it", soft_wrap=True
    )
    console.print(f"Run directory: {job.run_dir}", soft_wrap=True, highlight=False)
    rundir.write_json(job.run_dir / "summary.json", figures)
    if json_path is not None:
        rundir.write_json(json_path, figures)
    return figures


def _figures(job: Job, ending: Ending, run: Any) -> dict[str, Any]:
    account = run.accounting
    interval = account.interval
    calls = _model_calls(job.run_dir)
    return {
        "planned": account.planned,
        **{name: getattr(account, name) for name in ("ok", "failed", "limited", "owed", "pending")},
        "accuracy": account.accuracy,
        "interval": [interval.low, interval.high] if interval else None,
        "protocol": job.config.protocol,
        "judge_model": job.config.judge.model,
        "prompt_digest": job.prompts.digest,
        "model_calls": calls.get(ending.epoch, 0),
        "model_calls_total": sum(calls.values()),
        "cost_usd": run.totals.cost_usd,
        "exit_code": ending.exit_code,
        "run_dir": str(job.run_dir),
    }


def _model_calls(run_dir: Path) -> Mapping[int, int]:
    """Model calls made, by epoch: failed and repeated ones count, replayed ones are no calls."""
    query = "select epoch, count(*) from events where kind = 'model_call' group by epoch"
    with events.connect(run_dir) as log:
        return dict(log.execute(query).fetchall())


def make_console() -> Console:
    """The terminal as it is; a pipe or a file wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def report_error(error: EvalError, console: Console) -> int:
    """Print the one line of an error and return its exit code."""
    console.print(
        f"error: {' '.join(str(error).split())}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    return 2 if isinstance(error, UserError) else 1
