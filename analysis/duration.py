"""The calls of one tool with one model, as a distribution; a finer look at one row of `timing`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from analysis.log import RunLog
from analysis.numbers import ordered, quantiles
from analysis.text import plain
from analysis.timing import COLUMNS as TIMING
from analysis.timing import Components, Series, TimingRow, components, described, series_of

COLUMNS = TIMING

PERCENTILES = (1, 5, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 95, 99)


@dataclass(frozen=True)
class Duration:
    """What `python -m analysis duration` prints, in seconds; `note` says why there is nothing."""

    run: str
    tool: str
    model: str
    note: str
    series: Series
    row: TimingRow
    percentiles: dict[str, float]
    components: list[Components]

    @property
    def title(self) -> str:
        return f"{plain(self.tool, 40)} with {plain(self.model, 60)}"

    @property
    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run,
            "tool": self.tool,
            "model": self.model,
            "note": self.note,
            "errors": self.row.errors,
            "stats": asdict(self.row.stats),
            "percentiles": self.percentiles,
            "hist_linear": asdict(self.row.hist_linear) if self.row.hist_linear else None,
            "hist_log": asdict(self.row.hist_log) if self.row.hist_log else None,
            "components": [asdict(row) for row in self.components],
        }


def duration_of(log: RunLog) -> Duration:
    """Of the one tool and the one model of the log's selection: tool calls that succeeded."""
    (tool,), (model,) = log.selection.tools, log.selection.models
    calls = log.kind("tool_call")
    failed = int((log.calls & calls & log.is_error).sum())
    values = ordered(log.pick("duration_s", log.timed & calls))
    series = series_of("tool", tool, values, failed)
    row, points = described(series), dict[str, float]()
    if row.stats.n:
        found = quantiles(values, [percent / 100 for percent in PERCENTILES]).tolist()
        points = {f"p{percent}": value for percent, value in zip(PERCENTILES, found, strict=True)}
    note = "" if row.stats.n or failed else (log.absence or _others(log))
    parts = [part for part in components(log) if part.name == tool] if row.stats.n else []
    return Duration(log.name, tool, model, note, series, row, points, parts)


def _others(log: RunLog) -> str:
    """That there is no such call, and which pairs there are."""
    tools, models = log.words("tool"), log.words("model")
    rows = log.tasks & log.kind("tool_call")
    pairs = sorted({*zip(tools.codes[rows].tolist(), models.codes[rows].tolist(), strict=True)})
    known = "; ".join(f"{tools.names[tool]} {models.names[model]}" for tool, model in pairs[:20])
    return f"{log.no('such tool call')} Pairs in the log: {plain(known, 600) or 'none'}."
