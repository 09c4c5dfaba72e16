"""`report`: a run as one HTML file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from analysis.console import one_line_errors
from analysis.options import AsJson, Run, with_selection
from analysis.page import Page, write_page
from analysis.page_texts import CUT_BYTES
from analysis.selection import Selection
from ray_app.object_store import local


@with_selection
def command(
    selection: Selection,
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: RUN/analysis/report.html.")
    ] = None,
    redact: Annotated[
        bool | None,
        typer.Option("--redact/--no-redact", help="Withhold texts or not; default: those of gated sets."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One HTML file for a browser, without network: figures, plots, every task turn by turn; always of the
    whole run."""
    with one_line_errors():
        run_dir = local(run)
        page = write_page(run_dir, out or run_dir / "analysis" / "report.html", selection, redact=redact)
        print(json.dumps({**asdict(page), "path": str(page.path)}, indent=1) if as_json else _told(page))


def _told(page: Page) -> str:
    lines = [page.sentence, f"{page.path}: {page.tasks:,} tasks, {page.size / 1e6:.1f} MB"]
    if page.withheld:
        lines.append(f"Texts are withheld: {page.withheld}. --no-redact writes them, for your own eyes.")
    elif min(page.text_bytes, page.document_bytes) < CUT_BYTES:
        documents = (
            f"the first {page.document_bytes} bytes of each document"
            if page.document_bytes
            else "no document"
        )
        lines.append(
            f"To stay small it has the first {page.text_bytes} bytes of each text and {documents}; "
            "`python -m analysis show RUN TASK --full` has all."
        )
    return "\n".join(lines)
