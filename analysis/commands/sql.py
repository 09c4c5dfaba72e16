"""`sql`: any question that no other command answers."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.console import one_line_errors, show
from analysis.options import AsJson, Run
from analysis.sql import VIEWS, Found, ask
from analysis.text import plain
from ray_app.object_store import is_url, local

SHOWN_ROWS, SHOWN_BLOCKS, MOST_COLUMNS = 200, 20, 12


def command(
    query: Annotated[str, typer.Argument(help="One SELECT; views: " + ", ".join(VIEWS), metavar="SELECT")],
    run: Run,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with a line of names.")] = False,
) -> None:
    """Ask DuckDB over the views events, results and payloads, also while the run goes on.

    SELECT and RUN are taken in either order.
    """
    if _is_run(query):
        query, run = run, query
    with one_line_errors():
        found = ask(local(run), query)
        if as_json:
            print(json.dumps([dict(zip(found.names, row, strict=True)) for row in found.rows], indent=1))
        elif as_csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerows([found.names, *found.rows])
        else:
            show(page(found))


def _is_run(text: str) -> bool:
    try:
        return is_url(text) or (bool(text) and Path(text).is_dir())
    except OSError:  # too long for a name
        return False


def page(found: Found) -> RenderableType:
    """The first rows: a table, numbers to the right; many columns stand below one another."""
    if not found.rows:
        return Text(f"No row. Columns: {', '.join(found.names)}")
    is_wide = len(found.names) > MOST_COLUMNS
    shown = found.rows[: SHOWN_BLOCKS if is_wide else SHOWN_ROWS]
    body = _blocks(found.names, shown) if is_wide else _table(found.names, shown)
    left_out = len(found.rows) - len(shown)
    note = Text(f"The first {len(shown)} of {len(found.rows):,} rows; --csv and --json give all.")
    return Group(body, note) if left_out else body


def _table(names: list[str], rows: list[list[Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(names):
        is_number = all(_is_number(row[place]) for row in rows)
        table.add_column(Text(plain(name)), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _blocks(names: list[str], rows: list[list[Any]]) -> Group:
    width = max(map(len, names))
    lines = []
    for number, row in enumerate(rows, 1):
        lines.append(Text(f"row {number}", style="bold"))
        lines += [
            Text(f"  {name:<{width}}  {_cell(value)}")
            for name, value in zip(names, row, strict=True)
            if value not in (None, "")
        ]
    return Group(*lines)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    return "" if value is None else plain(value, 200)
