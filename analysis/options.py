"""Options that commands share, as parameter types, and the filters, which arrive as one `Selection`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from analysis.selection import Selection

Run = Annotated[str, typer.Argument(help="Run directory, or its s3:// url.", metavar="RUN")]
Runs = Annotated[list[str], typer.Argument(help="Run directories, or s3:// urls.", metavar="RUN...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write pictures (PNG and SVG) into this folder.")
]
P = ParamSpec("P")


def with_selection(command: Callable[Concatenate[Selection, P], None]) -> Callable[..., None]:
    """`command` with the filter options behind its own ones; its first parameter gets them as one value."""

    @wraps(command)
    def wrapper(*args: P.args, **given: P.kwargs) -> None:
        values: dict[str, Any] = {name: given.pop(name) for name in _FILTERS}
        all_runs = values.pop("all_runs")
        command(
            Selection(all_runs, **{name: tuple(value or ()) for name, value in values.items()}),
            *args,
            **given,
        )

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    wrapper.__signature__ = inspect.Signature([*own, *_FILTERS.values()])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {
        parameter.name: parameter.annotation for parameter in (*own, *_FILTERS.values())
    }
    return wrapper


def _filter(name: str, option: str, kind: Any, words: str) -> inspect.Parameter:
    annotation = Annotated[list[kind] | None, typer.Option(f"--{option}", help=f"{words}; may be repeated.")]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_FILTERS = {
    "all_runs": inspect.Parameter(
        "all_runs",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool, typer.Option("--all-runs", help="All segments of a run, not its last alone.")
        ],
    ),
    "tools": _filter("tools", "tool", str, "Only calls of this tool"),
    "models": _filter("models", "model", str, "Only calls of the model of exactly this name"),
    "benchmarks": _filter("benchmarks", "benchmark", str, "Only runs of this benchmark"),
    "categories": _filter("categories", "category", str, "Only tasks of this category"),
    "statuses": _filter("statuses", "status", str, "Only calls that ended so: ok, error, invalid"),
    "trials": _filter("trials", "trial", int, "Only this trial of each task, from 0"),
}
