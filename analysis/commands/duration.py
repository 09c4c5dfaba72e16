"""`duration`: how long the calls of one tool with one model take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis import tables
from analysis.console import Answer, present
from analysis.duration import COLUMNS, duration_of
from analysis.log import open_run
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.selection import Selection
from ray_app.errors import UserError
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False, out: Out = None) -> None:
    """The distribution of one pair: --tool TOOL --model MODEL, both by their exact names."""

    def answer(run: str) -> Answer:
        if len(selection.tools) != 1 or len(selection.models) != 1:
            raise UserError("duration is about one pair: expected one --tool and one --model (see `usage`)")
        found = duration_of(open_run(local(run), selection, COLUMNS))

        def draw(folder: Path) -> Sequence[Path]:
            if not found.row.stats.n:
                return []
            from analysis.plots import series_picture  # matplotlib takes half a second

            return series_picture(folder / "duration", found.title, [found.row], [found.series])

        return Answer(tables.duration_page(found), found.content, draw)

    present(runs, answer, as_json=as_json, out=out)
