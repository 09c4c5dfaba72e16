"""What is known of a run before it goes on: its tasks' durations, a forecast, the bottleneck, its power.

Reads event logs; `foresight.py` computes. A forecast is made anew from the log whenever it is asked for, and
the one that a command started with stands in its `run_start`, so that the end can be held against it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_app import events, foresight, object_store, ordering, route_limits
from ray_app.config import BaseRun
from ray_app.errors import RunDirError
from ray_app.foresight import Forecast, Load, Place, Range, Rest, Sample
from ray_app.ordering import Asked, Durations
from ray_app.planning import Plan
from ray_app.records import Task

if TYPE_CHECKING:
    from ray_app.driver import Job

Row = Mapping[str, Any]
# A judge that follows the task's own limit; see `driver`.
JUDGE_S = 120.0
JUDGED = ("ok", "limited")
# Of two runs as different as chance would make them, without a prior run to pair with; at its widest.
UNKNOWN_ACCURACY = 0.5


@dataclass(frozen=True, slots=True)
class RouteUse:
    """A model at an address while tasks ran: its calls, their seconds, its last limit (None: not told)."""

    model: str
    endpoint: str
    calls: int
    call_s: float
    limit: int | None


@dataclass(frozen=True)
class History:
    """Of a run: the results that count, seconds from first start to last result by command, its routes.

    `waited_s`: the longest that the calls of one attempt waited to go out.
    """

    results: Sequence[Row]
    spans_s: Mapping[int, float]
    routes: Sequence[RouteUse]
    waited_s: float = 0.0

    @property
    def measured(self) -> list[Row]:
        """What failed says nothing of how long a task takes."""
        return [row for row in self.results if row["outcome"] != "failed" and row["duration_s"]]

    @property
    def spent_usd(self) -> float:
        return sum(row["cost_usd"] or 0.0 for row in self.results)


@dataclass(frozen=True)
class Outlook:
    """A forecast and its origin. `wall_before_s` and `spent_usd` are what the run has used already."""

    told: Forecast
    left: int
    planned: int
    wall_before_s: float
    spent_usd: float
    basis: str

    def content(self) -> dict[str, Any]:
        """For the log."""
        return {
            "left": self.left,
            "wall_s": list(self.told.wall_s),
            "cost_usd": list(self.told.cost_usd),
            "basis": self.basis,
        }

    def lines(self) -> Iterator[str]:
        wall, cost = self.told
        yield f"Forecast (90% intervals, {self.basis}):"
        yield f"  the {self.left:,} left: {_dollars(cost)}, {_hours(wall)} from first start to last end"
        if self.left < self.planned:
            whole = _dollars(cost.plus(self.spent_usd)), _hours(wall.plus(self.wall_before_s))
            yield f"  all {self.planned:,}: {whole[0]}, {whole[1]}"


def history(run_dir: Path) -> History | None:
    """None where there is no log, or no result in it."""
    if not (run_dir / "log").is_dir():
        return None
    results = events.results(run_dir).to_pylist()
    if not results:
        return None
    spans = """
        select epoch, epoch_us(max(t_start) filter (kind = 'result')) / 1e6
            - epoch_us(min(t_start) filter (kind = 'attempt')) / 1e6
        from events group by epoch
    """
    routes = f"""
        select model, endpoint, count(*) filter (kind = 'model_call'),
            coalesce(sum(duration_s - coalesce(queue_s, 0)) filter (kind = 'model_call'), 0),
            arg_max(detail, t_start) filter (kind = 'limit')
        from events
        where kind in ('model_call', 'limit') and not coalesce(is_replayed, false)
            and not {events.SECOND_OPINION}
        group by model, endpoint
    """
    waits = f"""
        select coalesce(max(waited_s), 0.0) from (
            select sum(queue_s) as waited_s from events
            where kind = 'model_call' and not coalesce(is_replayed, false) and not {events.SECOND_OPINION}
            group by epoch, rollout_key, trial, attempt
        )
    """
    with events.connect(run_dir) as log:
        seconds = {epoch: max(0.0, span) for epoch, span in log.execute(spans).fetchall() if span}
        used = [
            RouteUse(model, endpoint, calls, call_s, _limit(detail))
            for model, endpoint, calls, call_s, detail in log.execute(routes).fetchall()
        ]
        waited_s = float(log.execute(waits).fetchall()[0][0])
    return History(results, seconds, [use for use in used if use.calls], waited_s)


def _limit(detail: str | None) -> int | None:
    """Of a `limit` event; None where there is none that can be read."""
    try:
        return int(json.loads(detail or "")["new"])
    except (ValueError, TypeError, KeyError):
        return None


def prior(asked: Asked) -> History | None:
    """The run of `--durations-from`. Raises RunDirError where it has no result."""
    if asked.durations_from is None:
        return None
    found = history(object_store.local(asked.durations_from))
    if found is None:
        raise RunDirError(f"--durations-from {asked.durations_from}: expected a run with results in its log")
    return found


def durations(*runs: History | None) -> Durations:
    """Seconds by task, means over trials; a later run's count before an earlier one's."""
    by_key: dict[str, float] = {}
    by_id: dict[str, float] = {}
    for run in runs:
        rows = run.measured if run else []
        for found, column in ((by_key, "rollout_key"), (by_id, "task_id")):
            totals: dict[str, list[float]] = {}
            for row in rows:
                totals.setdefault(row[column], []).append(row["duration_s"])
            found |= {name: sum(each) / len(each) for name, each in totals.items()}
    return Durations(by_key, by_id)


def arranged(job: Job, work: Plan, results: Sequence[Row], asked: Asked) -> Plan:
    """`work` in the order that durations say, with what is not for this command set aside.

    `results` are those that count in this run.
    """
    known = durations(prior(asked), History(results, {}, ()))
    return ordering.arranged(work, job.tasks, asked, known)


def outlook(job: Job, work: Plan, asked: Asked) -> Outlook | None:
    """A forecast of all that is left, from this run's tasks, else from those of `--durations-from`."""
    if job.replays is not None:
        return None
    own, before = history(job.run_dir), prior(asked)
    basis = own if own and len(own.measured) >= foresight.FEWEST else before
    if basis is None or not work.left:
        return None
    known = durations(before)
    tasks = {task.rollout_key: task for task in job.tasks}
    left = [item.task for item in ordering.order(work.left, asked, durations(before, own))]
    place = Place(job.config.concurrency, _longest_s(job.config, basis), _loads(job.config, basis))
    told = foresight.forecast(sample(basis.measured, tasks, known), _rest(left, known), place, asked.seed)
    if told is None:
        return None
    source = "finished tasks of this run" if basis is own else f"tasks of {asked.durations_from}"
    used = (sum(own.spans_s.values()), own.spent_usd) if own else (0.0, 0.0)
    words = f"from {len(basis.measured):,} {source}"
    return Outlook(told, len(left), work.kept.planned, *used, words)


def sample(rows: Sequence[Row], tasks: Mapping[str, Task], known: Durations) -> Sample:
    found = [tasks.get(row["rollout_key"]) for row in rows]
    return Sample(
        [f"{row['category'] or ''} / {row['answer_type'] or ''}" for row in rows],
        np.array([row["duration_s"] for row in rows]),
        np.array([row["cost_usd"] or 0.0 for row in rows]),
        np.array([(known.of(task) if task else None) or np.nan for task in found]),
    )


def _rest(tasks: Sequence[Task], known: Durations) -> Rest:
    return Rest(
        [ordering.stratum(task) for task in tasks], np.array([known.of(task) or np.nan for task in tasks])
    )


def _longest_s(config: BaseRun, seen: History) -> float | None:
    """A task's limit is of its own time, its duration is not: waits come on top, by what was measured."""
    if config.limits.wall_s is None:
        return None
    measured_s: float = max(row["duration_s"] for row in seen.measured)
    return max(measured_s, config.limits.wall_s + JUDGE_S + seen.waited_s)


def _loads(config: BaseRun, seen: History) -> tuple[Load, ...]:
    """Of each model: calls open per running task as measured, and the most that its endpoints may have."""
    task_s = sum(row["duration_s"] for row in seen.measured)
    found = []
    for name in config.models_used():
        call_s = sum(use.call_s for use in seen.routes if use.model == name)
        most = sum(route_limits.endpoint_bounds(one).most for one in config.models[name].endpoints)
        found.append(Load(call_s / task_s, most))
    return tuple(found)


def bottleneck(config: BaseRun, seen: History) -> str:
    """What was busiest while tasks ran, and what all slots together would ask of it."""
    span_s = sum(seen.spans_s.values())
    rows = seen.measured
    if span_s <= 0 or not rows:
        return ""
    task_s = sum(row["duration_s"] for row in rows)
    slots = min(config.concurrency, len(rows))
    busiest = f"places for tasks ({slots} at once), {_percent(task_s / (slots * span_s))} busy"
    most = task_s / (slots * span_s)
    for use in seen.routes:
        share = use.call_s / (use.limit * span_s) if use.limit else 0.0
        if share > most:
            most = share
            busiest = (
                f"{use.model} at {use.endpoint}, {_percent(share)} of its limit of {use.limit} calls busy"
            )
    wants = [
        f"{use.model} at {use.endpoint}: about {use.call_s / task_s * config.concurrency:.0f} calls at once "
        f"with all places taken, its limit was {use.limit} at last"
        for use in seen.routes
        if use.limit and use.call_s / task_s * config.concurrency > use.limit
    ]
    return "\n".join([f"Bottleneck so far: {busiest}", *(f"  beyond its limit: {line}" for line in wants)])


def power(planned: int, own: History | None, before: History | None, name: str) -> str:
    """Below which difference a comparison of `planned` tasks will be *cannot tell*."""
    from analysis.paired import POWER, detectable_difference  # statistics that no other part of a job needs

    right = {row["rollout_key"]: bool(row["is_correct"]) for row in _judged(own)}
    other = {row["rollout_key"]: bool(row["is_correct"]) for row in _judged(before)}
    pairs = [right[key] != other[key] for key in right.keys() & other.keys()]
    if len(pairs) >= foresight.FEWEST:
        # As Bonett and Price's interval: one task each way more.
        discordance, words = (sum(pairs) + 2) / (len(pairs) + 2), f"as {len(pairs)} tasks of both differ"
    else:
        known = right or other
        accuracy = (sum(known.values()) + 1) / (len(known) + 2) if known else UNKNOWN_ACCURACY
        discordance = 2 * accuracy * (1 - accuracy)
        words = f"were they independent at {_percent(accuracy)} right; fewer points if they agree more"
    least = detectable_difference(planned, discordance)
    if least is None:
        return f"At n={planned:,} no difference from {name} would be found"
    return (
        f"At n={planned:,} a difference under {100 * least:.1f} points from {name} will rather be *cannot "
        f"tell* ({POWER:.0%} power; {words})"
    )


def _judged(run: History | None) -> list[Row]:
    return [row for row in run.results if row["outcome"] in JUDGED] if run else []


def page(job: Job, work: Plan, asked: Asked) -> list[str]:
    """The lines of `--plan`, and of the end of a pilot."""
    own, before = history(job.run_dir), prior(asked)
    found = outlook(job, work, asked)
    lines = list(found.lines()) if found else []
    if seen := own or before:
        lines += [line for line in bottleneck(job.config, seen).splitlines() if line]
    name = str(asked.durations_from) if asked.durations_from else "another run"
    return [*lines, power(len(job.tasks), own, before, name)]


def _dollars(cost: Range) -> str:
    return f"${cost.middle:,.2f} (${cost.low:,.2f} to ${cost.high:,.2f})"


def _hours(wall: Range) -> str:
    return f"{_clock(wall.middle)} ({_clock(wall.low)} to {_clock(wall.high)})"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _percent(share: float) -> str:
    return f"{share:.0%}"
