"""`critical-path`: where the wall clock went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.console import Answer, present
from analysis.critical_path import COLUMNS, SHOWN, CriticalPath, SegmentPath, critical_path
from analysis.log import open_run
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.path_table import page
from analysis.selection import Selection
from ray_app.object_store import local


@with_selection
def command(
    selection: Selection,
    runs: Runs,
    as_json: AsJson = False,
    out: Out = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many of the slowest tasks to list.")] = SHOWN,
) -> None:
    """What set the end of a run: the chain of tasks, the straggler tail, idle slots; tasks' time by stage."""

    def answer(run: str) -> Answer:
        found = critical_path(open_run(local(run), selection, COLUMNS), tasks)

        def draw(folder: Path) -> Sequence[Path]:
            from analysis.timeline import timeline_picture  # matplotlib takes half a second

            files = list[Path]()
            for segment in found.segments:
                name = "timeline" if len(found.segments) == 1 else f"timeline-{segment.epoch:03d}"
                files += timeline_picture(folder / name, found.run, segment)
            return files

        return Answer(page(found), _content(found), draw)

    present(runs, answer, as_json=as_json, out=out)


def _content(found: CriticalPath) -> dict[str, Any]:
    """For JSON: everything but the arrays that the picture is made of."""
    names = [field.name for field in fields(SegmentPath) if field.name != "gantt"]
    return {
        "run": found.run,
        "note": found.note,
        "segments": [{name: _plain(getattr(segment, name)) for name in names} for segment in found.segments],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [asdict(item) for item in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
