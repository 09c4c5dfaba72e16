"""Options that the jobs share: those of every command, and those that say which tasks run, in what order and
how many now, which arrive as one `Asked`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, Literal, ParamSpec

import typer

from ray_app.ordering import Asked

P = ParamSpec("P")

RunDir = Annotated[
    Path | None,
    typer.Option(help="Where the run lives: a folder, or s3://BUCKET/PREFIX. Default: by config."),
]
Figures = Annotated[Path | None, typer.Option(help="Write the final figures here.")]
Plan = Annotated[bool, typer.Option("--plan", "--dry-run", help="Show work, routes and cost; start nothing.")]
Replay = Annotated[
    Path | None,
    typer.Option(
        help="Run the tasks of RUN again with every reply from its log, and compare the decisions.",
        metavar="RUN",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Deploy the services again.")]
Pictures = Annotated[bool, typer.Option(help="Draw the pictures at the end.")]
Retry = Annotated[Literal["infrastructure", "failed"], typer.Option(help="Which failed tasks run again.")]


def with_tasks(command: Callable[Concatenate[Asked, P], None]) -> Callable[..., None]:
    """`command` with these options behind its own ones; its first parameter gets them as one value.

    `--ids` stays text there: to read it may fail, and a command has its own way to say so.
    """

    @wraps(command)
    def wrapper(*args: P.args, **given: P.kwargs) -> None:
        values: dict[str, Any] = {name: given.pop(name) for name in _OPTIONS}
        command(Asked(**values), *args, **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    wrapper.__signature__ = inspect.Signature([*own, *_OPTIONS.values()])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {
        parameter.name: parameter.annotation for parameter in (*own, *_OPTIONS.values())
    }
    return wrapper


def _option(name: str, kind: Any, default: Any, flag: str, words: str, **more: Any) -> inspect.Parameter:
    option = typer.Option(flag, help=words, rich_help_panel="Tasks", **more)
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_PARAMETERS = (
    _option("limit", int | None, None, "--limit", "Only so many tasks: another run than all.", min=1),
    _option("ids", str | None, None, "--ids", "Only these tasks: id,id or a file of one id a line."),
    _option("trials", int | None, None, "--trials", "Trials of each task, as the key `trials`.", min=1),
    _option(
        "is_shuffled", bool, False, "--shuffle", "Start tasks in a random order; --limit takes its first."
    ),
    _option("seed", int, 0, "--seed", "Of --shuffle and of the sample of --pilot."),
    _option(
        "durations_from",
        Path | None,
        None,
        "--durations-from",
        "Longest first, as tasks took in RUN. Default: in this run's earlier commands.",
        metavar="RUN",
    ),
    _option(
        "pilot", int | None, None, "--pilot", "Run a stratified sample of so many tasks, then stop.", min=1
    ),
)
_OPTIONS = {parameter.name: parameter for parameter in _PARAMETERS}
