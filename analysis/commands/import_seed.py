"""`import-seed`: runs of earlier systems, for every other command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from analysis.console import one_line_errors
from analysis.options import AsJson
from analysis.seed_import import import_run


def command(
    logs: Annotated[Path, typer.Argument(help="A text log, or a folder of them.", metavar="LOG_OR_DIR")],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run directory to make.")],
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of its {id}.json results.")
    ] = None,
    log_glob: Annotated[str, typer.Option(help="Which files of a folder are logs.")] = "hle*.log",
    as_json: AsJson = False,
) -> None:
    """Make a run directory of an earlier system's text logs (times) and results (what was right)."""
    with one_line_errors():
        made = import_run(logs, results, out.absolute(), log_glob)
        print(
            json.dumps(asdict(made), indent=1) if as_json else f"{made.line()}\nRun directory: {made.run_dir}"
        )
