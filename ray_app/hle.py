"""Humanity's Last Exam: how one question becomes a prediction and a verdict.

The rollout (agent) and the judge share the task's journal, so a judge that fails leaves the rollout
recorded, and the resume asks the judge alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ray_app import judge, rundir, services
from ray_app.agent import Agent
from ray_app.chat import ChatClient, Router
from ray_app.config import Dataset, RunConfig
from ray_app.dataset import TaskSet, load_tasks
from ray_app.driver import Job
from ray_app.engine import Solved
from ray_app.errors import ConfigError, EvalError, LimitReached
from ray_app.journal import Journal
from ray_app.prompting import Prompts, load_prompts
from ray_app.records import ChatReply, Message, Task, Verdict
from ray_app.sample.prepare import prepare
from ray_app.sandbox import SandboxLimits, available_isolation, run_python
from ray_app.tools.answer import FinalAnswer
from ray_app.tools.base import Answer, Caller, Tool
from ray_app.tools.reasoning import Reasoning, Sandbox
from ray_app.tools.search import DocumentSource, Search


def read_job(config: RunConfig, run_dir: Path | None) -> Job:
    """Everything that can be checked before anything starts. Raises UserError with one line."""
    serve_config = services.read_serve_config(config.services)
    services.check(serve_config, services.needed(config))
    isolation = available_isolation()
    if config.code.enabled and config.code.require_isolation and "network" not in isolation:
        raise ConfigError(
            f"code.require_isolation: only {' '.join(isolation)} hold on this machine; expected namespaces; "
            "allow user namespaces, or set it to false"
        )
    path = rundir.locate(config, run_dir)
    return Job(
        config, _read_tasks(config.dataset), load_prompts(config.prompts), path, serve_config, isolation
    )


def _read_tasks(dataset: Dataset) -> TaskSet:
    if dataset.path == "sample":
        files = prepare(rundir.home())
        found = load_tasks(dataset.model_copy(update={"path": str(files.questions)}), files.examples)
        return replace(found, source="sample")
    if dataset.policy != "unscoped" and dataset.scopes is None:
        raise ConfigError(
            "dataset.scopes: expected an examples.json (question id -> document ids) for "
            f"dataset.policy {dataset.policy}; give one, or set dataset.policy to unscoped"
        )
    return load_tasks(dataset, Path(dataset.scopes) if dataset.scopes else None)


async def check_scopes(job: Job) -> None:
    """Refuse to start where the running retriever lacks scopes of the run's questions (ConfigError).

    A retriever behind a URL cannot be asked; there an unknown question fails its task by name.
    """
    from ray_app.retrieval.client import HandleRetriever  # imports ray; not needed to test a solver

    settings = job.config.retriever
    scoped = [task.task_id for task in job.tasks if task.scope is not None]
    if not scoped or settings.service not in services.needed(job.config):
        return
    unknown = await HandleRetriever(settings.service, settings.timeout_s).unknown_scopes(scoped)
    if unknown:
        raise ConfigError(
            f"retriever {settings.service!r} has no scope for {len(unknown)} of {len(scoped)} questions "
            f"(first: {unknown[0]!r}); start it with the examples file of dataset.scopes"
        )


@dataclass(frozen=True)
class HleSolver:
    """Solves and judges questions; holds clients, no task state."""

    config: RunConfig
    agent: Agent
    caller: Caller
    prompts: Prompts
    client: ChatClient

    async def solve(self, task: Task, journal: Journal) -> Solved:
        answer = await self._rollout(task, journal)
        verdict = judge.without_judge(task, answer.prediction, self.config.protocol)
        if verdict is None:
            try:
                verdict = await self._ask_judge(task, answer, journal)
            except EvalError as error:
                return Solved(answer.prediction, owed=str(error))
        journal.note(
            "verdict",
            is_correct=verdict.is_correct,
            verdict_method=verdict.method,
            confidence=verdict.confidence,
            model=verdict.judge_model,
        )
        return Solved(answer.prediction, verdict)

    async def _rollout(self, task: Task, journal: Journal) -> Answer:
        limit_s = self.config.limits.wall_s
        try:
            async with asyncio.timeout(limit_s):
                return await self.agent.run(task, journal)
        except TimeoutError:
            raise LimitReached(f"no answer within {limit_s:g} s (limits.wall_s)") from None

    async def _ask_judge(self, task: Task, answer: Answer, journal: Journal) -> Verdict:
        """The judge's verdict. Raises JudgeError when its reply cannot be read: the verdict is owed."""
        settings, protocol = self.config.judge, self.config.protocol
        journal.tool = journal.alias = ""
        text = judge.prompt(self.prompts, task, answer.prediction, answer.response, protocol)
        message = Message("user", text)

        def read(reply: ChatReply) -> Verdict:
            return judge.read(reply.content, answer.prediction, settings.model, protocol)

        reply = await self.caller.ask(
            journal, "judge", settings.model, (message,), settings.sampling, check=read
        )
        return read(reply)

    async def close(self) -> None:
        if isinstance(self.client, Router):
            await self.client.close()


def make_solver(
    config: RunConfig,
    prompts: Prompts,
    client: ChatClient,
    source: DocumentSource,
    sandbox: Sandbox | None,
) -> HleSolver:
    """Wire the agent of `config` over the given client, retriever and sandbox."""
    caller = Caller(client, config.models)
    tools: list[Tool] = []
    if aliases := config.tools.get("enhance_reasoning"):
        tools.append(Reasoning(aliases, caller, prompts, sandbox))
    if (aliases := config.tools.get("search")) and config.retriever.enabled:
        tools.append(Search(aliases, caller, prompts, source, config.retriever))
    asks_confidence = config.protocol == "hle-style"
    tools.append(FinalAnswer(config.tools["answer"], caller, prompts, asks_confidence))
    agent = Agent(config.orchestrator, config.limits, tools, caller, prompts)
    return HleSolver(config, agent, caller, prompts, client)


def sandbox_of(config: RunConfig) -> Sandbox | None:
    """The code runner of `config`, or None where code execution is off."""
    if not config.code.enabled:
        return None
    limits = SandboxLimits(
        wall_s=config.code.wall_s, cpu_s=config.code.wall_s, memory_bytes=config.code.memory_mib << 20
    )
    return partial(run_python, limits=limits)


@dataclass(frozen=True)
class SolverInWorker:
    """The solver factory that travels to the workers: plain values, clients are made there."""

    config: RunConfig
    prompts: Prompts
    service_urls: Mapping[str, str]

    def __call__(self) -> HleSolver:
        from ray_app.retrieval.connect import connect  # imports ray; not needed to test a solver

        router = Router(self.config.models, self.service_urls)
        source = connect(self.config.retriever)
        return make_solver(self.config, self.prompts, router, source, sandbox_of(self.config))
