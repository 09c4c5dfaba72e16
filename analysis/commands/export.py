"""`export`: a run for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from analysis.console import one_line_errors
from analysis.export import export
from analysis.options import Run
from ray_app.object_store import local


class Form(StrEnum):
    """What `export` can write."""

    json = "json"
    csv = "csv"
    parquet = "parquet"
    pandas = "pandas"
    tau2 = "tau2"


def command(
    run: Run,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write into.")],
    form: Annotated[
        Form, typer.Option("--format", help="{id}.json of earlier systems or tau2, or flat tables.")
    ] = Form.json,
) -> None:
    """Write {id}.json per result (json, tau2) or tables: results and calls (csv, parquet; pandas: Feather)"""
    with one_line_errors():
        for line in export(local(run), to, form.value):
            typer.echo(f"{to}: {line}")
