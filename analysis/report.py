"""`analyse(run_dir)`: statistics as JSON and pictures beside the log, at any moment of a run's life."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.critical_path import CriticalPath, critical_path
from analysis.log import open_run
from analysis.selection import LAST_SEGMENT
from analysis.summary import RunSummary, summarise
from analysis.text import percent
from analysis.timing import Timing, timing
from analysis.usage import ToolRow, Usage, tool_table, usage
from ray_app.errors import RunDirError


@dataclass(frozen=True, slots=True)
class AnalysisOutput:
    """What `analyse` wrote, one sentence that says what came out, and the rows that it says it of."""

    stats: Path
    overview: Path
    pictures: tuple[Path, ...]
    message: str
    run: RunSummary
    tools: list[ToolRow]


def analyse(run_dir: Path, out_dir: Path | None = None, *, with_pictures: bool = True) -> AnalysisOutput:
    """Write `stats.json` and all pictures to `out_dir` (default: RUN/analysis); existing ones are replaced.

    Works on a run that is empty, live or crashed. Raises RunDirError where `run_dir` is no run or `out_dir`
    cannot be written.
    """
    log = open_run(run_dir)
    out_dir = out_dir or run_dir / "analysis"
    run, tools, times, used = summarise(log), tool_table(log), timing(log), usage(log)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _write_json(out_dir / "stats.json", statistics(run, tools, used, times))
        path = critical_path(log.select(LAST_SEGMENT))
        pictures = tuple(_draw(out_dir, run, tools, used, times, path)) if with_pictures else ()
    except OSError as error:
        raise RunDirError(f"{out_dir}: {error.strerror}; expected a writable folder") from None
    stats, overview = out_dir / "stats.json", out_dir / "overview.png"
    return AnalysisOutput(stats, overview, pictures, sentence(run), run, tools)


def statistics(run: RunSummary, tools: list[ToolRow], used: Usage, times: Timing) -> dict[str, Any]:
    """The content of `stats.json`."""
    return {
        "source": run.run_dir,
        "summary": asdict(run),
        "timing": times.content,
        "tools": [asdict(row) for row in tools],
        "usage": [asdict(row) for row in used.rows],
    }


def sentence(run: RunSummary) -> str:
    """The outcome of the run in one sentence."""
    account = run.accounting
    if run.state == "empty":
        return f"{run.run_dir}: the event log is empty, so there is nothing to analyse yet."
    if account.accuracy is None or account.interval is None:
        return f"{run.run_dir}: no task has a result yet."
    interval = f"95% interval {percent(account.interval.low)} to {percent(account.interval.high)}"
    return (
        f"{account.planned - account.pending} of {account.planned} tasks have a result; "
        f"accuracy {percent(account.accuracy)} of all planned ({interval})."
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _draw(
    out_dir: Path, run: RunSummary, tools: list[ToolRow], used: Usage, times: Timing, path: CriticalPath
) -> Iterator[Path]:
    from analysis import plots, timeline  # matplotlib takes half a second, which no figure need wait for

    yield from plots.overview_picture(out_dir / "overview", run, tools, times)
    yield from plots.summary_pictures(out_dir, run)
    yield from plots.usage_pictures(out_dir, used)
    yield from plots.timing_pictures(out_dir, times)
    for segment in path.segments:
        yield from timeline.timeline_picture(out_dir / "timeline", path.run, segment)
