"""How a command answers: a page or JSON on standard output, pictures in a folder, an error in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType

from ray_app.errors import EvalError, RunDirError, UserError

PIPE_WIDTH = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found out about one run: for people, as JSON, and how to draw it (None: no pictures).

    `draw` is given a folder and returns what it wrote there.
    """

    page: RenderableType
    content: Any
    draw: Callable[[Path], Sequence[Path]] | None = None


def present(
    runs: Sequence[str], answer: Callable[[str], Answer], *, as_json: bool, out: Path | None = None
) -> None:
    """Answer for each of `runs`: pages one after the other, or one JSON value (a list for several runs).

    Pictures of several runs lie in a folder for each, numbered in their order.
    """
    with one_line_errors():
        contents = []
        for number, run in enumerate(runs, 1):
            found = answer(run)
            contents.append(found.content)
            if not as_json:
                show(found.page)
            if out is not None and found.draw is not None:
                paths = pictures(found.draw, out if len(runs) == 1 else out / str(number))
                if not as_json:
                    typer.echo(f"Pictures: {', '.join(str(path) for path in paths if path.suffix == '.png')}")
        if as_json:
            print(json.dumps(contents[0] if len(contents) == 1 else contents, indent=1, allow_nan=False))


def pictures(draw: Callable[[Path], Sequence[Path]], folder: Path) -> Sequence[Path]:
    """What `draw` wrote into `folder`, made where there is none. Raises RunDirError where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return draw(folder)
    except OSError as error:
        raise RunDirError(f"{folder}: {error.strerror}; expected a writable folder") from None


def show(page: RenderableType) -> None:
    """Print a page. In a pipe there is no terminal to fit into, and a cut number would be a wrong one."""
    console = Console()
    (console if console.is_terminal else Console(width=PIPE_WIDTH)).print(page)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """An EvalError becomes one line and the exit code: 2 for the user's mistake, else 1."""
    try:
        yield
    except EvalError as error:
        typer.echo(" ".join(str(error).split()), err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
