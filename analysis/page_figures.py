"""A run's figures as a page wants them: plain tables with typed columns, and the numbers behind its plots.

A column's kind says how its values are written and sorted: `name`, `int`, `number` (three digits), `s`
(seconds), `share` (a fraction), `usd`, `time` (Unix seconds), `task` (an id that leads to the task).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis import schedule
from analysis.critical_path import STAGE_NAMES, SegmentPath, TaskPath, critical_path, shares
from analysis.log import RunLog
from analysis.numbers import PERCENTILES, Interval, quantiles
from analysis.path_table import fact_rows
from analysis.report import sentence
from analysis.simulations import MEAN, simulations
from analysis.summary import GroupRow, RunSummary, Segment, summarise
from analysis.tables import overview_rows
from analysis.timing import GROUPS, PARTS, Timing, timing
from analysis.usage import Usage, tool_table, usage

CURVE = np.linspace(0, 1, 41)
MOMENTS = 240  # of a segment, at which it is drawn what its tasks do
BINS = 10


@dataclass(frozen=True)
class Figures:
    """What of a run as a whole stands on its page."""

    content: dict[str, Any]
    run: RunSummary


def figures_of(log: RunLog) -> Figures:
    """All figures of the run."""
    run, times, used = summarise(log), timing(log), usage(log)
    segments = critical_path(log).segments
    content: dict[str, Any] = {
        "sentence": sentence(run),
        "facts": overview_rows(run),
        "notes": run.notes,
        "outcomes": _outcomes(run),
        "reliability": _reliability(log),
        "overview": [
            _groups("By category", "category", run.by_category),
            _groups("By answer type", "answer type", run.by_answer_type),
            _kinds("Failures", run.failures),
            _kinds("Limits reached", run.limits),
            *_simulations(log),
            _segments(run.segments),
        ],
        "timing": [_timing(title, group, times) for group, title in GROUPS.items()],
        "curves": [_curve(times, place) for place in range(len(times.rows))],
        "parts": PARTS,
        "components": [asdict(row) for row in times.components],
        "usage": [_tools(log), _usage(used)],
        "stages": STAGE_NAMES,
        "segments": [_segment(segment) for segment in segments],
    }
    content["overview"] = [table for table in content["overview"] if table["rows"]]
    content["timing"] = [table for table in content["timing"] if table["rows"]]
    return Figures(rounded(content), run)


def rounded(value: Any) -> Any:
    """`value` with floats of twelve digits, below which lies only noise."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _table(title: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    return {
        "title": title,
        "columns": [list(column) for column in columns],
        "rows": [list(row) for row in rows],
    }


def _outcomes(run: RunSummary) -> list[tuple[str, int]]:
    account = run.accounting
    wrong = account.ok - account.correct
    rest = [(name, getattr(account, name)) for name in ("limited", "failed", "owed", "pending")]
    return [("right", account.correct), ("wrong", wrong), *rest]


def _groups(title: str, label: str, rows: Sequence[GroupRow]) -> dict[str, Any]:
    counts = [(name, "int") for name in ("n", "correct", "failed", "limited", "owed")]
    columns = [(label, "name"), *counts, ("accuracy", "share")]
    columns += [(f"{name} {end}", "share") for name in ("Wilson", "Wald") for end in ("low", "high")]
    return _table(
        title,
        columns,
        (
            [
                *(row.name, row.n, row.correct, row.failed, row.limited, row.owed, row.accuracy),
                *(row.interval.low, row.interval.high, row.wald.low, row.wald.high),
            ]
            for row in rows
        ),
    )


def _simulations(log: RunLog) -> list[dict[str, Any]]:
    """Of a tau2 run what its dialogues came to, by domain."""
    found = simulations(log)
    if found.overall is None or log.facts.get("benchmark") != "tau2":
        return []
    rows = [*found.domains, *([found.overall] if len(found.domains) > 1 else [])]
    groups = [(row.name, row.pass_hat) for row in rows]
    groups += [(MEAN, found.mean_of_domains)] if found.mean_of_domains else []
    columns = [("domain", "name"), ("k", "int"), ("tasks", "int"), ("pass^k", "share")]
    columns += [("95% low", "share"), ("95% high", "share")]
    lines = [
        [name, each.k, each.tasks, each.value, *_ends(each.interval)] for name, own in groups for each in own
    ]
    names = list(dict.fromkeys(reason for row in reversed(rows) for reason in row.reasons))
    reasons = [[row.name, *(row.reasons.get(name, 0) for name in names)] for row in rows]
    return [
        _table("pass^k", columns, lines),
        _table("How dialogues ended", [("domain", "name"), *((name, "int") for name in names)], reasons),
    ]


def _ends(interval: Interval | None) -> list[float | None]:
    return [None, None] if interval is None else [interval.low, interval.high]


def _kinds(title: str, kinds: dict[str, int]) -> dict[str, Any]:
    return _table(title, [("kind", "name"), ("tasks", "int")], kinds.items())


def _segments(segments: Sequence[Segment]) -> dict[str, Any]:
    columns = [("epoch", "int"), ("began", "time"), ("at work", "s"), ("results", "int"), ("calls", "int")]
    columns += [("tokens", "int"), ("cost", "usd"), ("end", "name")]
    ends = {True: "ended", False: "none seen"}
    return _table(
        "Segments",
        columns,
        (
            [
                *(row.epoch, row.began, row.wall_s, row.results, row.model_calls, row.tokens),
                *(row.cost_usd, ends[row.is_ended]),
            ]
            for row in segments
        ),
    )


def _reliability(log: RunLog) -> list[dict[str, float]]:
    """Judged answers by rising confidence, in bins of equal count: mean confidence and share of right."""
    results = log.results
    sure, right = results.numbers("confidence"), results.numbers("is_correct")
    judged = ~np.isnan(sure) & ~np.isnan(right)
    order = np.argsort(sure[judged], kind="stable")
    bins = np.array_split(order, min(BINS, len(order)) or 1)
    return [
        {
            "confidence": float(sure[judged][own].mean()),
            "right": float(right[judged][own].mean()),
            "n": len(own),
        }
        for own in bins
        if len(own)
    ]


def _timing(title: str, group: str, times: Timing) -> dict[str, Any]:
    places = [place for place, row in enumerate(times.rows) if row.group == group]
    has_times = bool(places) and times.rows[places[0]].unit == "s"
    kind = "s" if has_times else "number"
    names = ["mean", "std", "min", *(f"p{point}" for point in PERCENTILES), "max"]
    columns = [("name", "curve"), ("n", "int"), *((name, kind) for name in names)]
    columns += [("under 5 s", "share"), ("errors", "int")] if has_times else []
    rows = []
    for place in places:
        row = times.rows[place]
        more = [row.stats.share_under_5s, row.errors] if has_times else []
        rows.append([[row.name, place], row.stats.n, *(getattr(row.stats, name) for name in names), *more])
    return _table(f"{title} ({'seconds' if has_times else 'tokens'})", columns, rows)


def _curve(times: Timing, place: int) -> dict[str, Any]:
    """The distribution of a row: bins, and the value below which each fraction of CURVE lies."""
    row, values = times.rows[place], times.series[place].values
    bins = {
        name: {"edges": found.edges, "counts": found.counts}
        for name, found in (("linear", row.hist_linear), ("log", row.hist_log))
        if found is not None
    }
    curve = quantiles(values, CURVE).tolist() if len(values) else []
    return {"title": row.title, "unit": row.unit, "n": row.stats.n, "bins": bins, "curve": curve}


def _tools(log: RunLog) -> dict[str, Any]:
    columns = [("tool", "name"), ("calls", "int"), ("share", "share"), ("errors", "int")]
    columns += [(name, "s") for name in ("mean", "p50", "p90", "p99")] + [("tokens", "int"), ("cost", "usd")]
    rows = tool_table(log) if log.absence is None else []
    return _table(
        "By tool and other kind of work",
        columns,
        (
            [
                *(row.name, row.calls, row.share, row.errors, row.mean_s, row.p50_s, row.p90_s, row.p99_s),
                *(row.tokens, row.cost_usd),
            ]
            for row in rows
        ),
    )


def _usage(used: Usage) -> dict[str, Any]:
    columns = [("tool", "name"), ("model", "name"), ("calls", "int"), ("of the tool", "share")]
    columns += [("of all", "share"), ("errors", "int"), ("success", "share"), ("prompt", "int")]
    columns += [("cached", "int"), ("completion", "int"), ("cost", "usd")]
    return _table(
        "By tool and model",
        columns,
        (
            [
                *(row.tool, row.model, row.calls, row.share, row.share_of_all, row.errors, row.success),
                *(row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.cost_usd),
            ]
            for row in used.rows
        ),
    )


def _segment(segment: SegmentPath) -> dict[str, Any]:
    every, chain = shares(segment.stages), shares(segment.chain_stages)
    stages = [
        [name, segment.stages[name], every.get(name), segment.chain_stages[name], chain.get(name)]
        for name in STAGE_NAMES
    ]
    columns = [("stage", "name"), ("all tasks", "s"), ("share", "share"), ("on the chain", "s")]
    return {
        "epoch": segment.epoch,
        "slots": segment.slots,
        "facts": fact_rows(segment),
        "running": _running(segment),
        "tables": [
            _table("Where task time went", [*columns, ("share of it", "share")], stages),
            _paths("The chain of tasks that set the end", segment.chain),
            _paths("Slowest attempts", segment.slowest),
        ],
        "slowest": [{"id": one.task_id, "stages": list(one.stages.values())} for one in segment.slowest],
    }


def _paths(title: str, tasks: Sequence[TaskPath]) -> dict[str, Any]:
    columns = [
        ("task", "task"),
        ("trial", "int"),
        ("attempt", "int"),
        ("worker", "name"),
        ("outcome", "name"),
    ]
    columns += [("began", "s"), ("took", "s"), ("turns", "int"), *((name, "share") for name in STAGE_NAMES)]
    rows = []
    for one in tasks:
        part = shares(one.stages)
        where = [one.task_id, one.trial, one.attempt, one.worker, one.outcome, one.start_s, one.total_s]
        rows.append([*where, one.turns, *(part.get(name) for name in STAGE_NAMES)])
    return _table(title, columns, rows)


def _running(segment: SegmentPath) -> dict[str, Any]:
    """How many tasks are in each stage at MOMENTS times of the segment; `other` is the rest."""
    gantt, stages = segment.gantt, len(STAGE_NAMES)
    span = max(float(gantt.ends.max()), 1e-3)
    place = gantt.call_stage.astype(np.int64)
    filled = schedule.occupancy(place, gantt.call_starts, gantt.call_ends, (stages, MOMENTS), 0.0, span)
    every = np.zeros(len(gantt.starts), np.int64)
    whole = schedule.occupancy(every, gantt.starts, gantt.ends, (1, MOMENTS), 0.0, span)[0]
    filled[-1] = np.clip(whole - filled[:-1].sum(0), 0.0, None)
    return {
        "span_s": span,
        "last_start_s": float(gantt.starts.max()),
        "stages": [[float(f"{value:.3g}") for value in row] for row in filled.tolist()],
    }
