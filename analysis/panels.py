"""One panel of a picture each: rows in, artists on the given axes out.

An empty panel says "no data". Names are drawn as they are, as one printable line. Colours are those of
M. Okabe, K. Ito, "Color universal design" (2008), which people with any colour vision can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    LogLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)
from matplotlib.transforms import ScaledTranslation

from analysis.numbers import Summary, quantiles
from analysis.summary import GroupRow, RunSummary
from analysis.text import number, percent, plain, short
from analysis.timing import PARTS, Components, Series, TimingRow
from analysis.usage import OTHER_WORK, ToolRow, UsageRow

Scale = Literal["linear", "log"]

BLUE, ORANGE, SKY, GREEN, YELLOW = "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#f0e442"
RED, PURPLE, BLACK = "#d55e00", "#cc79a7", "#000000"
GREY, INK, PALE = "#6b717b", "#22262b", "#e3e5e8"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, "#8a8f98", "#7a4f2b")  # yellow is too pale for a line
OUTCOME_COLOURS = {
    "correct": GREEN,
    "wrong": "#a9d8c8",
    "limited": ORANGE,
    "owed": PURPLE,
    "failed": RED,
    "pending": PALE,
}
PART_COLOURS = {
    "queue": "#9aa0a8",
    "prefill": SKY,
    "decode": BLUE,
    "retrieval": GREEN,
    "web": YELLOW,
    "code": PURPLE,
    "other": PALE,
}
MOST_GROUPS = 14
_AT_MOST = {"s": "that took so long at most", "tokens": "with so many tokens at most"}
_DARK = {GREEN, RED, BLUE, BLACK}
_OFFSET: dict[str, Any] = {"textcoords": "offset points"}


def draw_histogram(axes: Any, row: TimingRow, scale: Scale) -> None:
    """Percent of values per bin; the ticks are the bins' edges, n and moments are in the title."""
    histogram = row.hist_log if scale == "log" else row.hist_linear
    title = f"{plain(row.title, 44)} ({scale} bins)"
    if histogram is None:
        no_data(axes, title)
        return
    factor, shown = _display_unit(row)
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
    axes.set_ylim(0, max(histogram.percent) * 1.14)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="y")
    axes.set_xlabel("tokens" if row.unit == "tokens" else f"duration ({shown})")
    axes.set_ylabel("share of calls")
    _fix_labels(axes)
    titles(axes, title, moments(row.stats, factor, shown))


def draw_cdf(axes: Any, series: Sequence[Series], title: str) -> None:
    """The share of values at or below each value, one line a series, on a log axis."""
    shown = [one for one in series if len(one.values) and one.values[-1] > 0][: len(CYCLE)]
    if not shown:
        no_data(axes, title)
        return
    fractions = np.linspace(0, 1, 401)
    least = min(float(one.values[one.values > 0][0]) for one in shown)
    for one, colour in zip(shown, CYCLE, strict=False):
        points = np.maximum(quantiles(one.values, fractions), least)
        axes.plot(points, 100 * fractions, color=colour, linewidth=1.8, label=plain(one.name, 34))
    axes.set_xscale("log")
    _plain_log_ticks(axes)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.yaxis.set_major_locator(FixedLocator([0, 10, 25, 50, 75, 90, 100]))
    axes.grid(axis="both")
    axes.set_xlabel("tokens" if shown[0].unit == "tokens" else "duration (s, log axis)")
    axes.set_ylabel("share of calls")
    left_out = len([one for one in series if len(one.values)]) - len(shown)
    titles(axes, title, f"share of calls {_AT_MOST[shown[0].unit]}" + _more(left_out, "series"))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def draw_components(axes: Any, rows: Sequence[Components]) -> None:
    """One stacked bar per kind of call: the mean call's seconds by part."""
    if not rows:
        no_data(axes, "Where a mean call goes")
        return
    _name_rows(axes, [f"{plain(row.name, 26)}  (n = {number(row.calls)})" for row in rows])
    left = [0.0] * len(rows)
    longest = max(row.mean_s for row in rows)
    for part in PARTS:
        widths = [row.parts.get(part, 0.0) for row in rows]
        if not any(widths):
            continue
        colour = PART_COLOURS[part]
        bars = axes.barh(range(len(rows)), widths, 0.66, left, color=colour, label=part)
        texts = [number(width, 2) if width > 0.045 * longest else "" for width in widths]
        text_colour = "white" if colour in _DARK else INK
        axes.bar_label(bars, texts, label_type="center", fontsize=8.5, color=text_colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        axes.annotate(
            f"{number(row.mean_s)} s", (left[place], place), (5, 0), va="center", fontsize=9, **_OFFSET
        )
    axes.set_xlim(0, longest * 1.12)
    axes.grid(axis="x")
    axes.set_xlabel("mean seconds of a successful call")
    titles(axes, "Where a mean call goes", "parts of the mean call; a tool call includes its expert")
    legend_below(axes, columns=len(PARTS), down=42)


def draw_shares(axes: Any, tools: Sequence[ToolRow]) -> None:
    """One bar per tool: its share of all tool calls, and the count."""
    _share_bars(axes, "Share of tool calls", [(row.name, row.share or 0.0, row.calls) for row in tools])


def draw_usage(axes: Any, rows: Sequence[UsageRow]) -> None:
    """One bar per tool and model: its share of all tool calls, the count, and the tool by colour."""
    shown = [row for row in rows if row.tool not in OTHER_WORK]
    tools = list(dict.fromkeys(row.tool for row in shown))
    colours = [CYCLE[tools.index(row.tool) % len(CYCLE)] for row in shown]
    names = [f"{plain(row.tool, 20)} \N{MIDDLE DOT} {plain(row.model, 34)}" for row in shown]
    bars = [(name, row.share_of_all or 0.0, row.calls) for name, row in zip(names, shown, strict=True)]
    _share_bars(axes, "Tool calls by tool and model", bars, colours)


def draw_costs(axes: Any, rows: Sequence[UsageRow]) -> None:
    """One bar per model: what it cost over all its work, and its tokens."""
    cost, tokens = dict[str, float](), dict[str, int]()
    for row in rows:
        if row.tokens or row.cost_usd:
            cost[row.model] = cost.get(row.model, 0.0) + (row.cost_usd or 0.0)
            tokens[row.model] = tokens.get(row.model, 0) + row.tokens
    total = sum(cost.values())
    title = "Tokens by model" if not total else "Cost by model"
    values = cost if total else {name: float(count) for name, count in tokens.items()}
    order = sorted(values, key=lambda name: -values[name])[:MOST_GROUPS]
    if not order:
        no_data(axes, title)
        return
    _name_rows(axes, [plain(name or "no model", 34) for name in order])
    bars = axes.barh(range(len(order)), [values[name] for name in order], color=BLUE, height=0.62)
    texts = [(f"${cost[name]:,.2f}, " if total else "") + f"{short(tokens[name])} tokens" for name in order]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_xlim(0, max(values.values()) * 1.75)
    axes.xaxis.set_major_formatter(lambda value, _: f"${number(value)}" if total else number(value))
    axes.xaxis.set_major_locator(_few_ticks())
    whole = f"${total:,.2f} in all, " if total else ""
    titles(axes, title, f"{whole}{short(sum(tokens.values()))} tokens")


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
        colour = OUTCOME_COLOURS[name]
        bars = axes.barh(range(len(shown)), widths, 0.7, left, color=colour, label=name)
        texts = [f"{width:.0f}" if width >= 6 else "" for width in widths]
        text_colour = "white" if colour in _DARK else INK
        axes.bar_label(bars, texts, label_type="center", fontsize=8.5, color=text_colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    left_out = _more(len(groups) - len(shown), "smaller categories")
    titles(axes, "Outcome by category", f"n = {number(sum(row.n for row in groups))} results{left_out}")
    legend_below(axes, columns=5)


def draw_accuracies(axes: Any, groups: Sequence[GroupRow], whole: float | None) -> None:
    """Accuracy of each group with its Wilson interval; the whole run's as a line."""
    shown = groups[:MOST_GROUPS]
    if not shown:
        no_data(axes, "Accuracy")
        return
    _name_rows(axes, [f"{plain(row.name, 26)}  (n = {number(row.n)})" for row in shown])
    if whole is not None:
        axes.axvline(100 * whole, color=ORANGE, linewidth=1.5, label=f"the run: {percent(whole)}", zorder=1)
    places = range(len(shown))
    axes.hlines(
        places,
        [100 * row.interval.low for row in shown],
        [100 * row.interval.high for row in shown],
        color=BLUE,
        linewidth=2,
        label="95% interval (Wilson)",
    )
    axes.plot([100 * row.accuracy for row in shown], places, "o", color=BLUE, markersize=6, label="accuracy")
    high = max(100 * row.interval.high for row in shown)
    for place, row in enumerate(shown):
        axes.annotate(
            percent(row.accuracy),
            (100 * row.interval.high, place),
            (6, 0),
            va="center",
            fontsize=9,
            **_OFFSET,
        )
    axes.set_xlim(0, max(10.0, high * 1.15))
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.grid(axis="x")
    titles(
        axes,
        "Accuracy by group",
        "of the counted results of each group" + _more(len(groups) - len(shown), "groups"),
    )
    legend_below(axes, columns=3)


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
    legend_below(axes, columns=6)


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
    legend_below(axes, columns=3)


def titles(axes: Any, title: str, below: str) -> None:
    """A bold title, and a quieter line under it."""
    axes.set_title(title, pad=23, y=1.0)  # with a place of its own, no text has to be measured for it
    line = axes.annotate(
        below, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", color=GREY, fontsize=9.5
    )
    line.set_in_layout(False)


def _fix_labels(axes: Any) -> None:
    """Puts the labels of the axes where they would be anyway; to find that out takes a third of the time."""
    inch = axes.figure.dpi_scale_trans
    axes.xaxis.set_label_coords(0.5, 0, transform=axes.transAxes + ScaledTranslation(0, -20 / 72, inch))
    axes.yaxis.set_label_coords(0, 0.5, transform=axes.transAxes + ScaledTranslation(-36 / 72, 0, inch))


def no_data(axes: Any, title: str) -> None:
    """An empty panel that says so."""
    axes.set(xticks=[], yticks=[], facecolor="#f4f5f7")
    axes.spines[:].set_visible(False)
    axes.set_title(title, pad=23)
    axes.text(
        0.5, 0.5, "no data", ha="center", va="center", fontsize=16, color=GREY, transform=axes.transAxes
    )


def moments(summary: Summary, factor: float = 1.0, unit: str = "s") -> str:
    """n, moments and percentiles in one line."""
    names = ("mean", "std", "p50", "p80", "p90", "p99")
    parts = [f"{name} {number((getattr(summary, name) or 0.0) * factor)}" for name in names]
    return "   ".join([f"n = {number(summary.n)}", *parts]) + (f"   ({unit})" if unit else "")


def legend_below(axes: Any, columns: int, down: float = 22, labels: Mapping[str, Any] | None = None) -> None:
    """A legend a fixed distance (points) under the axes, clear of the tick labels whatever their height."""
    below = axes.transAxes + ScaledTranslation(0, -down / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        *([list(labels.values()), list(labels)] if labels else []),
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


def _share_bars(
    axes: Any, title: str, bars: Sequence[tuple[str, float, int]], colours: Sequence[str] | str = BLUE
) -> None:
    """Horizontal bars of (name, share, count)."""
    total = sum(count for _, _, count in bars)
    if not total:
        no_data(axes, title)
        return
    values = [100 * share for _, share, _ in bars]
    _name_rows(axes, [plain(name, 60) for name, _, _ in bars])
    drawn = axes.barh(range(len(bars)), values, color=colours, height=0.62)
    texts = [f"{percent(share)}  ({number(count)})" for _, share, count in bars]
    axes.bar_label(drawn, texts, padding=4, fontsize=9)
    axes.set_xlim(0, max(values) * 1.38)
    axes.xaxis.set_major_locator(FixedLocator(range(0, 101, 20 if max(values) > 50 else 10)))
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    titles(axes, title, f"n = {number(total)}")


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, min_n_ticks=2)


def _more(left_out: int, what: str) -> str:
    return f", {left_out} {what} not shown" if left_out > 0 else ""


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


def _display_unit(row: TimingRow) -> tuple[float, str]:
    if row.unit == "tokens":
        return 1.0, ""
    return (1.0, "s") if (row.stats.max or 0.0) >= 2 else (1000.0, "ms")


def _part(row: GroupRow, name: str) -> int:
    return row.ok - row.correct if name == "wrong" else int(getattr(row, name))


def _plain_log_ticks(axes: Any) -> None:
    """At 1, 2 and 5 of each decade; none between them, which would be formulas in a narrow span."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
    axes.xaxis.set_minor_formatter(NullFormatter())
