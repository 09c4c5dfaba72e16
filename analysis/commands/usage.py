"""`usage`: which tool asked which model, how often, for how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from analysis import tables
from analysis.console import Answer, present
from analysis.log import open_run
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.selection import Selection
from analysis.usage import COLUMNS, usage
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False, out: Out = None) -> None:
    """Calls, shares, success, tokens and cost per tool and model."""

    def answer(run: str) -> Answer:
        found = usage(open_run(local(run), selection, COLUMNS))

        def draw(folder: Path) -> Sequence[Path]:
            from analysis.plots import usage_pictures  # matplotlib takes half a second

            return usage_pictures(folder, found)

        return Answer(tables.usage_page(found), asdict(found), draw)

    present(runs, answer, as_json=as_json, out=out)
