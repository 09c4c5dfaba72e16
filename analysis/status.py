"""Whether a run lives, hangs or has ended, seen from outside: lease, heartbeats, calls in flight, log.

Reads files only, so it works from another terminal, on a live, a crashed and an empty run. It judges
processes of its own machine by their number, those of others by the age of their heartbeat. It cannot
see a task that hangs between two calls.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analysis import seen, summary
from analysis.log import open_run
from analysis.seen import LastError, LimitChange, OpenTask, Seen, Spending
from analysis.summary import RunSummary
from ray_app import events, object_store, pulse
from ray_app.errors import EvalError, RunDirError
from ray_app.pulse import Call, Status

Life = Literal["alive", "silent", "dead", "ended", "lost"]
State = Literal["empty", "running", "stuck", "stopped", "ended"]

SILENT_S = 15.0
SHOWN_CALLS = 10
SHOWN_TASKS = 10
DRIVER = "driver"
COUNTS = ("planned", "ok", "failed", "limited", "owed", "pending")


@dataclass(frozen=True, slots=True)
class Process:
    """A driver or worker; `heartbeat_s` is the age of its last sign of life."""

    name: str
    life: Life
    host: str
    pid: int | None
    node: str
    heartbeat_s: float
    in_flight: int = 0
    calls_ended: int = 0

    @property
    def where(self) -> str:
        return f"process {self.pid} on {self.host or 'unknown'}"


@dataclass(frozen=True, slots=True)
class InFlight:
    """Calls of one kind over all workers; `oldest_s` is the age of the oldest."""

    kind: str
    role: str
    model: str
    n: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class LongCall:
    """A call in flight: how long (seconds), in which process, what and since when."""

    age_s: float
    is_stuck: bool
    worker: str
    host: str
    pid: int
    call: Call


@dataclass(frozen=True, slots=True)
class SlowTask:
    """A task at work: for how long (seconds) in this segment, and the call that it waits for, if one is told.

    A process names its oldest calls only, and a task may be between two of them.
    """

    task: OpenTask
    age_s: float
    waits_for: LongCall | None


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the planned tasks are by the log; the last four as a living driver says. None: unknown."""

    planned: int | None
    ok: int | None
    failed: int | None
    limited: int | None
    owed: int | None
    pending: int | None
    in_flight: int | None
    per_min: float | None
    eta_s: float | None
    last_commit_s: float | None


@dataclass(frozen=True, slots=True)
class RouteLimit:
    """How many calls may be open at a model's endpoint now, as the driver decided, and its last change.

    `all_runs` is the limit that `runs` runs share, None where this is the only one. `open` counts the model's
    calls that are, None where it has more endpoints than one: calls name none.
    """

    model: str
    endpoint: str
    limit: int
    all_runs: int | None
    runs: int
    open: int | None
    changed: LimitChange | None


@dataclass(frozen=True, slots=True)
class Budget:
    """Dollars that count against `limits.run_cost_usd`, earlier commands included."""

    spent_usd: float
    limit_usd: float


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What `python -m analysis status` prints; `problems` are why `exit_code` is 1."""

    run_dir: str
    state: State
    exit_code: int
    problems: list[str]
    driver: Process | None
    progress: Progress
    in_flight: list[InFlight]
    calls: list[LongCall]
    slow_tasks: list[SlowTask]
    workers: list[Process]
    spending: Spending | None
    errors: list[LastError]
    notes: list[str]
    limits: list[RouteLimit]
    budget: Budget | None


def status_of(
    run_dir: Path, *, stuck_after_s: float = 300.0, clock: Callable[[], float] = time.time
) -> RunStatus:
    """The state of the run at this moment. Raises RunDirError where there is no run."""
    _check_run(run_dir)
    now = clock()
    driver, epoch = _driver(run_dir, now)
    told = [status for status in pulse.read(run_dir) if status.epoch == epoch]
    # The time that the log would show now: it knows nothing of a clock that was set in mid-run.
    log_now = now - next((status.clock_step_s for status in told if status.name == DRIVER), 0.0)
    counted, found, notes = _read_log(run_dir, log_now)
    workers = [_process(status, now) for status in told if status.name != DRIVER]
    waiting = [status for status in told if _life(status, now) not in ("ended", "lost")]
    is_driven = driver is not None and driver.life in ("alive", "silent")
    calls = _calls(waiting, now, stuck_after_s if is_driven else float("inf"))
    figures = next((status.figures for status in told if status.name == DRIVER), {})
    progress = _progress(counted, figures, now, is_driven=is_driven)
    problems = _problems(driver, workers if is_driven else [], calls, progress, stuck_after_s)
    if imported := counted.facts.get("imported") if counted else None:
        problems, notes = [], [*notes, f"Imported ({imported}): nothing drives this run, nothing resumes it."]
    return RunStatus(
        run_dir=object_store.place(run_dir),
        state=_state(driver, problems, is_driven, progress),
        exit_code=1 if problems else 0,
        problems=problems,
        driver=driver,
        progress=progress,
        in_flight=_groups(waiting, now),
        calls=calls[:SHOWN_CALLS],
        slow_tasks=_slow_tasks(found.open_tasks, calls, log_now)[:SHOWN_TASKS] if found and is_driven else [],
        workers=workers,
        spending=found.spending if found else None,
        errors=found.errors if found else [],
        notes=notes + (_refused(figures) if is_driven else []),
        limits=_limits(figures, waiting, found.changes if found else {}) if is_driven else [],
        budget=_budget(figures),
    )


def _refused(figures: Mapping[str, Any]) -> list[str]:
    """The endpoints that take no calls now, and what they say of it."""
    return [
        f"{n} calls of {model} wait for {url}: {why}" for model, url, n, why in figures.get("refused", ())
    ]


def _limits(
    figures: Mapping[str, Any], told: Sequence[Status], changes: Mapping[tuple[str, str], LimitChange]
) -> list[RouteLimit]:
    routes = figures.get("limits", ())
    places = Counter(route[0] for route in routes)
    calls = Counter[str]()
    for group in (group for status in told for group in status.groups):
        calls[group.model] += group.n
    return [
        RouteLimit(
            *(model, url, limit),
            all_runs=shared[0] if shared else None,
            runs=shared[1] if shared else 1,
            open=calls[model] if places[model] == 1 else None,
            changed=changes.get((model, url)),
        )
        for model, url, limit, *shared in routes
    ]


def _budget(figures: Mapping[str, Any]) -> Budget | None:
    if "limit_usd" not in figures:
        return None
    return Budget(figures["spent_usd"], figures["limit_usd"])


def _check_run(run_dir: Path) -> None:
    if not any((run_dir / name).exists() for name in ("lease", "log", "status", "identity.yaml")):
        raise RunDirError(f"no run at {run_dir}: expected a run directory, as the job prints it")


def _read_log(run_dir: Path, now: float) -> tuple[RunSummary | None, Seen | None, list[str]]:
    """What the log says; one that is not there yet or does not read becomes a note."""
    if not events.event_files(run_dir).folder.is_dir():
        return None, None, ["No log yet: no task has been started."]
    try:
        log = open_run(run_dir, columns=(*summary.COLUMNS, *seen.COLUMNS))
        return summary.summarise(log), seen.look(log, now), []
    except EvalError as error:
        return None, None, [f"The log cannot be read: {error}"]


def _driver(run_dir: Path, now: float) -> tuple[Process | None, int]:
    """The holder of the newest lease and its epoch; None and 0 where nobody has driven this run."""
    leases = sorted((run_dir / "lease").glob("epoch-*.json"))
    if not leases:
        return None, 0
    path = leases[-1]
    epoch = int(path.stem.removeprefix("epoch-"))
    beat, holder = now, None
    try:
        beat = path.stat().st_mtime
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        pass  # being written this moment, or torn when its driver died: its age tells
    holder = holder if isinstance(holder, dict) else {}
    host, pid = str(holder.get("host", "")), holder.get("pid")
    life = _judge(host, pid, holder.get("started"), beat, now, is_ended="ended" in holder)
    return Process(DRIVER, life, host, pid, "", _age(now, beat)), epoch


def _life(status: Status, now: float) -> Life:
    if status.is_lost:
        return "lost"
    is_ended = status.ended is not None
    return _judge(status.host, status.pid, status.started, status.beat, now, is_ended=is_ended)


def _judge(host: str, pid: Any, started: Any, beat: float, now: float, *, is_ended: bool) -> Life:
    if is_ended:
        return "ended"
    if host == socket.gethostname() and pid is not None and pulse.process_started(pid) != started:
        return "dead"
    return "silent" if now - beat > SILENT_S else "alive"


def _process(status: Status, now: float) -> Process:
    return Process(
        status.name,
        _life(status, now),
        status.host,
        status.pid,
        status.node,
        _age(now, status.beat),
        status.in_flight,
        status.calls_ended,
    )


def _calls(waiting: Iterable[Status], now: float, stuck_after_s: float) -> list[LongCall]:
    """The calls in flight, the longest first. Those of a dead process grew no older than it did."""
    calls = []
    for status in waiting:
        is_dead = _life(status, now) == "dead"
        for call in status.calls:
            age_s = _age(status.beat if is_dead else now, call.since)
            is_stuck = not is_dead and age_s > stuck_after_s
            calls.append(LongCall(age_s, is_stuck, status.name, status.host, status.pid, call))
    return sorted(calls, key=lambda call: -call.age_s)


def _slow_tasks(tasks: Iterable[OpenTask], calls: Sequence[LongCall], now: float) -> list[SlowTask]:
    """The tasks at work, the longest first, each with its oldest call in flight."""
    waits = {(long.call.task_id, long.call.trial): long for long in reversed(calls)}
    found = [SlowTask(task, _age(now, task.since), waits.get((task.task_id, task.trial))) for task in tasks]
    return sorted(found, key=lambda slow: -slow.age_s)


def _groups(waiting: Iterable[Status], now: float) -> list[InFlight]:
    found: dict[tuple[str, str, str], InFlight] = {}
    for group in (group for status in waiting for group in status.groups):
        key = (group.kind, group.role, group.model)
        known = found.get(key, InFlight(*key, 0, 0.0))
        found[key] = InFlight(*key, known.n + group.n, max(known.oldest_s, _age(now, group.since)))
    return sorted(found.values(), key=lambda group: (-group.n, group.kind, group.role, group.model))


def _progress(
    counted: RunSummary | None, figures: Mapping[str, Any], now: float, *, is_driven: bool
) -> Progress:
    if counted is None or "planned" not in counted.facts:
        counts = {name: figures.get(name) for name in COUNTS}
    else:
        counts = {name: getattr(counted.accounting, name) for name in COUNTS}
    told = figures if is_driven else {}  # what a dead driver said of its speed is no news
    commit = told.get("last_commit")
    return Progress(
        **counts,
        in_flight=told.get("in_flight"),
        per_min=told.get("per_min"),
        eta_s=told.get("eta_s"),
        last_commit_s=None if commit is None else _age(now, commit),
    )


def _problems(
    driver: Process | None,
    workers: Iterable[Process],
    calls: Sequence[LongCall],
    progress: Progress,
    stuck_after_s: float,
) -> list[str]:
    """Why somebody should look, the worst first; none where the run goes on or ended well."""
    problems = []
    if driver is not None and driver.life == "silent":
        problems.append(f"driver ({driver.where}) is silent: last heartbeat {driver.heartbeat_s:.0f} s ago")
    left = "an unknown number of" if progress.pending is None else str(progress.pending)
    if driver is None or driver.life in ("dead", "ended"):
        verb = "died" if driver is not None and driver.life == "dead" else "stopped"
        if (driver is not None or progress.planned is not None) and progress.pending != 0:
            problems.append(f"the driver {verb} with {left} tasks pending; the job's command resumes it")
    problems += [
        f"worker {worker.name} ({worker.where}) is {worker.life}: last heartbeat "
        f"{worker.heartbeat_s:.0f} s ago, {worker.in_flight} calls in flight"
        for worker in workers
        if worker.life in ("silent", "dead")
    ]
    if stuck := [call for call in calls if call.is_stuck]:
        problems.append(f"calls in flight for more than {stuck_after_s:g} s: {len(stuck)}, the longest below")
    return problems


def _state(driver: Process | None, problems: Sequence[str], is_driven: bool, progress: Progress) -> State:
    if is_driven:
        return "stuck" if problems else "running"
    if driver is None and progress.planned is None:
        return "empty"
    return "stopped" if problems else "ended"


def _age(now: float, then: float) -> float:
    return max(0.0, now - then)
