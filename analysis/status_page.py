"""The state of a run on one page: what is stuck comes first, then how far it is, then what it waits for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.seen import Spending
from analysis.status import (
    COUNTS,
    Budget,
    InFlight,
    LongCall,
    Process,
    Progress,
    RouteLimit,
    RunStatus,
    SlowTask,
)
from analysis.text import DASH, duration, number, percent, plain, usd
from ray_app.pulse import Call


def page(run: RunStatus) -> RenderableType:
    """The state of a run on one page: verdict and reasons first, then what is in flight."""
    style = "bold red" if run.exit_code else "bold green"
    parts: list[RenderableType] = [Text(f"{run.state}: {plain(run.run_dir, 200)}", style=style)]
    parts += [Text(f"! {plain(problem, 300)}", style="red") for problem in run.problems]
    names = ["for", "since", "call", "task", "turn", "where"]
    parts += _grid("Stuck", names, [_call_row(call) for call in run.calls if call.is_stuck], style="red")
    lines = [_driver_line(run.driver), *_progress_lines(run.progress), *_spending_lines(run.spending)]
    lines += _budget_lines(run.budget)
    parts += [Text(line) for line in lines]
    parts += [Text(plain(note, 300), style="yellow") for note in run.notes]
    rows = [[_what(group), str(group.n), duration(group.oldest_s)] for group in run.in_flight]
    parts += _grid("In flight", ["call", "n", "oldest"], rows)
    rows = [_limit_row(route) for route in run.limits]
    columns = ["model", "endpoint", "most at once", "open", "changed", "from", "why"]
    parts += _grid("Limits of calls in flight", columns, rows)
    rows = [_task_row(slow) for slow in run.slow_tasks]
    parts += _grid("Slowest tasks", ["for", "task", "turn", "waits for"], rows)
    parts += _grid("Longest calls", names, [_call_row(call) for call in run.calls if not call.is_stuck])
    rows = [
        [worker.name, worker.life, f"{worker.heartbeat_s:.0f} s ago", str(worker.in_flight), worker.where]
        for worker in run.workers
    ]
    parts += _grid("Workers", ["name", "state", "heartbeat", "in flight", "where"], rows)
    rows = [[e.error_kind, str(e.n), _clock(e.at), e.task_id, e.message] for e in run.errors]
    parts += _grid("Errors in the log", ["kind", "n", "last", "task", "message"], rows)
    return Group(*parts)


def _driver_line(driver: Process | None) -> str:
    if driver is None:
        return "driver: none has held this run"
    return f"driver: {driver.life}, {driver.where}, last heartbeat {driver.heartbeat_s:.0f} s ago"


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


def _spending_lines(spending: Spending | None) -> list[str]:
    if spending is None:
        return []
    recent = f"last {spending.over_s / 60:g} min:"
    lines = [
        f"cost: {usd(spending.cost_usd)} so far; {recent} {usd(spending.recent_cost_usd)}, "
        f"{number(spending.recent_calls)} calls ended, {number(spending.recent_results)} tasks done"
    ]
    if spending.errors:
        share = percent(spending.recent_errors / spending.recent_calls if spending.recent_calls else None)
        lines.append(f"errors: {number(spending.errors)} calls so far; {recent} {share} of the calls")
    return lines


def _budget_lines(budget: Budget | None) -> list[str]:
    if budget is None:
        return []
    share = percent(budget.spent_usd / budget.limit_usd if budget.limit_usd else None)
    return [f"limits.run_cost_usd: {usd(budget.spent_usd)} of {usd(budget.limit_usd)} spent ({share})"]


def _limit_row(route: RouteLimit) -> list[str]:
    shared = "" if route.all_runs is None else f" of {number(route.all_runs)} ({route.runs} runs)"
    row = [
        route.model,
        route.endpoint,
        number(route.limit) + shared,
        DASH if route.open is None else number(route.open),
    ]
    change = route.changed
    if change is None:
        return [*row, DASH, DASH, DASH]
    return [*row, _clock(change.at), DASH if change.old is None else number(change.old), change.reason]


def _task_row(slow: SlowTask) -> list[str]:
    task = f"{slow.task.task_id} trial {slow.task.trial} attempt {slow.task.attempt}"
    if slow.waits_for is None:
        return [duration(slow.age_s), task, DASH, "no call that is named"]
    call = slow.waits_for.call
    return [duration(slow.age_s), task, str(call.turn), f"{_what(call)}, {duration(slow.waits_for.age_s)}"]


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


def _grid(
    title: str, names: Sequence[str], rows: Sequence[Sequence[str]], style: str = ""
) -> list[RenderableType]:
    """A table, or nothing where it has no row. Cells are Text: a name with brackets is no markup."""
    if not rows:
        return []
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, style=style
    )
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell, 120)) for cell in row))
    return [table]
