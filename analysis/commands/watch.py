"""`watch`: the state of a run, kept up to date; what is stuck stands first."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from analysis.console import one_line_errors, show
from analysis.options import AsJson, Run
from analysis.status import RunStatus, status_of
from analysis.status_page import page
from ray_app.object_store import local

# A log that takes long to read is read less often: watching must not cost what running needs.
MOST_SHARE = 0.2


def command(
    run: Run,
    as_json: AsJson = False,
    once: Annotated[bool, typer.Option("--once", help="One frame, as in a pipe.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between frames, at least.")] = 2.0,
    stuck_after: Annotated[float, typer.Option(help="A call is stuck after so many seconds.")] = 300.0,
) -> None:
    """Progress, ETA, rates, cost, errors, slowest tasks and what they wait for, until the run has ended.

    Exit code 1 where somebody should look, as of `status`, which is one frame of this.
    """
    with one_line_errors():
        place = local(run)
        console = Console()
        found = status_of(place, stuck_after_s=stuck_after)
        if as_json:
            print(json.dumps(asdict(found), indent=1, allow_nan=False))
        elif once or not console.is_terminal:
            show(page(found))
        else:
            found = _follow(found, lambda: status_of(place, stuck_after_s=stuck_after), console, interval)
    raise typer.Exit(found.exit_code)


def _follow(found: RunStatus, look: Callable[[], RunStatus], console: Console, interval: float) -> RunStatus:
    """Frame after frame while the run goes on; the last one. Ctrl-C ends it as well."""
    with Live(page(found), console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        try:
            while found.state in ("empty", "running", "stuck"):
                started = time.monotonic()
                found = look()
                took_s = time.monotonic() - started
                live.update(page(found), refresh=True)
                time.sleep(max(interval - took_s, took_s / MOST_SHARE - took_s))
        except KeyboardInterrupt:
            pass
    return found
