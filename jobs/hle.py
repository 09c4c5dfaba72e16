"""Run Humanity's Last Exam: `python jobs/hle.py`, or `ray job submit -- python jobs/hle.py`.

Run the same command again to resume; `--replay RUN` runs the tasks of another run with every reply from
its log. Exit codes: 0 complete (a replay: equal), 1 failures (a replay: other decisions), 2 a mistake in
what was asked (nothing was started), 3 verdicts owed, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    # A script's folder comes first on sys.path, where `jobs/` would hide packages of the same name.
    sys.path[0] = str(ROOT)

import typer

from ray_app import adopt as adoption
from ray_app import driver, object_store, preview
from ray_app.config import load
from ray_app.errors import ConfigError, EvalError
from ray_app.hle import HleJob, ReplayInWorker, SolverInWorker, check_services, read_job, read_replay
from ray_app.job_options import Figures, Fresh, Pictures, Plan, Replay, Retry, RunDir, with_tasks
from ray_app.ordering import NOTHING_ASKED, Asked
from ray_app.recording import Recording
from ray_app.worker import SolverFactory

SAMPLE = ROOT / "configs" / "hle_sample.yaml"


@with_tasks
def main(
    tasks: Asked,
    config: Annotated[
        Path | None,
        typer.Option(help="Run config (YAML). Default: configs/hle_sample.yaml; of a replay, the run's own."),
    ] = None,
    run_dir: RunDir = None,
    json: Figures = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set limits.max_rounds=10.")
    ] = None,
    plan: Plan = False,
    adopt: Annotated[
        Path | None,
        typer.Option(help="First take over the finished {id}.json results of DIR.", metavar="DIR"),
    ] = None,
    replay: Replay = None,
    fresh: Fresh = False,
    pictures: Pictures = True,
    retry: Retry = "infrastructure",
) -> None:
    """Evaluate the orchestrator of CONFIG on its dataset. The same command resumes."""
    console, retry_failed = driver.make_console(), retry == "failed"
    try:
        if replay is not None:
            if plan or adopt is not None or fresh or retry == "failed" or tasks != NOTHING_ASKED:
                raise ConfigError("--replay: goes with --config, --set, --run-dir and --json only")
            job, solver_for = _replay(replay, config, set_ or (), run_dir)
            check = partial(check_services, job)
            command = driver.Command(console, solver_for, check, json_path=json)
            raise typer.Exit(driver.carry_out(job, command))
        job = read_job(load(config or SAMPLE, [*(set_ or ()), *tasks.overrides]), run_dir, tasks)
        if plan:
            work = driver.make_plan(job, retry_failed=retry_failed, asked=tasks)
            is_complete = preview.show(job, work, console, tasks)
            raise typer.Exit(0 if is_complete else 2)
        if adopt is not None:
            console.print(driver.adopt(job, adoption.read_results(adopt, job.tasks_by_id)), highlight=False)
        solver_for = partial(SolverInWorker, job.config, job.prompts, job.isolation, job.keys())
        check = partial(check_services, job)
        command = driver.Command(console, solver_for, check, fresh, retry_failed, json, pictures, tasks)
        raise typer.Exit(driver.carry_out(job, command))
    except EvalError as error:
        raise typer.Exit(driver.report_error(error, console)) from None
    except driver.Stopped as stopped:
        console.print("stopped before the first task; nothing was paid")
        raise typer.Exit(stopped.exit_code) from None


def _replay(
    run: Path, config: Path | None, overrides: Sequence[str], run_dir: Path | None
) -> tuple[HleJob, Callable[[Mapping[str, str]], SolverFactory]]:
    """The replay of `run`, by default under its own config, whatever the environment says today."""
    recorded = Recording.of(object_store.local(run))
    saved = recorded.run_dir / "config.yaml"
    settings = load(config, overrides) if config else load(saved, ["endpoints_file=null", *overrides], {})
    job = read_replay(recorded, settings, run_dir)
    return job, lambda urls: ReplayInWorker(job.config, job.prompts)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
