"""`usage`: which tool asked which model."""

from __future__ import annotations

from dataclasses import asdict

from analysis import tables
from analysis.console import Answer, present
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.queries import open_run, usage_table
from analysis.selection import Selection
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False, out: Out = None) -> None:
    """Calls, tokens and cost per tool and model."""

    def answer(run: str) -> Answer:
        rows = usage_table(open_run(local(run)))
        return Answer(tables.usage_page(rows), [asdict(row) for row in rows])

    present(runs, answer, as_json=as_json, out=out)
