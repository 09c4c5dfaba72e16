"""Where the wall clock of a run went: what set its end, its tail, its idle slots; tasks' time by stage.

Looks at one segment at a time. A task's span goes from the start of its attempt to its committed result; the
slots of a segment are the most attempts that ran at once. Stages are disjoint: `queue` is the wait of any
model call for a place, `orchestrator`, `expert`, `user` and `judge` are the rest of such a call,
`environment` is the tools of a dialogue, `other` is what no call accounts for (our own work, waits for a
free process, a result on its way).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from analysis import schedule
from analysis.log import CALLS, SPANS, STAGES, Floats, Ints, Mask, RunLog
from analysis.numbers import quantiles
from analysis.timing import MODEL_STAGES, stage_masks

STAGE_NAMES = ("queue", *MODEL_STAGES[:-1], "environment", "retrieval", "web", "code", "judge", "other")
COLUMNS = (*SPANS, *STAGES, "outcome", "endpoint", "call_seq")
DONE_AT = (0.5, 0.9, 0.95, 0.99, 1.0)
SHOWN = 20
END_SHARE = 0.05  # of the clock, at whose end the waits are asked for


@dataclass(frozen=True, slots=True)
class TaskPath:
    """One attempt at a task: seconds since the segment's start, and its time by stage.

    `outcome` is empty where no result was committed.
    """

    task_id: str
    trial: int
    attempt: int
    worker: str
    outcome: str
    turns: int
    start_s: float
    end_s: float
    total_s: float
    stages: dict[str, float]


@dataclass(frozen=True, slots=True)
class Phases:
    """The segment's wall clock, in seconds that add up to its length.

    Before the first task; while tasks were left to start; the tail, from the last start to the last end; and
    what came after the last task.
    """

    before: float
    filling: float
    tail: float
    after: float


@dataclass(frozen=True, slots=True)
class TheEnd:
    """The last END_SHARE of the time from first start to last end: what was under way in it.

    `stages` are seconds of attempts within it, `routes` those of calls by model and address,
    or by stage, the most first; `tasks` are the attempts that ran in it, the last to end first.
    """

    seconds: float
    attempts: int
    stages: dict[str, float]
    routes: dict[str, float]
    tasks: list[TaskPath]


@dataclass(frozen=True)
class Gantt:
    """What the timeline draws: attempts and calls as arrays, in seconds since the segment's start."""

    starts: Floats
    ends: Floats
    workers: Sequence[str]
    worker_of: Ints
    call_attempt: Ints
    call_row: Ints
    call_stage: Ints
    call_starts: Floats
    call_ends: Floats
    chain: Ints


@dataclass(frozen=True)
class SegmentPath:
    """One segment. Slot seconds are `slots` times the time from the first task's start to the last one's end.

    `ideal_s` is the least that this work can take on these slots: the mean load, or the longest task.
    `done_at_s` says after how many seconds 50, 90, 95, 99 and 100 % of the attempts had ended. `chain` are
    the attempts that set the end, one after the other on free slots, `chain_stages` their time by stage.
    """

    epoch: int
    attempts: int
    slots: int
    wall_s: float
    phases: Phases
    work_s: float
    ideal_s: float
    busy_share: float
    idle_filling_s: float
    idle_tail_s: float
    stages: dict[str, float]
    done_at_s: dict[str, float]
    straggler_s: float
    chain: list[TaskPath]
    chain_gaps_s: float
    chain_stages: dict[str, float]
    end: TheEnd
    slowest: list[TaskPath]
    gantt: Gantt = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """What `python -m analysis critical-path` prints; `note` says why there is nothing, where that is so."""

    run: str
    note: str
    segments: list[SegmentPath]


class _Attempts(NamedTuple):
    """The attempts of a segment as arrays; `of_row` says of each row of the log which one it is of, or -1."""

    of_row: Ints
    first_row: Ints
    starts: Floats
    ends: Floats
    worker: Ints
    result_row: Ints
    turns: Ints
    stages: Floats  # (attempts, STAGE_NAMES)


def critical_path(log: RunLog, shown: int = SHOWN) -> CriticalPath:
    """Each segment that is asked for; `shown` tasks at most are listed as the slowest."""
    epochs = log.epochs if log.selection.all_runs else log.epochs[-1:]
    found = [] if log.absence else [_segment(log, int(epoch), shown) for epoch in epochs]
    segments = [segment for segment in found if segment is not None]
    return CriticalPath(log.name, "" if segments else (log.absence or log.no("task")), segments)


def _segment(log: RunLog, epoch: int, shown: int) -> SegmentPath | None:
    in_epoch = log.ints("epoch") == epoch
    live = log.live & in_epoch
    attempts, zero, calls = _attempts(log, log.tasks & in_epoch)
    if attempts is None:
        return None
    starts, ends = attempts.starts, attempts.ends
    marks = log.ints("t_start")[live] / 1e6 - zero
    first, last_start, last = float(starts.min()), float(starts.max()), float(ends.max())
    final = max(last, float(marks.max()))
    slots = schedule.peak(starts, ends)
    links = schedule.chain(starts, ends)
    spans = ends - starts
    work = float(spans.sum())
    stages = attempts.stages.sum(0)
    order = np.argsort(-spans, kind="stable")[:shown].tolist()
    chained = [link.span for link in links]
    idle = [
        max(0.0, slots * (high - low) - schedule.busy_s(starts, ends, low, high))
        for low, high in ((first, last_start), (last_start, last))
    ]
    done = quantiles(ends - first, DONE_AT).tolist()
    gantt = _gantt(log, attempts, calls, zero, np.array(chained))
    return SegmentPath(
        epoch=epoch,
        attempts=len(starts),
        slots=slots,
        wall_s=final,
        phases=Phases(first, last_start - first, last - last_start, final - last),
        work_s=work,
        ideal_s=max(work / slots, float(spans.max())),
        busy_share=work / (slots * (last - first)) if last > first else 1.0,
        idle_filling_s=idle[0],
        idle_tail_s=idle[1],
        stages=_named(stages),
        done_at_s={f"{fraction:.0%}": value for fraction, value in zip(DONE_AT, done, strict=True)},
        straggler_s=float(last - np.partition(ends, -2)[-2]) if len(ends) > 1 else float(spans.max()),
        chain=[_task(log, attempts, span) for span in chained],
        chain_gaps_s=sum(link.gap_s for link in links),
        chain_stages=_named(attempts.stages[chained].sum(0)),
        end=_end(log, attempts, gantt, shown),
        slowest=[_task(log, attempts, span) for span in order],
        gantt=gantt,
    )


def _end(log: RunLog, attempts: _Attempts, gantt: Gantt, shown: int) -> TheEnd:
    last = float(attempts.ends.max())
    low = last - END_SHARE * (last - float(attempts.starts.min()))
    there = np.flatnonzero(attempts.ends > low)
    whole = schedule.busy_s(attempts.starts, attempts.ends, low, last)
    within = np.minimum(gantt.call_ends, last) - np.maximum(gantt.call_starts, low)
    within = np.where(gantt.call_attempt >= 0, np.clip(within, 0.0, None), 0.0)
    stages: Floats = np.bincount(gantt.call_stage, within, minlength=len(STAGE_NAMES)).astype(float)
    stages[-1] = max(0.0, whole - float(stages[:-1].sum()))
    routes: dict[str, float] = {}
    models, endpoints = log.words("model"), log.words("endpoint")
    for call in np.flatnonzero(within > 0).tolist():
        row, stage = int(gantt.call_row[call]), STAGE_NAMES[int(gantt.call_stage[call])]
        model, endpoint = (words.names[words.codes[row]] for words in (models, endpoints))
        name = f"{model} at {endpoint}" if model and endpoint else model or stage
        routes[name] = routes.get(name, 0.0) + float(within[call])
    latest = there[np.argsort(-attempts.ends[there], kind="stable")][:shown].tolist()
    return TheEnd(
        seconds=last - low,
        attempts=len(there),
        stages=_named(stages),
        routes=dict(sorted(routes.items(), key=lambda item: -item[1])),
        tasks=[_task(log, attempts, span) for span in latest],
    )


def _attempts(log: RunLog, mask: Mask) -> tuple[_Attempts | None, float, Mask]:
    """The attempts, the segment's start (Unix seconds), and the rows of the calls within them."""
    tasks = log.words("task_id")
    rows = np.flatnonzero(mask & ~tasks.is_in(""))
    if not len(rows):
        return None, 0.0, mask
    began = log.ints("t_start")[rows]
    zero = (
        float(log.ints("t_start")[log.live & (log.ints("epoch") == log.ints("epoch")[rows[0]])].min()) / 1e6
    )
    group, size = _numbered(log, rows)
    starts, ends = np.full(size, np.inf), np.full(size, -np.inf)
    at = began / 1e6 - zero
    is_result = log.kind("result")[rows]
    spans = np.where(is_result, 0.0, np.nan_to_num(log.numbers("duration_s")[rows]))
    np.minimum.at(starts, group, at)
    np.maximum.at(ends, group, at + spans)
    first_row, worker, result_row = np.zeros(size, np.int64), np.zeros(size, np.int64), np.full(size, -1)
    first_row[group] = rows
    has_worker = ~log.words("worker").is_in("")[rows]
    worker[:] = -1
    worker[group[has_worker]] = log.words("worker").codes[rows[has_worker]]
    result_row[group[is_result]] = rows[is_result]
    turns = np.bincount(group[log.kind("turn")[rows]], minlength=size)
    of_row = np.full(len(log), -1)
    of_row[rows] = group
    stages = _stages(log, rows, group, size, ends - starts)
    found = _Attempts(of_row, first_row, starts, ends, worker, result_row, turns, stages)
    return found, zero, mask & log.kind(*CALLS)


def _numbered(log: RunLog, rows: Ints) -> tuple[Ints, int]:
    """Of each row the number of its attempt, and how many attempts there are."""
    trial, attempt = log.ints("trial")[rows], log.ints("attempt")[rows]
    key = log.words("task_id").codes[rows].astype(np.int64)
    key = (key * (int(trial.max()) + 1) + trial) * (int(attempt.max()) + 1) + attempt
    _, group = np.unique(key, return_inverse=True)
    return group, int(group.max()) + 1


def _stages(log: RunLog, rows: Ints, group: Ints, size: int, spans: Floats) -> Floats:
    found = np.zeros((size, len(STAGE_NAMES)))
    duration, queue = log.numbers("duration_s")[rows], np.nan_to_num(log.numbers("queue_s")[rows])
    for name, mask in stage_masks(log).items():
        here = mask[rows]
        waits = queue[here] if name in MODEL_STAGES else 0.0
        whole = np.nan_to_num(duration[here])
        found[:, STAGE_NAMES.index(name)] = np.bincount(group[here], whole - waits, minlength=size)
        if name in MODEL_STAGES:
            found[:, 0] += np.bincount(group[here], waits, minlength=size)
    found[:, -1] = np.clip(spans - found.sum(1), 0.0, None)
    return found


def _task(log: RunLog, attempts: _Attempts, span: int) -> TaskPath:
    row, result = int(attempts.first_row[span]), int(attempts.result_row[span])
    workers, tasks, outcomes = log.words("worker"), log.words("task_id"), log.words("outcome")
    worker = int(attempts.worker[span])
    start, end = float(attempts.starts[span]), float(attempts.ends[span])
    return TaskPath(
        task_id=tasks.names[tasks.codes[row]],
        trial=int(log.ints("trial")[row]),
        attempt=int(log.ints("attempt")[row]),
        worker=workers.names[worker] if worker >= 0 else "",
        outcome=outcomes.names[outcomes.codes[result]] if result >= 0 else "",
        turns=int(attempts.turns[span]),
        start_s=start,
        end_s=end,
        total_s=end - start,
        stages=_named(attempts.stages[span]),
    )


def _named(values: Floats) -> dict[str, float]:
    return dict(zip(STAGE_NAMES, values.tolist(), strict=True))


def _gantt(log: RunLog, attempts: _Attempts, calls: Mask, zero: float, chained: Ints) -> Gantt:
    """Calls as spans of their stages; that of a model call begins with its wait in the queue."""
    workers, parts = log.words("worker"), list[tuple[Ints, Ints, int, Floats, Floats]]()
    queue = np.nan_to_num(log.numbers("queue_s"))
    for name, mask in stage_masks(log).items():
        rows = np.flatnonzero(mask & calls)
        begin = log.ints("t_start")[rows] / 1e6 - zero
        end = begin + np.nan_to_num(log.numbers("duration_s")[rows])
        of = attempts.of_row[rows]
        if name in MODEL_STAGES:
            served = np.minimum(begin + queue[rows], end)
            parts.append((of, rows, 0, begin, served))
            begin = served
        parts.append((of, rows, STAGE_NAMES.index(name), begin, end))
    used = sorted({*attempts.worker.tolist()})
    names = [workers.names[code] if code >= 0 else "" for code in used]
    return Gantt(
        starts=attempts.starts,
        ends=attempts.ends,
        workers=names,
        worker_of=np.searchsorted(used, attempts.worker),
        call_attempt=np.concatenate([part[0] for part in parts]),
        call_row=np.concatenate([part[1] for part in parts]),
        call_stage=np.concatenate([np.full(len(part[0]), part[2]) for part in parts]),
        call_starts=np.concatenate([part[3] for part in parts]),
        call_ends=np.concatenate([part[4] for part in parts]),
        chain=chained,
    )


def shares(stages: Mapping[str, float]) -> dict[str, float]:
    """The stages as fractions of their sum; empty where that is nothing."""
    whole = sum(stages.values())
    return {name: value / whole for name, value in stages.items()} if whole > 0 else {}
