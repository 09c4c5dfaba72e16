"""`tau2`: how reliably an agent serves its users, over several trials."""

from __future__ import annotations

from dataclasses import asdict

from analysis.console import Answer, present
from analysis.log import open_run
from analysis.options import AsJson, Runs, with_selection
from analysis.selection import Selection
from analysis.simulations import COLUMNS, simulations
from analysis.simulations_page import simulations_page
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False) -> None:
    """pass^k by domain and overall with intervals, coverage, termination reasons, the noise floor."""

    def answer(run: str) -> Answer:
        found = simulations(open_run(local(run), selection, COLUMNS))
        return Answer(simulations_page(found), asdict(found))

    present(runs, answer, as_json=as_json)
