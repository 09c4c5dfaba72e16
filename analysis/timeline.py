"""The timeline of a segment: every slot of every worker over time, coloured by what it waited for.

Slots are drawn as an image, some pixels for each, so that a run of any size takes the same time and space.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray

from analysis import schedule
from analysis.critical_path import STAGE_NAMES, Gantt, SegmentPath
from analysis.panels import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, YELLOW, legend_below, titles
from analysis.plots import figure, save
from analysis.text import duration, number, percent, plain

STAGE_COLOURS = {
    "queue": "#8a9099",
    "orchestrator": BLUE,
    "expert": ORANGE,
    "user": "#2fa7a0",
    "environment": "#b08968",
    "retrieval": GREEN,
    "web": YELLOW,
    "code": PURPLE,
    "judge": RED,
    "other": "#cfd3d8",
}
BINS, MOST_LANES, NAMED_WORKERS = 1200, 600, 24
_MARGINS: dict[str, Any] = {"left": 0.085, "right": 0.985, "top": 0.885, "bottom": 0.095, "hspace": 0.2}


def timeline_picture(path: Path, run: str, segment: SegmentPath) -> list[Path]:
    """Slots over time above, what the slots do together below. Writes `path` plus .png and .svg."""
    gantt = segment.gantt
    lanes, order = _lanes(gantt)
    with figure(16, 10) as canvas:
        title = f"Timeline of {plain(Path(run).name, 60)}, segment {segment.epoch}"
        canvas.text(0.012, 0.975, title, fontsize=16, fontweight="bold", va="center")
        canvas.text(0.012, 0.947, _headline(segment), fontsize=11, color=GREY, va="center")
        above, below = canvas.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2.3, 1), **_MARGINS})
        span = max(float(gantt.ends.max()), 1e-3)
        filled = _filled(gantt, lanes, span)
        _draw_slots(above, gantt, lanes, order, filled, span)
        _draw_sum(below, segment, filled, span)
        return save(canvas, path)


def _headline(segment: SegmentPath) -> str:
    phases = segment.phases
    parts = [
        f"{number(segment.attempts)} attempts on {number(segment.slots)} slots in {duration(segment.wall_s)}",
        f"slots busy {percent(segment.busy_share)}",
        f"tail {duration(phases.tail)}",
        f"last task {duration(segment.straggler_s)} after the one before",
        f"least possible {duration(segment.ideal_s)}",
    ]
    return "   \N{MIDDLE DOT}   ".join(parts)


def _lanes(gantt: Gantt) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """Of each attempt its lane, workers one below the other; and of each worker its first and next lane."""
    lanes = np.zeros(len(gantt.starts), np.int64)
    bounds, first = [], 0
    for worker in range(len(gantt.workers)):
        own = np.flatnonzero(gantt.worker_of == worker)
        lanes[own] = first + schedule.lanes(gantt.starts[own], gantt.ends[own])
        following = int(lanes[own].max()) + 1
        bounds.append((first, following))
        first = following
    return lanes, bounds


def _filled(gantt: Gantt, lanes: NDArray[np.int64], span: float) -> NDArray[np.float64]:
    """(stages, rows, bins): how much of each bin each stage fills; several lanes share a row if they must."""
    count = int(lanes.max()) + 1
    rows = min(count, MOST_LANES)
    row = lanes * rows // count
    stages = len(STAGE_NAMES)
    places = gantt.call_stage * rows + row[gantt.call_attempt]
    filled = schedule.occupancy(
        places, gantt.call_starts, gantt.call_ends, (stages * rows, BINS), 0.0, span
    ).reshape(stages, rows, BINS)
    whole = schedule.occupancy(row, gantt.starts, gantt.ends, (rows, BINS), 0.0, span)
    filled[-1] = np.clip(whole - filled[:-1].sum(0), 0.0, None)
    return filled


def _draw_slots(
    axes: Any,
    gantt: Gantt,
    lanes: NDArray[np.int64],
    bounds: list[tuple[int, int]],
    filled: NDArray[np.float64],
    span: float,
) -> None:
    count = int(lanes.max()) + 1
    idle = np.clip(count / filled.shape[1] - filled.sum(0), 0.0, None)
    colours = np.array([to_rgb(STAGE_COLOURS[name]) for name in STAGE_NAMES] + [(1.0, 1.0, 1.0)])
    dominant = np.argmax(np.concatenate([filled, idle[None]]), axis=0)
    image = (255 * colours).round().astype(np.uint8)[dominant]
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, span, count, 0))
    chain = gantt.chain
    chained = lanes[chain] + 0.5
    axes.hlines(chained, gantt.starts[chain], gantt.ends[chain], color=INK, linewidth=2.2)
    axes.vlines(gantt.ends[chain][:-1], chained[:-1], chained[1:], color=INK, linewidth=0.8, linestyle=":")
    if len(bounds) <= NAMED_WORKERS:
        names = [plain(name, 14) or "unknown" for name in gantt.workers]
        axes.set_yticks([(low + high) / 2 for low, high in bounds], names)
        axes.tick_params(axis="y", length=0)
        for low, _ in bounds[1:]:
            axes.axhline(low, color="white", linewidth=2)
            axes.axhline(low, color=GREY, linewidth=0.6)
    else:
        axes.set_ylabel(f"{number(count)} slots of {number(len(bounds))} workers")
    axes.tick_params(labelbottom=False)
    more = " Slots share pixels." if count > filled.shape[1] else ""
    words = f"one line a slot, by worker; black: the chain of tasks that set the end ({len(chain)}).{more}"
    titles(axes, "Slots over time", words)


def _draw_sum(axes: Any, segment: SegmentPath, filled: NDArray[np.float64], span: float) -> None:
    running = filled.sum(1)
    edges = np.linspace(0, span, BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    axes.stackplot(middles, running, colors=[STAGE_COLOURS[name] for name in STAGE_NAMES], linewidth=0)
    axes.axhline(segment.slots, color=INK, linewidth=1, linestyle="--")
    axes.set_xlim(0, span)
    axes.set_ylim(0, segment.slots * 1.12)
    last_start = float(segment.gantt.starts.max())
    axes.axvline(last_start, color=INK, linewidth=1, linestyle=":")
    axes.annotate(
        "last task starts", (last_start, segment.slots), (4, 2), textcoords="offset points", fontsize=9
    )
    axes.xaxis.set_major_locator(MultipleLocator(_step(span)))
    axes.xaxis.set_major_formatter(lambda value, _: _clock(value))
    axes.set_xlabel("time since the segment began (h:mm:ss)")
    axes.set_ylabel("tasks running")
    titles(
        axes,
        "What the running tasks do",
        f"dashed: the {number(segment.slots)} slots; below it they are idle",
    )
    whole = sum(segment.stages.values()) or 1.0
    patches = {
        f"{name} {percent(segment.stages[name] / whole)}": Patch(color=STAGE_COLOURS[name])
        for name in STAGE_NAMES
        if segment.stages[name] / whole >= 0.0005
    }
    legend_below(axes, columns=len(patches), down=40, labels=patches)


def _step(span: float) -> float:
    """A round number of seconds, minutes or hours that cuts the span into ten parts at most."""
    rounds = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200]
    return next((step for step in rounds if span / step <= 10), 86400.0 * math.ceil(span / 864000))


def _clock(seconds: float) -> str:
    if seconds % 1 > 0.01:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
