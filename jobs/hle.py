"""Run Humanity's Last Exam: `python jobs/hle.py`, or `ray job submit -- python jobs/hle.py`.

Run the same command again to resume. Exit codes: 0 complete, 1 failures, 2 a mistake in what was
asked (nothing was started), 3 verdicts owed, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

# A script's folder comes first on sys.path, where `jobs/` would hide packages of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console

from ray_app import adopt as adoption
from ray_app import driver, preview
from ray_app.config import load
from ray_app.errors import EvalError
from ray_app.hle import SolverInWorker, read_job

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "hle_sample.yaml"


def main(
    config: Annotated[Path, typer.Option(help="Run config (YAML).")] = DEFAULT_CONFIG,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run lives; default: by config.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the final figures here.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override a key: limits.max_rounds=10.")] = [],  # noqa: B006
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Show work, routes, cost; start nothing.")
    ] = False,
    adopt: Annotated[Path | None, typer.Option(help="Take over finished {id}.json results.")] = None,
    fresh: Annotated[bool, typer.Option(help="Deploy the services again.")] = False,
    retry: Annotated[
        Literal["infrastructure", "failed"], typer.Option(help="Which failures run again.")
    ] = "infrastructure",
) -> None:
    """Evaluate the orchestrator of CONFIG on its dataset; the same command resumes."""
    console = Console()
    try:
        job = read_job(load(config, set_), run_dir)
        if adopt is not None:
            console.print(driver.adopt(job, adoption.read_results(adopt, job.tasks_by_id)))
        if plan:
            raise typer.Exit(
                0 if preview.show(job, driver.make_plan(job, retry_failed=retry == "failed"), console) else 2
            )
        make_solver = SolverInWorker(job.config, job.prompts, job.serve_config.urls())
        ending = driver.carry_out(
            job, make_solver, console=console, fresh=fresh, retry_failed=retry == "failed"
        )
        driver.finish(job, ending, json, console)
    except EvalError as error:
        raise typer.Exit(driver.report_error(error, console)) from None
    raise typer.Exit(ending.exit_code)


if __name__ == "__main__":
    typer.run(main)
