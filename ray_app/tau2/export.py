"""The counted simulations of a run as files that tau2's own viewer and tools read: one for each domain.

Made from the event log, so only what counts is there, and a resumed or interrupted run exports as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ray_app import object_store, rundir
from ray_app.records import Task
from ray_app.tau2.config import Tau2Config
from ray_app.tau2.counted import counted_simulations
from ray_app.tau2.run import CRITERIA, Tau2Job

FOLDER = "tau2"


def export(job: Tau2Job) -> list[str]:
    """Writes `tau2/DOMAIN.json` into the run directory; says where, in a line for each."""
    found = simulations(job)
    folder = job.run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    lines = []
    for domain in job.config.domains:
        listed = [run for category, run in found if category == domain]
        path = folder / f"{domain}.json"
        rundir.write_json(path, results_json(job.config, job.tasks, domain, listed))
        lines.append(f"Simulations of {domain}: {len(listed)} in {object_store.place(job.run_dir)}/{FOLDER}")
    object_store.push(job.run_dir, [FOLDER])
    return lines


def simulations(job: Tau2Job) -> list[tuple[str, dict[str, Any]]]:
    """(domain, SimulationRun as JSON data) of each result that counts and has one, by trial and task."""
    found = counted_simulations(job.run_dir)
    order = {task.rollout_key: place for place, task in enumerate(job.tasks)}
    keys = sorted((key for key in found if key[0] in order), key=lambda key: (key[1], order[key[0]]))
    return [(found[key].domain, found[key].run) for key in keys]


def results_json(
    config: Tau2Config, tasks: Iterable[Task], domain: str, listed: list[dict[str, Any]]
) -> dict[str, Any]:
    """tau2's `Results` of a domain: the settings, the tasks, and their simulations."""
    own = [task for task in tasks if task.category == domain]
    return {
        "info": _info(config, domain),
        "tasks": [{**json.loads(task.question), CRITERIA: json.loads(task.answer)} for task in own],
        "simulations": listed,
    }


def _info(config: Tau2Config, domain: str) -> dict[str, Any]:
    def side(model: str, sampling: dict[str, Any]) -> dict[str, Any]:
        return {"implementation": "toolorch-eval", "llm": model, "llm_args": sampling}

    return {
        "git_commit": rundir.commit(),
        "num_trials": config.trials,
        "max_steps": config.limits.max_steps,
        "max_errors": config.limits.max_errors,
        "user_info": side(config.user.model, config.user.sampling.model_dump()),
        "agent_info": side(config.orchestrator.model, config.orchestrator.sampling.model_dump()),
        "environment_info": {"domain_name": domain, "policy": ""},
        "seed": config.seed,
    }
