"""`timing`: how long calls take."""

from __future__ import annotations

from dataclasses import asdict

from analysis import tables
from analysis.console import Answer, present
from analysis.metrics import describe_metrics
from analysis.options import AsJson, Out, Runs, with_selection
from analysis.queries import open_run, tool_table
from analysis.selection import Selection
from ray_app.object_store import local


@with_selection
def command(selection: Selection, runs: Runs, as_json: AsJson = False, out: Out = None) -> None:
    """Times and errors per tool, and the metrics of the histograms."""

    def answer(run: str) -> Answer:
        log = open_run(local(run))
        tools, metrics = tool_table(log), describe_metrics(log)
        content = {
            "tools": [asdict(row) for row in tools],
            "metrics": {name: asdict(report) for name, report in metrics.items()},
        }
        return Answer(tables.timing_page(tools, metrics), content)

    present(runs, answer, as_json=as_json, out=out)
