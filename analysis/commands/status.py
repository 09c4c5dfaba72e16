"""`status`: is the run alive, what is in flight, what is stuck."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from analysis.console import Answer, one_line_errors, present
from analysis.options import AsJson, Run
from analysis.status import status_of
from analysis.status_page import page
from ray_app.object_store import local


def command(
    run: Run,
    as_json: AsJson = False,
    stuck_after: Annotated[float, typer.Option(help="A call is stuck after so many seconds.")] = 300.0,
) -> None:
    """Whether the run lives, hangs or has ended; exit code 1 where somebody should look."""
    with one_line_errors():
        result = status_of(local(run), stuck_after_s=stuck_after)
    present([run], lambda _: Answer(page(result), asdict(result)), as_json=as_json)
    raise typer.Exit(result.exit_code)
