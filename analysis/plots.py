"""Pictures of a run in one style, drawn without a display: a PNG and a small SVG of each.

Draws aggregates and the names of tools, models and categories; no question, answer or prompt
reaches a picture. The panels themselves are in `panels`, the timeline in `timeline`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis import panels
from analysis.panels import GREY, INK, MOST_GROUPS
from analysis.summary import RunSummary
from analysis.text import duration, number, percent, plain, usd
from analysis.timing import ALL, GROUPS, Series, Timing, TimingRow
from analysis.usage import OTHER_WORK, ToolRow, Usage

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none",  # text stays text, a tenth of the size
    "svg.hashsalt": "analysis",  # equal data gives equal bytes
}
_DPI = 110
_MOST_ROWS = 9
_UPPER_PANELS: dict[str, Any] = {
    "height_ratios": (0.42, 1),
    **{"left": 0.18, "right": 0.985, "top": 0.855, "bottom": 0.425, "hspace": 0.75, "wspace": 0.48},
}
_LOWER_PANELS = {"left": 0.055, "right": 0.985, "top": 0.31, "bottom": 0.05, "wspace": 0.13}
_DOT = "   \N{MIDDLE DOT}   "
_FACTS = ("benchmark", "protocol", "judge_model", "prompt_digest")


def summary_pictures(folder: Path, run: RunSummary) -> list[Path]:
    """What became of the results, and how right they are, by category and answer type."""
    groups = [*run.by_category[:MOST_GROUPS], *run.by_answer_type]
    with figure(15, 2.4 + 0.36 * max(3, len(groups))) as canvas:
        canvas.set_layout_engine("constrained")
        left, right = canvas.subplots(1, 2)
        panels.draw_outcomes(left, run.by_category)
        panels.draw_accuracies(right, groups, run.accounting.accuracy)
        return save(canvas, folder / "outcomes")


def usage_pictures(folder: Path, used: Usage) -> list[Path]:
    """Who was called how often, and what it cost."""
    pairs = sum(row.tool not in OTHER_WORK for row in used.rows)
    with figure(16, 2.0 + 0.42 * max(4, pairs)) as canvas:
        canvas.set_layout_engine("constrained")
        left, right = canvas.subplots(1, 2)
        panels.draw_usage(left, used.rows)
        panels.draw_costs(right, used.rows)
        return save(canvas, folder / "usage")


def timing_pictures(folder: Path, found: Timing) -> list[Path]:
    """One picture a group: each series in linear and log bins, all as a CDF; and the parts of mean calls."""
    files = []
    for group, title in GROUPS.items():
        rows = [row for row in found.rows if row.group == group and row.stats.n]
        series = [one for one in found.series if one.group == group]
        if rows:
            files += series_picture(folder / f"timing_{group}", title, rows, series)
    with figure(11, 2.4 + 0.5 * max(2, len(found.components))) as canvas:
        canvas.set_layout_engine("constrained")
        panels.draw_components(canvas.subplots(), found.components)
        files += save(canvas, folder / "timing_parts")
    return files


def series_picture(path: Path, title: str, rows: Sequence[TimingRow], series: Sequence[Series]) -> list[Path]:
    """Two histograms for each row, one CDF for all. Writes `path` plus .png and .svg, and names them."""
    shown = rows[:_MOST_ROWS]
    height = 2.55 * len(shown) + 3.9
    with figure(15, height) as canvas:
        more = f", {len(rows) - len(shown)} more not shown" if len(rows) > len(shown) else ""
        canvas.text(0.012, 1 - 0.3 / height, title + more, fontsize=16, fontweight="bold", va="center")
        margins: dict[str, Any] = {"left": 0.055, "right": 0.985, "hspace": 0.95, "wspace": 0.13}
        top, bottom = 1 - 1.05 / height, 3.95 / height
        grid = canvas.add_gridspec(len(shown), 2, top=top, bottom=bottom, **margins).subplots(squeeze=False)
        for line, row in zip(grid, shown, strict=True):
            panels.draw_histogram(line[0], row, "linear")
            panels.draw_histogram(line[1], row, "log")
        low = canvas.add_axes((0.055, 0.55 / height, 0.72, 2.3 / height))
        panels.draw_cdf(low, series, "Cumulative distribution")
        return save(canvas, path)


def overview_picture(path: Path, run: RunSummary, tools: Sequence[ToolRow], times: Timing) -> list[Path]:
    """The page to open first: headline, outcomes, tool shares and times, and two histograms."""
    with figure(16, 12) as canvas:
        canvas.text(0.025, 0.972, _headline(run), fontsize=17, fontweight="bold", va="center")
        canvas.text(0.025, 0.945, _work_line(run), fontsize=11, color=GREY, va="center")
        canvas.text(0.025, 0.924, _facts_line(run), fontsize=11, color=GREY, va="center")
        upper = canvas.add_gridspec(2, 2, **_UPPER_PANELS).subplots()
        lower = canvas.add_gridspec(1, 2, **_LOWER_PANELS).subplots()
        panels.draw_planned(upper[0, 0], run)
        panels.draw_shares(upper[0, 1], [row for row in tools if row.share is not None])
        panels.draw_outcomes(upper[1, 0], run.by_category)
        panels.draw_times(upper[1, 1], tools)
        panels.draw_histogram(lower[0], times.row("tool", ALL), "log")
        panels.draw_histogram(lower[1], times.row("orchestrator", "inference"), "log")
        return save(canvas, path)


@contextmanager
def figure(width: float, height: float) -> Iterator[Any]:
    """A figure in the style of all pictures; inches."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; that is no reason to warn in every job.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas = Figure(figsize=(width, height))
        FigureCanvasAgg(canvas)
        yield canvas


def save(canvas: Any, path: Path) -> list[Path]:
    """PNG and SVG, each renamed into place when complete, so that a viewer never meets half a picture."""
    files = []
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        target = path.with_name(path.name + suffix)
        temporary = target.with_name(f".{target.name}.tmp")
        canvas.savefig(temporary, format=suffix[1:], dpi=_DPI, metadata=metadata)
        temporary.replace(target)
        files.append(target)
    return files


def _headline(run: RunSummary) -> str:
    account = run.accounting
    if account.accuracy is None or account.interval is None:
        return "No task counted yet"
    interval = f"95% interval {percent(account.interval.low)} to {percent(account.interval.high)}"
    return f"Accuracy {percent(account.accuracy)} of {number(account.planned)} planned ({interval})"


def _work_line(run: RunSummary) -> str:
    totals = run.totals
    parts = [
        plain(Path(run.run_dir).name, 60),
        run.state,
        f"{duration(totals.wall_s)} at work",
        usd(totals.cost_usd),
        f"{number(totals.model_calls)} model calls",
    ]
    return _DOT.join(parts)


def _facts_line(run: RunSummary) -> str:
    known = [name for name in _FACTS if name in run.facts]
    return _DOT.join(f"{name.replace('_', ' ')}: {plain(run.facts[name], 60)}" for name in known)
