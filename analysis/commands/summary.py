"""`summary`: how right, how sure, how much, how dear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from analysis import tables
from analysis.console import Answer, present
from analysis.log import open_run
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.selection import Selection
from analysis.summary import COLUMNS, summarise
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False, out: Out = None) -> None:
    """Outcomes, accuracy with its interval, calibration, cost, tokens and time; always of the whole run."""

    def answer(run: str) -> Answer:
        found = summarise(open_run(local(run), replace(selection, all_runs=True), COLUMNS))

        def draw(folder: Path) -> Sequence[Path]:
            from analysis.plots import summary_pictures  # matplotlib takes half a second

            return summary_pictures(folder, found)

        return Answer(tables.summary_page(found), asdict(found), draw)

    present(runs, answer, as_json=as_json, out=out)
