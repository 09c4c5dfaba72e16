"""One panel of a picture each: rows in, artists on the given axes out.

An empty panel says "no data". Names are drawn as they are, as one printable line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from analysis.metrics import MetricReport, Unit
from analysis.numbers import Summary
from analysis.queries import ToolRow
from analysis.summary import GroupRow, RunSummary
from analysis.text import number, percent, plain

Scale = Literal["linear", "log"]

BLUE, GREY, INK = "#3b6fb6", "#757b85", "#22262b"
OUTCOME_COLOURS = {
    "correct": "#2f7d4f",
    "wrong": "#9ccfae",
    "limited": "#e0a526",
    "owed": "#8d7cc3",
    "failed": "#c4473d",
    "pending": "#d5d8dc",
}
MOST_GROUPS = 14
_OFFSET: dict[str, Any] = {"textcoords": "offset points"}


def draw_histogram(axes: Any, report: MetricReport, scale: Scale) -> None:
    """Percent of values per bin; the ticks are the bins' edges, n and moments are in the title."""
    histogram = report.hist_log if scale == "log" else report.hist_linear
    title = f"{report.title} ({scale} bins)"
    if histogram is None:
        no_data(axes, title)
        return
    factor, shown = _display_unit(report.unit, report.stats)
    edges = [edge * factor for edge in histogram.edges]
    if scale == "log":
        axes.set_xscale("log")
    widths = [high - low for low, high in pairwise(edges)]
    axes.bar(edges[:-1], histogram.percent, widths, align="edge", color=BLUE, edgecolor="white")
    _bar_texts(axes, edges, histogram.percent, scale)
    axes.xaxis.set_major_locator(FixedLocator(edges))
    axes.xaxis.set_major_formatter(FixedFormatter(_edge_texts(edges)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(histogram.percent) * 1.12)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.tick_params(labelsize=9)
    axes.grid(axis="y")
    axes.set_xlabel("tokens" if report.unit == "tokens" else f"duration ({shown})")
    axes.set_ylabel("share of calls")
    titles(axes, title, _moments(report.stats, factor, shown))


def draw_shares(axes: Any, tools: Sequence[ToolRow]) -> None:
    """One bar per tool: its share of all tool calls, and the count."""
    total = sum(row.calls for row in tools)
    if not total:
        no_data(axes, "Share of tool calls")
        return
    values = [100 * (row.share or 0.0) for row in tools]
    _name_rows(axes, [plain(row.name, 30) for row in tools])
    bars = axes.barh(range(len(tools)), values, color=BLUE, height=0.62)
    axes.bar_label(
        bars, [f"{percent(row.share)}  ({number(row.calls)})" for row in tools], padding=4, fontsize=9
    )
    axes.set_xlim(0, max(values) * 1.22)
    axes.xaxis.set_major_locator(FixedLocator(range(0, 101, 20 if max(values) > 50 else 10)))
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    titles(axes, "Share of tool calls", f"n = {number(total)}")


def draw_outcomes(axes: Any, groups: Sequence[GroupRow]) -> None:
    """One stacked bar per category, as percent of its counted results."""
    shown = groups[:MOST_GROUPS]
    if not shown:
        no_data(axes, "Outcome by category")
        return
    _name_rows(axes, [f"{plain(row.name, 26)}  (n = {number(row.n)})" for row in shown])
    left = [0.0] * len(shown)
    for name in ("correct", "wrong", "limited", "owed", "failed"):
        widths = [100 * _part(row, name) / row.n for row in shown]
        bars = axes.barh(range(len(shown)), widths, 0.7, left, color=OUTCOME_COLOURS[name], label=name)
        texts = [f"{width:.0f}" if width >= 6 else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", fontsize=8.5, color=_text_on(name))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    rest = f", {len(groups) - len(shown)} smaller categories not shown" if len(groups) > len(shown) else ""
    titles(axes, "Outcome by category", f"n = {number(sum(row.n for row in groups))} results{rest}")
    _legend_below(axes, columns=5)


def draw_planned(axes: Any, run: RunSummary) -> None:
    """One bar for all planned tasks."""
    account = run.accounting
    if not account.planned:
        no_data(axes, "Planned tasks")
        return
    counts = [
        account.correct,
        account.ok - account.correct,
        account.limited,
        account.owed,
        account.failed,
        account.pending,
    ]
    left = 0
    for (name, colour), count in zip(OUTCOME_COLOURS.items(), counts, strict=True):
        axes.barh([0], [count], 0.5, left, color=colour, label=f"{name} {number(count)}")
        left += count
    axes.set_xlim(0, account.planned)
    axes.set_ylim(-0.4, 0.4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    titles(axes, "Planned tasks", f"n = {number(account.planned)}")
    _legend_below(axes, columns=6)


def draw_times(axes: Any, tools: Sequence[ToolRow]) -> None:
    """p50, p90 and p99 of the successful calls on a log axis: tools span decades."""
    shown = [row for row in tools if row.p50_s]
    if not shown:
        no_data(axes, "Time per call")
        return
    _name_rows(axes, [f"{plain(row.name, 22)}  (n = {number(row.calls - row.errors)})" for row in shown])
    places = range(len(shown))
    p50, p90, p99 = ([getattr(row, name) for row in shown] for name in ("p50_s", "p90_s", "p99_s"))
    axes.set_xscale("log")
    axes.hlines(places, p50, p99, color=GREY, linewidth=1.5)
    for values, marker, name in ((p50, "o", "p50"), (p90, "D", "p90"), (p99, "|", "p99")):
        axes.plot(values, places, marker, color=BLUE, markersize=7, markeredgewidth=2, label=name)
    for place, row in enumerate(shown):
        text = f"{number(row.p50_s)} / {number(row.p90_s)} / {number(row.p99_s)} s"
        axes.annotate(text, (row.p99_s, place), (9, 0), va="center", fontsize=8.5, **_OFFSET)
    # The widest text needs about two fifths of the axis, which on a log axis is a factor.
    low, high = 10.0 ** math.floor(math.log10(min(p50))), max(p99)
    axes.set_xlim(low, high * max(10.0, high / low) ** 0.7)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
    titles(axes, "Time per call", "p50 / p90 / p99 of successful calls, seconds on a log axis")
    _legend_below(axes, columns=3)


def titles(axes: Any, title: str, below: str) -> None:
    """A bold title, and a quieter line under it."""
    axes.set_title(title, pad=23)
    line = axes.annotate(
        below, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", color=GREY
    )
    line.set_in_layout(False)


def no_data(axes: Any, title: str) -> None:
    """An empty panel that says so."""
    axes.set(xticks=[], yticks=[], facecolor="#f4f5f7")
    axes.spines[:].set_visible(False)
    axes.set_title(title, pad=23)
    axes.text(
        0.5, 0.5, "no data", ha="center", va="center", fontsize=16, color=GREY, transform=axes.transAxes
    )


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _legend_below(axes: Any, columns: int) -> None:
    """A legend a fixed distance under the axes, clear of the tick labels whatever the panel's height."""
    below = axes.transAxes + ScaledTranslation(0, -22 / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        borderaxespad=0,
        ncol=columns,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _bar_texts(axes: Any, edges: Sequence[float], shares: Sequence[float], scale: Scale) -> None:
    for (low, high), share in zip(pairwise(edges), shares, strict=True):
        if share:
            middle = math.sqrt(low * high) if scale == "log" else (low + high) / 2
            text = "<0.1%" if share < 0.1 else f"{share:.1f}%"
            axes.annotate(
                text, (middle, share), (0, 2), textcoords="offset points", ha="center", fontsize=8.5
            )


def _edge_texts(edges: Sequence[float]) -> list[str]:
    """Three significant digits, more where neighbours would read the same."""
    for digits in (3, 4, 5, 6):
        texts = [number(edge, digits) for edge in edges]
        if len(set(texts)) == len(texts):
            return texts
    return [number(edges[0]), *[""] * (len(edges) - 1)]


def _display_unit(unit: Unit, summary: Summary) -> tuple[float, str]:
    if unit == "tokens":
        return 1.0, ""
    return (0.001, "s") if (summary.max or 0.0) >= 2000 else (1.0, "ms")


def _moments(summary: Summary, factor: float, shown: str) -> str:
    names = ("mean", "std", "p50", "p90", "p99")
    parts = [f"{name} {number((getattr(summary, name) or 0.0) * factor)} {shown}".strip() for name in names]
    return "   ".join([f"n = {number(summary.n)}", *parts])


def _part(row: GroupRow, name: str) -> int:
    return row.ok - row.correct if name == "wrong" else int(getattr(row, name))


def _text_on(name: str) -> str:
    return "white" if name in {"correct", "failed", "owed"} else INK
