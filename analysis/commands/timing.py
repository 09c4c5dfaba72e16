"""`timing`: how long each tool, model and stage takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis import tables
from analysis.console import Answer, present
from analysis.log import open_run
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.selection import Selection
from analysis.timing import COLUMNS, timing
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False, out: Out = None) -> None:
    """Times per tool, model and stage: moments, percentiles, histograms, and where a mean call goes."""

    def answer(run: str) -> Answer:
        found = timing(open_run(local(run), selection, COLUMNS))

        def draw(folder: Path) -> Sequence[Path]:
            from analysis.plots import timing_pictures  # matplotlib takes half a second

            return timing_pictures(folder, found)

        return Answer(tables.timing_page(found), found.content, draw)

    present(runs, answer, as_json=as_json, out=out)
