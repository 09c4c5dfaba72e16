"""Run tau2: `python jobs/tau2.py`, or `ray job submit -- python jobs/tau2.py`.

The built-in service desk by default; `--domain airline` and tau2-bench's other domains where that is
installed. Run the same command again to resume. Exit codes: 0 complete, 1 failures, 2 a mistake in what was
asked (nothing was started), 3 rewards owed, 130 or 143 stopped by a signal. `--replay RUN` runs the tasks of
another run with every reply from its log: 0 equal, 1 other decisions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    # A script's folder comes first on sys.path, where `jobs/` would hide packages of the same name: this
    # very file would be `tau2`.
    sys.path[0] = str(ROOT)

import typer

from ray_app import driver, object_store, preview
from ray_app.config import load
from ray_app.errors import ConfigError, EvalError
from ray_app.job_options import Figures, Fresh, Pictures, Plan, Replay, Retry, RunDir, with_tasks
from ray_app.ordering import NOTHING_ASKED, Asked
from ray_app.recording import Recording
from ray_app.tau2.closing import close
from ray_app.tau2.config import Tau2Config
from ray_app.tau2.run import (
    ReplayInWorker,
    SolverInWorker,
    Tau2Job,
    check_services,
    read_job,
    read_replay,
)
from ray_app.worker import SolverFactory

SAMPLE = ROOT / "configs" / "tau2_sample.yaml"


@with_tasks
def main(
    tasks: Asked,
    config: Annotated[
        Path | None,
        typer.Option(help="Run config (YAML). Default: configs/tau2_sample.yaml; of a replay, its run's."),
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="Run this domain, and not the config's; may be repeated.")
    ] = None,
    run_dir: RunDir = None,
    json: Figures = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set limits.max_steps=50.")
    ] = None,
    plan: Plan = False,
    replay: Replay = None,
    fresh: Fresh = False,
    pictures: Pictures = True,
    retry: Retry = "infrastructure",
) -> None:
    """Evaluate the orchestrator of CONFIG as an agent in dialogues. The same command resumes."""
    console, retry_failed = driver.make_console(), retry == "failed"
    overrides = [*(set_ or ()), *([f"domains=[{', '.join(domain)}]"] if domain else [])]
    try:
        if replay is not None:
            if plan or fresh or retry_failed or tasks != NOTHING_ASKED:
                raise ConfigError("--replay: goes with --config, --domain, --set, --run-dir and --json only")
            job, replay_for = _replay(replay, config, overrides, run_dir)
            command = driver.Command(console, replay_for, partial(check_services, job), json_path=json)
            raise typer.Exit(driver.carry_out(job, command))
        settings = load(config or SAMPLE, [*overrides, *tasks.overrides], kind=Tau2Config)
        job = read_job(settings, run_dir, tasks)
        if plan:
            work = driver.make_plan(job, retry_failed=retry_failed, asked=tasks)
            is_complete = preview.show(job, work, console, tasks)
            raise typer.Exit(0 if is_complete else 2)
        solver_for = partial(SolverInWorker, job.config, job.prompts, job.data_folder, job.keys())
        check = partial(check_services, job)
        command = driver.Command(console, solver_for, check, fresh, retry_failed, json, pictures, tasks)
        exit_code = driver.carry_out(job, command)
        close(job, command)
        raise typer.Exit(exit_code)
    except EvalError as error:
        raise typer.Exit(driver.report_error(error, console)) from None
    except driver.Stopped as stopped:
        console.print("stopped before the first task; nothing was paid")
        raise typer.Exit(stopped.exit_code) from None


def _replay(
    run: Path, config: Path | None, overrides: Sequence[str], run_dir: Path | None
) -> tuple[Tau2Job, Callable[[Mapping[str, str]], SolverFactory]]:
    """The replay of `run`, by default under its own config, whatever the environment says today."""
    recorded = Recording.of(object_store.local(run))
    saved = recorded.run_dir / "config.yaml"
    if config:
        settings = load(config, overrides, kind=Tau2Config)
    else:
        settings = load(saved, ["endpoints_file=null", *overrides], {}, kind=Tau2Config)
    job = read_replay(recorded, settings, run_dir)
    return job, lambda urls: ReplayInWorker(job.config, job.prompts, job.data_folder)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
