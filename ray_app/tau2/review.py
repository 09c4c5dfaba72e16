"""Second opinions on simulations: recorded dialogues are rewarded again, the judge is asked where it counts.

The environments and the evaluator are those of now; a reward that is owed is told as one that is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_app import opinions
from ray_app.config import load
from ray_app.journal import Journal
from ray_app.opinions import JudgePass, Key
from ray_app.prompting import load_prompts
from ray_app.records import Task, Verdict, digest
from ray_app.tau2 import upstream
from ray_app.tau2.config import Tau2Config
from ray_app.tau2.counted import counted_simulations
from ray_app.tau2.domain import Domain
from ray_app.tau2.judging import ask_judge, verdict_of
from ray_app.tau2.results import simulation_json, simulation_of
from ray_app.tau2.run import PROMPTS, Tau2Job, domains_digest, load_domains, read_tasks, spec_of
from ray_app.tau2.simulation import Simulation
from ray_app.tools.base import Caller

CHANGEABLE = ("judge", "models", "concurrency", "services", "endpoints_file")


def read_pass(
    run_dir: Path, overrides: Sequence[str] = (), *, prompts: str | None = None, label: str | None = None
) -> JudgePass:
    """The run in `run_dir` under another judge. Raises UserError; asks and writes nothing."""
    saved = opinions.config_file(run_dir)
    opinions.check_overrides(overrides, CHANGEABLE)
    own = load(saved, environ={}, kind=Tau2Config)
    config = load(saved, overrides, environ={}, kind=Tau2Config)
    texts, folder = load_prompts(prompts or config.prompts, PROMPTS), upstream.data_folder()
    domains = load_domains(config, texts, folder)
    data = read_tasks(config, domains)
    identity = {
        "prompt_digest": texts.digest,
        "tasks_digest": data.digest,
        "domains_digest": domains_digest(config, domains),
    }
    serving = opinions.serve_config_of(config, config.judge)
    job = Tau2Job(config, data, texts, identity, run_dir.resolve(), serving, data_folder=folder)
    parts = [config.judge.model, texts.digest_of("judge"), *opinions.sampling_part(config.judge, own.judge)]
    names = f"{own.judge.model} (in the run)", f"{config.judge.model} (now)"
    return JudgePass(
        job, label or ":".join(parts), own, config.judge, SimulationReviewer(job, domains), names
    )


@dataclass(frozen=True)
class SimulationReviewer:
    """Simulations by their reward."""

    job: Tau2Job
    domains: Mapping[str, Domain]
    # As in a run: environments and evaluators are plain computation.
    computing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @property
    def settings(self) -> dict[str, Any]:
        config = self.job.config
        return {
            **opinions.judge_settings(config, config.judge),
            "prompt_digest": self.job.prompts.digest_of("judge"),
            "domains_digest": self.job.identity["domains_digest"],
        }

    def subjects(self, rows: Sequence[Mapping[str, Any]]) -> dict[Key, Simulation]:
        found = counted_simulations(self.job.run_dir)
        return {key: simulation_of(each.run) for key, each in found.items()}

    def request(self, task: Task, subject: Simulation) -> str:
        return digest([self.settings, task.judge_key, simulation_json(subject)])

    def needs_asking(self, task: Task, subject: Simulation) -> bool:
        return bool(self.domains[task.category].questions(spec_of(task), subject))

    async def verdict(self, caller: Caller, journal: Journal, task: Task, subject: Simulation) -> Verdict:
        spec, domain, settings = spec_of(task), self.domains[task.category], self.job.config.judge
        asked = await asyncio.to_thread(domain.questions, spec, subject)
        judged = await ask_judge(caller, journal, settings, domain, spec, asked)
        async with self.computing:
            reward = await asyncio.to_thread(domain.reward, spec, subject, judged)
        return verdict_of(subject.reason, reward, settings)

    def missing(self, task_id: str) -> str:
        domain = task_id.partition(":")[0]
        return (
            f"domain {domain}: task {task_id!r} of the run is not in it as it was; restore the data of then "
            f"({upstream.DATA_VARIABLE}, for tau2-bench's own)"
        )
