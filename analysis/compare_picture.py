"""The picture of two runs compared: points with their intervals against the line of no difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from analysis.compare import Comparison, Group
from analysis.numbers import Interval
from analysis.panels import BLUE, GREY, MOST_GROUPS, no_data, titles
from analysis.plots import figure, save
from analysis.text import number, percent, plain

_VERDICT_COLOURS = {"better": "#2f7d4f", "worse": "#c4473d", "cannot tell": GREY}


def comparison_picture(path: Path, found: Comparison) -> list[Path]:
    """Two runs: the difference in accuracy by category, and what the second takes of the first.

    Writes `path` plus .png and .svg, and names them.
    """
    rows = 1 + min(len(found.by_category), MOST_GROUPS)
    with figure(14, 3.4 + 0.3 * rows) as canvas:
        canvas.set_layout_engine("constrained", wspace=0.06)
        left, right = canvas.subplots(1, 2, width_ratios=(1.5, 1))
        draw_differences(left, found)
        draw_ratios(right, found)
        return save(canvas, path)


def draw_differences(axes: Any, found: Comparison) -> None:
    """Accuracy of B less that of A, overall and by category, in points with 95% intervals."""
    title = f"B is {found.verdict}" if found.verdict != "cannot tell" else "Cannot tell"
    groups = [found.overall, *sorted(found.by_category, key=lambda group: -group.difference.n)]
    groups = [group for group in groups if group.difference.mean is not None][: 1 + MOST_GROUPS]
    if not groups:
        no_data(axes, title)
        return
    for place, group in enumerate(groups):
        colour = _VERDICT_COLOURS[found.verdict] if place == 0 else BLUE
        _draw_interval(axes, place, 100 * (group.difference.mean or 0.0), _points(group), colour)
    _name_rows(axes, [f"{plain(group.name, 30)}  (n = {number(group.difference.n)})" for group in groups], 0)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=""))
    axes.set_xlabel("B less A, percentage points")
    first, second = percent(found.overall.first), percent(found.overall.second)
    titles(axes, title, f"accuracy {first} in A, {second} in B")


def draw_ratios(axes: Any, found: Comparison) -> None:
    """The typical task's ratio of each quantity, B over A, with 95% intervals, on a log axis."""
    rows = [row for row in found.ratios if row.typical.ratio is not None]
    if not rows:
        no_data(axes, "Cost and time")
        return
    axes.set_xscale("log")
    for place, row in enumerate(rows):
        _draw_interval(axes, place, row.typical.ratio or 1.0, row.typical.interval, BLUE)
    _name_rows(axes, [row.name.split(",")[0].removesuffix(" a task") for row in rows], 1)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.01, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 5, 10, 100) if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("B over A")
    titles(axes, "Cost and time of a typical task", "geometric mean of the tasks' ratios")


def _points(group: Group) -> Interval | None:
    interval = group.difference.interval
    return None if interval is None else Interval(100 * interval.low, 100 * interval.high)


def _draw_interval(axes: Any, place: int, value: float, interval: Interval | None, colour: str) -> None:
    if interval is not None:
        axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2.2)
    axes.plot([value], [place], "o", color=colour, markersize=7)


def _name_rows(axes: Any, names: list[str], nothing: float) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(nothing, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axes.margins(x=0.08)
    axes.grid(axis="x")
