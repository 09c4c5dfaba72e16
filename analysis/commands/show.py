"""`show`: one task's story."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from analysis.console import one_line_errors
from analysis.options import Run
from analysis.trace import trace
from ray_app.object_store import local


def command(run: Run, task: Annotated[str, typer.Argument(help="Task id.", metavar="TASK")]) -> None:
    """One task, turn by turn, with what every call gave."""
    with one_line_errors():
        console = Console(soft_wrap=True)
        for line in trace(local(run), task):
            console.print(line)
