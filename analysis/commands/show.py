"""`show`: one task's story."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from analysis.console import one_line_errors
from analysis.options import AsJson, Run
from analysis.story import story_of
from analysis.story_page import story_lines
from ray_app.object_store import local


def command(
    run: Run,
    task: Annotated[str, typer.Argument(help="Task id, or the beginning of one.", metavar="TASK")],
    full: Annotated[bool, typer.Option("--full", help="Every text to its end.")] = False,
    trial: Annotated[int | None, typer.Option(help="Only this trial, from 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """One task, turn by turn: what was chosen, asked, answered, run, found and judged."""
    with one_line_errors():
        story = story_of(local(run), task, trial)
        if as_json:
            print(json.dumps(asdict(story), indent=1, ensure_ascii=False))
            return
        console = Console(soft_wrap=True)
        for line in story_lines(story, whole=full):
            console.print(line)
