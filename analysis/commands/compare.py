"""`compare`: is the second run better than the first?"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from analysis.compare import compare
from analysis.compare_page import comparison_page
from analysis.console import Answer, one_line_errors, present
from analysis.options import AsJson, Out
from analysis.settled import read_tasks
from ray_app.object_store import local


class FailOn(StrEnum):
    """Which verdicts make the exit code 1."""

    worse = "worse"
    not_better = "not-better"
    never = "never"


def command(
    first: Annotated[str, typer.Argument(help="The run to compare with.", metavar="A")],
    second: Annotated[str, typer.Argument(help="The run that the verdict is about.", metavar="B")],
    as_json: AsJson = False,
    out: Out = None,
    fail_on: Annotated[FailOn, typer.Option(help="Exit with code 1 at this verdict.")] = FailOn.worse,
    categories: Annotated[
        list[str] | None, typer.Option("--category", help="Only tasks of this category; may be repeated.")
    ] = None,
    trials: Annotated[
        list[int] | None, typer.Option("--trial", help="Only this trial, from 0; may be repeated.")
    ] = None,
    ignore_labels: Annotated[
        bool,
        typer.Option(
            "--ignore-labels", help="Pair by id alone, and judge although protocol, judge or data differ."
        ),
    ] = False,
) -> None:
    """Task by task: accuracy, what flipped, cost and latency, and whether B is better, worse, or who knows.

    Exit code 0: better, or cannot tell; 1: worse (see --fail-on); 2: a mistake in what was asked.
    """
    with one_line_errors():
        picked = categories or (), trials or ()
        found = compare(
            *(read_tasks(local(run), *picked) for run in (first, second)), ignore_labels=ignore_labels
        )

    def draw(folder: Path) -> list[Path]:
        from analysis.compare_picture import comparison_picture  # matplotlib takes most of a second

        return comparison_picture(folder / "compare", found)

    present([second], lambda _: Answer(comparison_page(found), asdict(found), draw), as_json=as_json, out=out)
    failing = {FailOn.worse: ("worse",), FailOn.not_better: ("worse", "cannot tell"), FailOn.never: ()}
    raise typer.Exit(int(found.verdict in failing[fail_on]))
