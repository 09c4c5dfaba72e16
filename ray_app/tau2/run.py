"""tau2: how one task becomes a simulation and a reward.

Simulation and judge share the task's journal, so a judge that fails leaves the dialogue recorded: the resume
replays it, rebuilds the environment to the same state, and asks the judge alone.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ray_app import object_store, ordering, rundir, services
from ray_app.budgets import check_spent, in_time
from ray_app.chat import ChatClient, Router
from ray_app.config import Retriever, Sampling
from ray_app.dataset import TaskSet
from ray_app.driver import Job, check_routes
from ray_app.errors import ConfigError, DatasetError, EvalError, LimitReached
from ray_app.journal import Journal
from ray_app.ordering import NOTHING_ASKED, Asked
from ray_app.prompting import Prompts, load_prompts
from ray_app.recording import Nothing, Recording, without_time
from ray_app.records import Task, Verdict, digest
from ray_app.slots import RouteKey, Slots
from ray_app.tau2 import upstream
from ray_app.tau2.config import Tau2Config, trial_seed
from ray_app.tau2.domain import Domain, Environment, prepare
from ray_app.tau2.judging import ask_judge, verdict_of
from ray_app.tau2.loop import Dialogue, Rules
from ray_app.tau2.results import simulation_json
from ray_app.tau2.reward import Reward
from ray_app.tau2.service_desk.domain import NAME as SERVICE_DESK
from ray_app.tau2.service_desk.domain import ServiceDesk
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.speakers import ModelSpeaker, done_schema
from ray_app.tau2.tasks import TaskSpec
from ray_app.tokens import counter
from ray_app.tools.base import Caller
from ray_app.worker import Solved

PROMPTS = Path(__file__).parent / "prompts"
CRITERIA = "evaluation_criteria"


@dataclass(frozen=True)
class Tau2Job(Job):
    """`data_folder`: where tau2-bench's own data lie; None where they are in its checkout."""

    config: Tau2Config
    data_folder: str | None = None

    def own_facts(self) -> dict[str, Any]:
        config = self.config
        return {
            "domains": ", ".join(config.domains),
            "tasks_by_domain": dict(self._counts()),
            "split": config.split,
            "user": config.user.model,
            "experts": ", ".join(f"{name} ({each.model})" for name, each in config.experts.items()),
            "solo": config.solo,
            "seed": config.seed,
        }

    def protocol_label(self) -> str:
        """What the score may be called: tau2 only where all of it is tau2-bench's own."""
        own = SERVICE_DESK in self.config.domains
        label = "service_desk (built in, not tau2-bench)" if own else "tau2 (its domains and its evaluator)"
        if own and len(self.config.domains) > 1:
            label = "mixed: tau2-bench's domains and the built-in service_desk"
        return label + (", with experts" if self.config.experts else "")

    def plan_line(self) -> str:
        counts = ", ".join(f"{name} {self._counts()[name]}" for name in self.config.domains)
        steps = f"{self.config.concurrency} in flight, {self.config.limits.max_steps} steps at most"
        return f"Domains: {counts} (split {self.config.split}); {steps}"

    def _counts(self) -> Counter[str]:
        return Counter(task.category for task in self.tasks)


def read_job(config: Tau2Config, run_dir: Path | None, asked: Asked = NOTHING_ASKED) -> Tau2Job:
    """Everything that can be checked before anything starts. Raises UserError with one line."""
    serve_config = services.read_serve_config(config.services)
    services.check(serve_config, services.needed(config))
    for model in config.models.values():
        counter(model.tokenizer)
    folder = upstream.data_folder()
    prompts = load_prompts(config.prompts, PROMPTS)
    domains = load_domains(config, prompts, folder)
    whole = read_tasks(config, domains)
    data = ordering.choose(whole, asked)
    identity = {
        "prompt_digest": prompts.digest,
        "tasks_digest": data.digest,
        **ordering.identity(whole, data),
        "domains_digest": domains_digest(config, domains),
    }
    path = rundir.locate(config, identity, None if run_dir is None else object_store.local(run_dir))
    return Tau2Job(config, data, prompts, identity, path, serve_config, data_folder=folder)


def read_replay(recording: Recording, config: Tau2Config, run_dir: Path | None) -> Tau2Job:
    """The replay of a recorded run under `config`, which may differ. Raises UserError with one line."""
    folder, prompts = upstream.data_folder(), load_prompts(config.prompts, PROMPTS)
    domains = load_domains(config, prompts, folder)
    data = read_tasks(config, domains)
    identity = recording.identity(
        {
            "prompt_digest": prompts.digest,
            "tasks_digest": data.digest,
            "domains_digest": domains_digest(config, domains),
        }
    )
    config = recording.named(config, identity)
    path = recording.place(config, identity, run_dir)
    if not recording.has_any(data.tasks):
        raise DatasetError(
            f"domains {', '.join(config.domains)}: none of their {len(data.tasks)} tasks is in the recorded "
            "run as it was asked; restore the domains' data, or set domains"
        )
    return Tau2Job(
        config, data, prompts, identity, path, services.ServeConfig(), recording, data_folder=folder
    )


def load_domains(config: Tau2Config, prompts: Prompts, folder: str | None) -> dict[str, Domain]:
    """The domains of `config` by name. Raises ConfigError, with what to install, for one that is not here."""
    upstream.use_data(folder)
    return {
        name: ServiceDesk(prompts) if name == SERVICE_DESK else upstream.UpstreamDomain(name)
        for name in config.domains
    }


def read_tasks(config: Tau2Config, domains: Mapping[str, Domain]) -> TaskSet:
    """The tasks of all domains, in turns. Raises DatasetError for an unknown split."""
    each = [
        [task_of(name, raw) for raw in domain.tasks(config.split)[: config.limit]]
        for name, domain in domains.items()
    ]
    tasks = tuple(task for task in chain.from_iterable(zip_longest(*each)) if task is not None)
    if not tasks:
        raise ConfigError(f"domains {', '.join(config.domains)}: no task in split {config.split!r}")
    return TaskSet(tasks, digest([[t.question, t.answer] for t in tasks]), config.dataset_name(), "", {})


def task_of(domain: str, raw: Mapping[str, Any]) -> Task:
    """A domain's task as the engine knows it; its criteria are the answer, which no rollout depends on."""
    question = {key: value for key, value in raw.items() if key != CRITERIA}
    return Task(
        f"{domain}:{raw['id']}",
        json.dumps(question, sort_keys=True),
        json.dumps(raw.get(CRITERIA), sort_keys=True),
        answer_type="reward",
        category=domain,
    )


def spec_of(task: Task) -> TaskSpec:
    return TaskSpec.model_validate({**json.loads(task.question), CRITERIA: json.loads(task.answer)})


def domains_digest(config: Tau2Config, domains: Mapping[str, Domain]) -> str:
    """Equal where the same dialogues would be the same, beside their tasks."""
    return digest([_fingerprint(domain, is_solo=config.solo) for domain in domains.values()])


def _fingerprint(domain: Domain, *, is_solo: bool) -> list[Any]:
    """What of a domain decides a dialogue beside the task: its policy, tools and initial data."""
    environment = domain.environment(is_solo=is_solo)
    schemas = [list(environment.schemas(side)) for side in ("assistant", "user")]
    return [domain.name, environment.policy, schemas, environment.state_hash()]


async def check_services(job: Tau2Job, service_urls: Mapping[str, str]) -> dict[str, str]:
    """Ask every route, and the retriever where one is named, before anything is paid. Raises ConfigError."""
    await check_routes(job.config, Router(job.config.called(), service_urls))
    retriever = job.config.retriever
    if retriever is not None:
        await _check_retriever(job, retriever)
    return {}


async def _check_retriever(job: Tau2Job, retriever: Retriever) -> None:
    url = retriever.url or job.serve_config.root(retriever.service or "")
    if problem := await services.probe(f"{url}/health"):
        raise ConfigError(f"retriever {url}: {problem}; start it, or mend retriever")


@dataclass(frozen=True)
class Tau2Solver:
    """Simulates tasks and tells their rewards; holds clients and domains, no task state."""

    config: Tau2Config
    domains: Mapping[str, Domain]
    caller: Caller
    prompts: Prompts
    client: ChatClient
    # Environments and evaluators are plain computation: one at a time, beside the event loop.
    computing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def solve(self, task: Task, journal: Journal) -> Solved:
        """Raises LimitReached for a dialogue that a limit ended: the reward of such a one is 0."""
        spec, domain = spec_of(task), self.domains[task.category]
        dialogue = await self.dialogue(spec, domain, journal)
        # Of the dialogue; the judge is no part of it.
        journal.guard = partial(check_spent, self.config.limits)
        try:
            simulation = await in_time(dialogue.run(domain.name), self.config.limits, "end")
        except LimitReached:
            await self._score(domain, spec, dialogue.so_far(domain.name, "timeout"), journal)
            raise
        finally:
            journal.guard = None
        try:
            reward = await self._score(domain, spec, simulation, journal)
        except EvalError as error:
            if journal.is_over:
                raise
            _keep(journal, simulation, None)
            return Solved(simulation.reason, owed=str(error))
        if simulation.reason == "max_steps":
            raise LimitReached(
                f"{simulation.steps} steps (limits.max_steps is {self.config.limits.max_steps})"
            )
        return Solved(simulation.reason, self._verdict(simulation, reward, journal))

    async def dialogue(self, spec: TaskSpec, domain: Domain, journal: Journal) -> Dialogue:
        """The dialogue of a task before its first message."""
        config = self.config
        rules = Rules(config.limits.max_steps, config.limits.max_errors, config.solo)
        async with self.computing:
            environment = await asyncio.to_thread(prepare, domain, spec, is_solo=config.solo)
        seed = trial_seed(config.seed, journal.base.trial)
        return Dialogue(
            spec,
            environment,
            self._agent(spec, domain, environment, journal, seed),
            self._user(spec, domain, environment, journal, seed),
            rules,
            journal,
            domain.greeting,
            seed,
        )

    def _agent(
        self, spec: TaskSpec, domain: Domain, environment: Environment, journal: Journal, seed: int | None
    ) -> ModelSpeaker:
        config = self.config
        schemas = environment.schemas("assistant")
        system = domain.agent_prompt(spec, environment, is_solo=config.solo)
        return ModelSpeaker(
            side="assistant",
            role="orchestrator",
            model=config.orchestrator.model,
            sampling=_seeded(config.orchestrator.sampling, seed),
            system=system + (self.prompts.render("expert") if config.experts else ""),
            schemas=(*schemas, done_schema()) if config.solo else schemas,
            caller=self.caller,
            journal=journal,
            prompts=self.prompts,
            experts=config.experts,
            expert_system=system,
            is_solo=config.solo,
        )

    def _user(
        self, spec: TaskSpec, domain: Domain, environment: Environment, journal: Journal, seed: int | None
    ) -> ModelSpeaker:
        return ModelSpeaker(
            side="user",
            role="user",
            model=self.config.user.model,
            sampling=_seeded(self.config.user.sampling, seed),
            system=domain.user_prompt(spec, environment),
            schemas=environment.schemas("user", spec.user_tools),
            caller=self.caller,
            journal=journal,
            prompts=self.prompts,
        )

    async def _score(
        self, domain: Domain, spec: TaskSpec, simulation: Simulation, journal: Journal
    ) -> Reward:
        """The reward, kept with the simulation. Raises JudgeError or an endpoint's error: it is owed."""
        asked = await asyncio.to_thread(domain.questions, spec, simulation)
        journal.tool = journal.alias = ""
        judged = await ask_judge(self.caller, journal, self.config.judge, domain, spec, asked)
        async with self.computing:
            reward = await asyncio.to_thread(domain.reward, spec, simulation, judged)
        _keep(journal, simulation, reward)
        return reward

    def _verdict(self, simulation: Simulation, reward: Reward, journal: Journal) -> Verdict:
        verdict = verdict_of(simulation.reason, reward, self.config.judge)
        journal.note(
            "verdict",
            is_correct=verdict.is_correct,
            verdict_method=verdict.method,
            model=verdict.judge_model,
            detail=verdict.reasoning,
        )
        return verdict

    def slots(self) -> Mapping[RouteKey, Slots]:
        """Of each route, where the client has bounds."""
        return getattr(self.client, "slots", {})

    async def close(self) -> None:
        if isinstance(self.client, Router):
            await self.client.close()


def _keep(journal: Journal, simulation: Simulation, reward: Reward | None) -> None:
    """The simulation in tau2's own shape, in the log: what the results of the run are written from."""
    journal.tool = journal.alias = ""
    body = json.dumps(simulation_json(simulation, reward), ensure_ascii=False)
    journal.note("simulation", detail=simulation.reason, payload_hash=journal.sink.payload(body))


def _seeded(sampling: Sampling, seed: int | None) -> Sampling:
    return sampling if sampling.seed is not None else sampling.model_copy(update={"seed": seed})


def make_solver(
    config: Tau2Config, prompts: Prompts, client: ChatClient, domains: Mapping[str, Domain]
) -> Tau2Solver:
    return Tau2Solver(config, domains, Caller(client, config.models), prompts, client)


@dataclass(frozen=True)
class SolverInWorker:
    """The solver factory that travels to the workers: plain values, clients and domains are made there."""

    config: Tau2Config
    prompts: Prompts
    data_folder: str | None
    keys: Mapping[str, str] = field(repr=False)
    service_urls: Mapping[str, str]

    def __call__(self) -> Tau2Solver:
        domains = _warm(self.config, self.prompts, self.data_folder)
        router = Router(self.config.called(), self.service_urls, environ=self.keys)
        return make_solver(self.config, self.prompts, router, domains)


@dataclass(frozen=True)
class ReplayInWorker:
    """The solver factory of a replay: the same dialogues and environments, over nothing."""

    config: Tau2Config
    prompts: Prompts
    data_folder: str | None

    def __call__(self) -> Tau2Solver:
        domains = _warm(self.config, self.prompts, self.data_folder)
        return make_solver(without_time(self.config), self.prompts, Nothing(), domains)


def _warm(config: Tau2Config, prompts: Prompts, data_folder: str | None) -> dict[str, Domain]:
    """The domains with what they cache: loaded, and then left alone by the collector."""
    domains = load_domains(config, prompts, data_folder)
    for domain in domains.values():
        domain.environment()
    upstream.freeze()
    return domains
