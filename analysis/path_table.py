"""The critical path as tables for the command line. Nothing is computed here but shares."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.critical_path import STAGE_NAMES, CriticalPath, SegmentPath, TaskPath, shares
from analysis.tables import add_row, table_of
from analysis.text import DASH, duration, number, percent, plain

CHAIN_SHOWN = 12
LEAST_SHARE = 0.0005  # would print as 0.0%


def page(found: CriticalPath) -> RenderableType:
    """Each segment: the clock, the slots, what set the end, the slowest tasks."""
    if not found.segments:
        return Text(found.note)
    parts: list[RenderableType] = [Text(plain(found.run, 120), style="bold")]
    for segment in found.segments:
        parts += [_facts(segment), _stages(segment), *_tasks(segment)]
    return Group(*parts)


def _facts(segment: SegmentPath) -> Table:
    title = Text(f"Segment {segment.epoch}", style="bold")
    table = Table(box=None, show_header=False, title=title, title_justify="left")
    for name, value in fact_rows(segment):
        table.add_row(Text(name, style="" if name.startswith(" ") else "bold"), Text(value))
    return table


def fact_rows(segment: SegmentPath) -> list[tuple[str, str]]:
    """A segment in names and values; a name that begins with a space is a part of the one before."""
    phases, wall = segment.phases, segment.wall_s or 1.0
    last = segment.chain[-1]
    done = ", ".join(f"{name} {duration(seconds)}" for name, seconds in segment.done_at_s.items())
    slot_s = segment.slots * (phases.filling + phases.tail) or 1.0
    return [
        ("wall clock", duration(segment.wall_s)),
        ("  before the first task", _of(phases.before, wall)),
        ("  while tasks were left", _of(phases.filling, wall)),
        ("  tail, none left to start", _of(phases.tail, wall)),
        ("  after the last task", _of(phases.after, wall)),
        ("attempts", f"{number(segment.attempts)} on {number(segment.slots)} slots (most at once)"),
        ("slots busy", f"{percent(segment.busy_share)} of the time between first start and last end"),
        ("  idle, tasks were left", _of(segment.idle_filling_s, slot_s)),
        ("  idle, in the tail", _of(segment.idle_tail_s, slot_s)),
        ("least possible", f"{duration(segment.ideal_s)} for this work on these slots"),
        ("attempts ended after", done),
        (
            "last task",
            f"{plain(last.task_id, 60)}: {duration(last.total_s)}, ended "
            f"{duration(segment.straggler_s)} after the one before",
        ),
        ("last 5% of the clock", _last(segment)),
        ("chain to the end", f"{len(segment.chain)} tasks, {duration(segment.chain_gaps_s)} between them"),
    ]


def _last(segment: SegmentPath) -> str:
    """What the end waited for, the most first."""
    end = segment.end
    stages = sorted(shares(end.stages).items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {percent(share)}" for name, share in stages[:3] if share >= LEAST_SHARE)
    calls = next(iter(end.routes), "")
    most = f"; most on {plain(calls, 60)}" if calls else ""
    return f"{duration(end.seconds)}, {number(end.attempts)} attempts in it: {told}{most}"


def _of(seconds: float, whole: float) -> str:
    return f"{duration(seconds)} ({percent(seconds / whole)})"


def _stages(segment: SegmentPath) -> Table:
    table = table_of("Where task time went", ["stage"], ["all tasks", "share", "on the chain", "share of it"])
    every, chain = shares(segment.stages), shares(segment.chain_stages)
    for name in STAGE_NAMES:
        if every.get(name, 0.0) >= LEAST_SHARE:
            seconds = [duration(segment.stages[name]), percent(every[name])]
            add_row(table, [name, *seconds, duration(segment.chain_stages[name]), percent(chain.get(name))])
    return table


def _tasks(segment: SegmentPath) -> list[Table]:
    chain = segment.chain[-CHAIN_SHOWN:]
    left_out = f", the last {len(chain)} of {len(segment.chain)}" if len(chain) < len(segment.chain) else ""
    return [
        _task_table(f"The chain that set the end{left_out}", chain),
        _task_table("Slowest attempts", segment.slowest),
    ]


def _task_table(title: str, tasks: Sequence[TaskPath]) -> Table:
    used = [name for name in STAGE_NAMES if any(task.stages[name] >= 0.005 for task in tasks)]
    right = ["worker", "outcome", "began", "took", "turns", *(f"{name} %" for name in used)]
    table = table_of(title, ["task"], right)
    for task in tasks:
        trial = f" trial {task.trial}" if task.trial else ""
        attempt = f" attempt {task.attempt}" if task.attempt > 1 else ""
        share = shares(task.stages)
        parts = [f"{100 * share[name]:.0f}" if share else DASH for name in used]
        names = [f"{plain(task.task_id, 40)}{trial}{attempt}", task.worker or DASH, task.outcome or DASH]
        add_row(table, [*names, duration(task.start_s), duration(task.total_s), number(task.turns), *parts])
    return table
