"""Pictures of a run in one style, drawn without a display: a PNG and a small SVG of each.

Draws aggregates and the names of tools, models and categories; no question, answer or prompt
reaches a picture. The panels themselves are in `panels`.
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

from analysis import compare_panels, panels
from analysis.compare import Comparison
from analysis.metrics import MetricReport
from analysis.panels import GREY, INK, MOST_GROUPS, Scale
from analysis.queries import ToolRow
from analysis.summary import GroupRow, RunSummary
from analysis.text import duration, number, percent, plain, usd

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
_HISTOGRAM_MARGINS = {"left": 0.075, "right": 0.975, "top": 0.835, "bottom": 0.13}
_UPPER_PANELS: dict[str, Any] = {
    "height_ratios": (0.42, 1),
    **{"left": 0.18, "right": 0.985, "top": 0.855, "bottom": 0.425, "hspace": 0.75, "wspace": 0.48},
}
_LOWER_PANELS = {"left": 0.055, "right": 0.985, "top": 0.31, "bottom": 0.05, "wspace": 0.13}
_DOT = "   \N{MIDDLE DOT}   "
_FACTS = ("benchmark", "protocol", "judge_model", "prompt_digest")


def histogram_picture(path: Path, report: MetricReport, scale: Scale) -> list[Path]:
    """Percent of values per bin. Writes `path` plus .png and .svg, as all pictures do, and names them."""
    with _figure(10, 4.2) as figure:
        figure.subplots_adjust(**_HISTOGRAM_MARGINS)
        panels.draw_histogram(figure.subplots(), report, scale)
        return _save(figure, path)


def share_picture(path: Path, tools: Sequence[ToolRow]) -> list[Path]:
    """Share of all tool calls per tool."""
    with _figure(10, 1.4 + 0.45 * max(2, len(tools))) as figure:
        figure.set_layout_engine("constrained")
        panels.draw_shares(figure.subplots(), tools)
        return _save(figure, path)


def outcome_picture(path: Path, groups: Sequence[GroupRow]) -> list[Path]:
    """What became of the counted results, by category."""
    with _figure(10, 1.8 + 0.4 * max(2, min(len(groups), MOST_GROUPS))) as figure:
        figure.set_layout_engine("constrained")
        panels.draw_outcomes(figure.subplots(), groups)
        return _save(figure, path)


def overview_picture(
    path: Path, run: RunSummary, tools: Sequence[ToolRow], left: MetricReport, right: MetricReport
) -> list[Path]:
    """The page to open first: headline, outcomes, tool shares and times, and two histograms."""
    with _figure(16, 12) as figure:
        figure.text(0.025, 0.972, _headline(run), fontsize=17, fontweight="bold", va="center")
        figure.text(0.025, 0.945, _work_line(run), fontsize=11, color=GREY, va="center")
        figure.text(0.025, 0.924, _facts_line(run), fontsize=11, color=GREY, va="center")
        upper = figure.add_gridspec(2, 2, **_UPPER_PANELS).subplots()
        lower = figure.add_gridspec(1, 2, **_LOWER_PANELS).subplots()
        panels.draw_planned(upper[0, 0], run)
        panels.draw_shares(upper[0, 1], [row for row in tools if row.share is not None])
        panels.draw_outcomes(upper[1, 0], run.by_category)
        panels.draw_times(upper[1, 1], tools)
        panels.draw_histogram(lower[0], left, "log")
        panels.draw_histogram(lower[1], right, "log")
        return _save(figure, path)


def comparison_picture(path: Path, found: Comparison) -> list[Path]:
    """Two runs: the difference in accuracy by category, and what the second takes of the first."""
    rows = 1 + min(len(found.by_category), MOST_GROUPS)
    with _figure(14, 3.4 + 0.3 * rows) as figure:
        figure.set_layout_engine("constrained", wspace=0.06)
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        compare_panels.draw_differences(left, found)
        compare_panels.draw_ratios(right, found)
        return _save(figure, path)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; that is no reason to warn in every job.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure


def _save(figure: Any, path: Path) -> list[Path]:
    """PNG and SVG, each renamed into place when complete, so that a viewer never meets half a picture."""
    files = []
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        target = path.with_name(path.name + suffix)
        temporary = target.with_name(f".{target.name}.tmp")
        figure.savefig(temporary, format=suffix[1:], dpi=130, metadata=metadata)
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
