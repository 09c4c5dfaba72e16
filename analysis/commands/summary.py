"""`summary`: how right, how much, how dear."""

from __future__ import annotations

from dataclasses import asdict

from analysis import tables
from analysis.console import Answer, present
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.queries import open_run
from analysis.selection import Selection
from analysis.summary import summarise
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False, out: Out = None) -> None:
    """Outcomes, accuracy with its interval, cost, tokens and time."""

    def answer(run: str) -> Answer:
        found = summarise(open_run(local(run)))
        return Answer(tables.summary_page(found), asdict(found))

    present(runs, answer, as_json=as_json, out=out)
