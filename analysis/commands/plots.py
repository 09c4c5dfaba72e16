"""`plots`: everything that can be drawn of a run, beside its log."""

from __future__ import annotations

import json

from analysis.console import one_line_errors
from analysis.options import AsJson, Out, Run
from analysis.report import analyse
from ray_app.object_store import local


def command(run: Run, out: Out = None, as_json: AsJson = False) -> None:
    """Write stats.json and all pictures, by default to RUN/analysis; open overview.png first."""
    with one_line_errors():
        output = analyse(local(run), out)
        if as_json:
            print(
                json.dumps({"stats": str(output.stats), "pictures": [str(path) for path in output.pictures]})
            )
        else:
            print(f"{output.message}\n{output.overview}\n{output.stats}\n{len(output.pictures)} pictures")
