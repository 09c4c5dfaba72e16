"""Whether a run lives, hangs or has ended, seen from outside: lease, heartbeats, calls in flight, log.

Reads files only, so it works from another terminal, on a live, a crashed and an empty run. It judges
processes of its own machine by their number, those of others by the age of their heartbeat. It cannot
see a task that hangs between two calls.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.queries import open_run
from analysis.summary import RunSummary, summarise
from analysis.text import DASH, duration, plain
from ray_app import events, object_store, pulse
from ray_app.errors import EvalError, RunDirError
from ray_app.pulse import Call, Status

Life = Literal["alive", "silent", "dead", "ended", "lost"]
State = Literal["empty", "running", "stuck", "stopped", "ended"]

SILENT_S = 15.0
SHOWN_CALLS = 10
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
class LastError:
    """How often a kind of failure stands in the log, and its newest case; `at` is Unix seconds."""

    error_kind: str
    n: int
    at: float
    kind: str
    task_id: str
    worker: str
    message: str


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
    workers: list[Process]
    errors: list[LastError]
    notes: list[str]


def status_of(
    run_dir: Path, *, stuck_after_s: float = 300.0, clock: Callable[[], float] = time.time
) -> RunStatus:
    """The state of the run at this moment. Raises RunDirError where there is no run."""
    _check_run(run_dir)
    summary, errors, notes = _read_log(run_dir)
    now = clock()
    driver, epoch = _driver(run_dir, now)
    told = [status for status in pulse.read(run_dir) if status.epoch == epoch]
    workers = [_process(status, now) for status in told if status.name != DRIVER]
    waiting = [status for status in told if _life(status, now) not in ("ended", "lost")]
    is_driven = driver is not None and driver.life in ("alive", "silent")
    calls = _calls(waiting, now, stuck_after_s if is_driven else float("inf"))
    figures = next((status.figures for status in told if status.name == DRIVER), {})
    progress = _progress(summary, figures, now, is_driven=is_driven)
    problems = _problems(driver, workers if is_driven else [], calls, progress, stuck_after_s)
    return RunStatus(
        run_dir=object_store.place(run_dir),
        state=_state(driver, problems, is_driven, progress),
        exit_code=1 if problems else 0,
        problems=problems,
        driver=driver,
        progress=progress,
        in_flight=_groups(waiting, now),
        calls=calls[:SHOWN_CALLS],
        workers=workers,
        errors=errors,
        notes=notes + (_limits(figures) if is_driven else []),
    )


def _limits(figures: Mapping[str, Any]) -> list[str]:
    """The most calls that each route may have open now, as the driver decided."""
    return [f"Limit of {model} at {url}: {limit} calls" for model, url, limit in figures.get("limits", ())]


def _check_run(run_dir: Path) -> None:
    if not any((run_dir / name).exists() for name in ("lease", "log", "status", "identity.yaml")):
        raise RunDirError(f"no run at {run_dir}: expected a run directory, as the job prints it")


def _read_log(run_dir: Path) -> tuple[RunSummary | None, list[LastError], list[str]]:
    """Accounting and last errors; a log that is not there yet or does not read becomes a note."""
    if not events.event_files(run_dir).folder.is_dir():
        return None, [], ["No log yet: no task has been started."]
    try:
        return summarise(open_run(run_dir)), last_errors(run_dir), []
    except EvalError as error:
        return None, [], [f"The log cannot be read: {error}"]


def last_errors(run_dir: Path) -> list[LastError]:
    """One row for each kind of failure in the log, the newest first."""
    columns = ["error_kind", "t_start", "kind", "task_id", "worker", "error", "status", "is_replayed"]
    found: dict[str, LastError] = {}
    for batch in events.read(run_dir, columns):
        for row in batch.to_pylist() if "error" in batch["status"].unique().to_pylist() else ():
            if row["status"] == "error" and not row["is_replayed"]:
                name = row["error_kind"] or "unknown"
                found[name] = _newer(found.get(name), name, row)
    return sorted(found.values(), key=lambda error: -error.at)


def _newer(known: LastError | None, name: str, row: Mapping[str, Any]) -> LastError:
    at, n = row["t_start"].timestamp(), 1 if known is None else known.n + 1
    last = (row["kind"], row["task_id"] or "", row["worker"] or "", row["error"] or "")
    if known is not None and known.at > at:
        at, last = known.at, (known.kind, known.task_id, known.worker, known.message)
    return LastError(name, n, at, *last)


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


def _groups(waiting: Iterable[Status], now: float) -> list[InFlight]:
    found: dict[tuple[str, str, str], InFlight] = {}
    for group in (group for status in waiting for group in status.groups):
        key = (group.kind, group.role, group.model)
        known = found.get(key, InFlight(*key, 0, 0.0))
        found[key] = InFlight(*key, known.n + group.n, max(known.oldest_s, _age(now, group.since)))
    return sorted(found.values(), key=lambda group: (-group.n, group.kind, group.role, group.model))


def _progress(
    summary: RunSummary | None, figures: Mapping[str, Any], now: float, *, is_driven: bool
) -> Progress:
    if summary is None or "planned" not in summary.facts:
        counts = {name: figures.get(name) for name in COUNTS}
    else:
        counts = {name: getattr(summary.accounting, name) for name in COUNTS}
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
        problems.append(f"driver ({_place(driver)}) is silent: last heartbeat {driver.heartbeat_s:.0f} s ago")
    left = "an unknown number of" if progress.pending is None else str(progress.pending)
    if driver is None or driver.life in ("dead", "ended"):
        verb = "died" if driver is not None and driver.life == "dead" else "stopped"
        if (driver is not None or progress.planned is not None) and progress.pending != 0:
            problems.append(f"the driver {verb} with {left} tasks pending; the job's command resumes it")
    problems += [
        f"worker {worker.name} ({_place(worker)}) is {worker.life}: last heartbeat "
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


def _place(process: Process) -> str:
    return f"process {process.pid} on {process.host or 'unknown'}"


def _age(now: float, then: float) -> float:
    return max(0.0, now - then)


def page(run: RunStatus) -> RenderableType:
    """The state of a run on one page: verdict and reasons first, then what is in flight."""
    style = "bold red" if run.exit_code else "bold green"
    parts: list[RenderableType] = [Text(f"{run.state}: {plain(run.run_dir, 200)}", style=style)]
    parts += [Text(f"! {plain(problem, 300)}", style="red") for problem in run.problems]
    parts += [Text(line) for line in (_driver_line(run.driver), *_progress_lines(run.progress))]
    parts += [Text(plain(note, 300), style="yellow") for note in run.notes]
    rows = [[_what(group), str(group.n), duration(group.oldest_s)] for group in run.in_flight]
    parts += _grid("In flight", ["call", "n", "oldest"], rows)
    rows = [_call_row(call) for call in run.calls]
    parts += _grid("Longest calls", ["for", "since", "call", "task", "turn", "where"], rows)
    rows = [
        [worker.name, worker.life, f"{worker.heartbeat_s:.0f} s ago", str(worker.in_flight), _place(worker)]
        for worker in run.workers
    ]
    parts += _grid("Workers", ["name", "state", "heartbeat", "in flight", "where"], rows)
    rows = [[e.error_kind, str(e.n), _clock(e.at), e.task_id, e.message] for e in run.errors]
    parts += _grid("Errors in the log", ["kind", "n", "last", "task", "message"], rows)
    return Group(*parts)


def _driver_line(driver: Process | None) -> str:
    if driver is None:
        return "driver: none has held this run"
    return f"driver: {driver.life}, {_place(driver)}, last heartbeat {driver.heartbeat_s:.0f} s ago"


def _progress_lines(progress: Progress) -> list[str]:
    lines = []
    if progress.planned is not None:
        parts = " + ".join(f"{getattr(progress, name)} {name}" for name in COUNTS[1:])
        lines.append(f"tasks: {progress.planned} planned = {parts}")
    if progress.in_flight is not None:
        eta = DASH if progress.eta_s is None else duration(progress.eta_s)
        commit = "none yet" if progress.last_commit_s is None else f"{duration(progress.last_commit_s)} ago"
        rate = f"{progress.per_min or 0:.1f}/min"
        lines.append(f"now: {progress.in_flight} in flight, {rate}, ETA {eta}, last commit {commit}")
    return lines


def _call_row(long: LongCall) -> list[str]:
    call, age = long.call, duration(long.age_s) + (" STUCK" if long.is_stuck else "")
    where = f"{long.worker} (process {long.pid} on {long.host})"
    task = f"{call.task_id} trial {call.trial} attempt {call.attempt}"
    return [age, _clock(call.since), _what(call), task, str(call.turn), where]


def _what(call: Call | InFlight) -> str:
    names = (call.kind, call.role, getattr(call, "tool", ""), call.model or getattr(call, "alias", ""))
    return " ".join(name for name in names if name)


def _clock(at: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(at))


def _grid(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[RenderableType]:
    """A table, or nothing where it has no row. Cells are Text: a name with brackets is no markup."""
    if not rows:
        return []
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell, 120)) for cell in row))
    return [table]
