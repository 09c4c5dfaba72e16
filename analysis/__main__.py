"""`python -m analysis COMMAND RUN`: what a run did, from its event log, at any moment of its life."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from analysis import tables
from analysis.metrics import describe_metrics
from analysis.queries import open_run, tool_table, usage_table
from analysis.report import analyse
from analysis.status import page, status_of
from analysis.story import story_of
from analysis.story_page import story_lines
from analysis.summary import summarise
from ray_app.errors import EvalError, UserError
from ray_app.object_store import local

Run = Annotated[str, typer.Argument(help="Run directory, or its s3:// url.", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the files; default RUN/analysis.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.command()
def summary(run: Run, as_json: AsJson = False) -> None:
    """Outcomes, accuracy with its interval, cost, tokens and time."""
    with _one_line_errors():
        result = summarise(open_run(local(run)))
        _print(tables.summary_page(result), asdict(result), as_json)


@app.command()
def timing(run: Run, as_json: AsJson = False) -> None:
    """Times and errors per tool, and the metrics of the histograms."""
    with _one_line_errors():
        log = open_run(local(run))
        rows, metrics = tool_table(log), describe_metrics(log)
        content = {
            "tools": [asdict(row) for row in rows],
            "metrics": {name: asdict(report) for name, report in metrics.items()},
        }
        _print(tables.timing_page(rows, metrics), content, as_json)


@app.command()
def usage(run: Run, as_json: AsJson = False) -> None:
    """Calls, tokens and cost per tool and model."""
    with _one_line_errors():
        rows = usage_table(open_run(local(run)))
        _print(tables.usage_page(rows), [asdict(row) for row in rows], as_json)


@app.command()
def status(
    run: Run,
    as_json: AsJson = False,
    stuck_after: Annotated[float, typer.Option(help="A call is stuck after so many seconds.")] = 300.0,
) -> None:
    """Whether the run lives, hangs or has ended; exit code 1 where somebody should look."""
    with _one_line_errors():
        result = status_of(local(run), stuck_after_s=stuck_after)
        _print(page(result), asdict(result), as_json)
        raise typer.Exit(result.exit_code)


@app.command()
def plots(run: Run, out: Out = None, as_json: AsJson = False) -> None:
    """Write stats.json and all pictures; open overview.png first."""
    with _one_line_errors():
        output = analyse(local(run), out)
        if as_json:
            print(
                json.dumps({"stats": str(output.stats), "pictures": [str(path) for path in output.pictures]})
            )
        else:
            print(f"{output.message}\n{output.overview}\n{output.stats}\n{len(output.pictures)} pictures")


@app.command()
def show(run: Run, task: Annotated[str, typer.Argument(help="Task id.", metavar="TASK")]) -> None:
    """One task, turn by turn, with what every call gave."""
    with _one_line_errors():
        console = Console(soft_wrap=True)
        for line in story_lines(story_of(local(run), task)):
            console.print(line)


def _print(page: Any, content: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(content, indent=1, allow_nan=False))
    else:
        console = Console()
        # In a pipe there is no terminal to fit into, and a cut number would be a wrong one.
        console.print(page) if console.is_terminal else Console(width=160).print(page)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except EvalError as error:
        typer.echo(" ".join(str(error).split()), err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


if __name__ == "__main__":
    app(prog_name="python -m analysis")
