"""What a benchmark measured: figures, each with the target it must reach; a table and a JSON file.

Imports no Ray and, for the figures alone, nothing beyond the standard library.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Op = Literal["<", "<=", "==", ">=", ">"]
HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Figure:
    """One row: a value and, where it is judged, the target that it must reach."""

    name: str
    value: float
    op: Op | None = None
    target: float | None = None
    unit: str = ""

    @property
    def is_reached(self) -> bool:
        """Also true of a figure that is only told; a value that is not a number reaches nothing."""
        if self.op is None or self.target is None:
            return True
        return HOLDS[self.op](self.value, self.target)

    @property
    def verdict(self) -> str:
        if self.op is None or self.target is None:
            return ""
        return f"{'ok' if self.is_reached else 'MISSED'} ({self.op} {self.target:g})"

    @property
    def line(self) -> str:
        return f"{self.name:62} {self.value:14,.6g} {self.unit:9} {self.verdict}".rstrip()


def write(figures: Iterable[Figure], path: Path) -> None:
    """The figures as JSON: `{"figures": [{"name", "value", "op", "target"}, ...]}`."""
    keys = ("name", "value", "op", "target")
    rows = [{key: asdict(figure)[key] for key in keys} for figure in figures]
    path.write_text(json.dumps({"figures": rows}, indent=1) + "\n")


def told(measured: Iterable[Figure]) -> list[Figure]:
    """All of them, each of which is printed to stderr when it is there."""
    figures = []
    for figure in measured:
        print(figure.line, file=sys.stderr, flush=True)
        figures.append(figure)
    return figures


def report(figures: Sequence[Figure], json_path: Path | None = None) -> int:
    """Print the table, write the JSON where asked; 0 where every target is reached, else 1."""
    from rich.console import Console  # a figure alone needs no terminal
    from rich.table import Table

    table = Table()
    table.add_column("figure", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for figure in figures:
        style = "" if figure.is_reached else "red"
        table.add_row(figure.name, f"{figure.value:,.4g}", figure.unit, figure.verdict, style=style)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    if json_path is not None:
        write(figures, json_path)
    return 0 if all(figure.is_reached for figure in figures) else 1
