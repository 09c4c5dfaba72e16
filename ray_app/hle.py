"""Humanity's Last Exam: how one question becomes a prediction and a verdict.

The rollout (agent) and the judge share the task's journal, so a judge that fails leaves the rollout
recorded, and the resume asks the judge alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_app import judge, object_store, ordering, rundir, services
from ray_app.agent import Agent
from ray_app.budgets import in_time
from ray_app.chat import ChatClient, Router
from ray_app.config import Dataset, RunConfig
from ray_app.dataset import TaskSet, load_tasks
from ray_app.driver import Job, check_routes
from ray_app.errors import (
    ConfigError,
    DatasetError,
    EvalError,
    RunDirError,
)
from ray_app.journal import Journal
from ray_app.ordering import NOTHING_ASKED, Asked
from ray_app.prompting import Prompts, load_prompts
from ray_app.recording import Nothing, Recording, without_time
from ray_app.records import ExecutionResult, Task, Verdict
from ray_app.sample.prepare import prepare
from ray_app.sandbox import NAMESPACES, SandboxLimits, available_isolation, run_python
from ray_app.slots import RouteKey, Slots
from ray_app.tokens import counter
from ray_app.tools.answer import FinalAnswer
from ray_app.tools.base import Answer, Caller, Tool
from ray_app.tools.reasoning import Reasoning, Sandbox
from ray_app.tools.search import DocumentSource, Search
from ray_app.waits import waiting
from ray_app.worker import Solved


@dataclass(frozen=True)
class HleJob(Job):
    """`isolation`: the sandbox layers that every worker must have; empty where no code runs."""

    config: RunConfig
    isolation: tuple[str, ...] = ()

    def own_facts(self) -> dict[str, Any]:
        return {"scope_policy": self.config.dataset.policy, "sandbox": self._sandbox_fact()}

    def protocol_label(self) -> str:
        """The protocol as a score may name it: `hle` only with the official judge prompt."""
        if self.config.protocol != "hle-style":
            return self.config.protocol
        official = self.config.judge.official_prompt_digest
        if official is not None and self.prompts.digest_of("judge_hle") == official:
            return "hle"
        return "hle-style (own prompt, not leaderboard-comparable)"

    def plan_line(self) -> str:
        sizes = sorted(len(task.scope) for task in self.tasks if task.scope is not None)
        median = sizes[len(sizes) // 2] if sizes else 0
        spread = f"; {sizes[0]} to {sizes[-1]} documents each, median {median}" if sizes else ""
        left_out = "".join(f"; {count} left out: {reason}" for reason, count in self.data.left_out.items())
        policy = self.config.dataset.policy
        return f"Scopes: {len(sizes)} of {len(self.tasks)} questions scoped ({policy}){spread}{left_out}"

    def _sandbox_fact(self) -> str:
        if not self.config.code.enabled:
            return "code execution off"
        missing = [layer for layer in NAMESPACES if layer not in self.isolation]
        held = " ".join(self.isolation)
        return f"{held}; NOT ISOLATED: {' '.join(missing)}" if missing else held


def read_job(config: RunConfig, run_dir: Path | None, asked: Asked = NOTHING_ASKED) -> HleJob:
    """Everything that can be checked before anything starts. Raises UserError with one line."""
    serve_config = services.read_serve_config(config.services)
    services.check(serve_config, services.needed(config))
    for model in config.models.values():
        counter(model.tokenizer)  # one that is missing shows here, and not in every worker
    whole, prompts = read_tasks(config.dataset), load_prompts(config.prompts)
    data = ordering.choose(whole, asked)
    identity = {"prompt_digest": prompts.digest, "tasks_digest": data.digest}
    identity |= ordering.identity(whole, data)
    path = rundir.locate(config, identity, None if run_dir is None else object_store.local(run_dir))
    isolation = _isolation(config)
    return HleJob(config, data, prompts, identity, path, serve_config, isolation=isolation)


def read_replay(recording: Recording, config: RunConfig, run_dir: Path | None) -> HleJob:
    """The replay of a recorded run under `config`, which may differ. Raises UserError with one line."""
    data, prompts = read_tasks(config.dataset), load_prompts(config.prompts)
    identity = recording.identity({"prompt_digest": prompts.digest, "tasks_digest": data.digest})
    config = recording.named(config, identity)
    path = recording.place(config, identity, run_dir)
    if not recording.has_any(data.tasks):
        raise DatasetError(
            f"dataset {config.dataset.path}: none of its {len(data.tasks)} questions is in the recorded run "
            "as it was asked; restore the file, or set dataset.path"
        )
    return HleJob(config, data, prompts, identity, path, services.ServeConfig(), recording)


def _isolation(config: RunConfig) -> tuple[str, ...]:
    """The sandbox layers of this machine; every worker must have them. Empty where no code runs."""
    if not config.code.enabled:
        return ()
    held = available_isolation()
    missing = [layer for layer in NAMESPACES if layer not in held]
    if missing and config.code.require_isolation:
        raise ConfigError(
            f"code.require_isolation: this machine lacks {' '.join(missing)}; allow user namespaces, "
            "or set it to false"
        )
    return held


def read_tasks(dataset: Dataset) -> TaskSet:
    """The questions that `dataset` names, with their scopes. Raises UserError."""
    if dataset.path == "sample":
        try:
            files = prepare(rundir.home())
        except OSError as error:
            raise RunDirError(
                f"home folder {rundir.home()}: {error.strerror}; set TOOLORCH_HOME to a writable folder"
            ) from None
        found = load_tasks(dataset.model_copy(update={"path": str(files.questions)}), files.examples)
        return replace(found, source="sample")
    if dataset.policy != "unscoped" and dataset.scopes is None:
        raise ConfigError(
            "dataset.scopes: expected an examples.json (question id -> document ids) for "
            f"dataset.policy {dataset.policy}; give one, or set dataset.policy to unscoped"
        )
    return load_tasks(dataset, Path(dataset.scopes) if dataset.scopes else None)


async def check_services(job: HleJob, service_urls: Mapping[str, str]) -> dict[str, str]:
    """Ask every route and the retriever once, before anything is paid. Raises ConfigError.

    Returns what of the retriever must be equal on a resume. A retriever behind a URL says nothing of its
    scopes; there an unknown question fails its task by name.
    """
    from ray_app.retrieval.client import HandleRetriever  # imports ray; not needed to test a solver

    await check_routes(job.config, Router(job.config.called(), service_urls))
    settings = job.config.retriever
    if settings.url is not None:
        if problem := await services.probe(f"{settings.url}/health"):
            raise ConfigError(f"retriever {settings.url}: {problem}; start it, or mend retriever.url")
        return {}
    if settings.service not in services.needed(job.config):
        return {}
    retriever = HandleRetriever(settings.service, settings.timeout_s)
    scoped = [task.task_id for task in job.tasks if task.scope is not None]
    unknown = await retriever.unknown_scopes(scoped)
    if unknown:
        raise ConfigError(
            f"retriever {settings.service!r} has no scope for {len(unknown)} of {len(scoped)} questions "
            f"(first: {unknown[0]!r}); start it with the examples file of dataset.scopes"
        )
    info = await retriever.info()
    return {"retriever_index": info["index"], "retriever_policy": info["policy"]}


@dataclass(frozen=True)
class HleSolver:
    """Solves and judges questions; holds clients, no task state."""

    config: RunConfig
    agent: Agent
    caller: Caller
    prompts: Prompts
    client: ChatClient
    source: DocumentSource

    async def solve(self, task: Task, journal: Journal) -> Solved:
        answer = await in_time(self.agent.run(task, journal), self.config.limits, "answer")
        verdict = judge.without_judge(task, answer.prediction, answer.response, self.config.protocol)
        if verdict is None:
            try:
                verdict = await self._ask_judge(task, answer, journal)
            except EvalError as error:
                if journal.is_over:
                    raise
                return Solved(answer.prediction, owed=str(error))
        journal.note(
            "verdict",
            is_correct=verdict.is_correct,
            verdict_method=verdict.method,
            confidence=verdict.confidence,
            model=verdict.judge_model,
        )
        return Solved(answer.prediction, verdict)

    async def _ask_judge(self, task: Task, answer: Answer, journal: Journal) -> Verdict:
        """The judge's verdict. Raises JudgeError when its reply cannot be read: the verdict is owed."""
        journal.tool = journal.alias = ""
        return await judge.ask(
            self.caller,
            journal,
            task,
            answer,
            settings=self.config.judge,
            prompts=self.prompts,
            protocol=self.config.protocol,
        )

    def slots(self) -> Mapping[RouteKey, Slots]:
        """Of each route, where the client has bounds."""
        return getattr(self.client, "slots", {})

    async def close(self) -> None:
        """Closes the connections of what has any: the router, and a retriever that is asked over HTTP."""
        for part in (self.client, self.source):
            if closing := getattr(part, "close", None):
                await closing()


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
    return HleSolver(config, agent, caller, prompts, client, source)


def sandbox_of(config: RunConfig, isolation: tuple[str, ...]) -> Sandbox | None:
    """The code runner of `config`, or None where code execution is off.

    It refuses (SandboxError) a machine with weaker layers than `isolation`, which the score is printed
    with, and runs no more programs at once than there are cores: a wait is no part of a program's limit.
    """
    if not config.code.enabled:
        return None
    limits = SandboxLimits(
        wall_s=config.code.wall_s, cpu_s=config.code.wall_s, memory_bytes=config.code.memory_mib << 20
    )
    slots = asyncio.Semaphore(os.cpu_count() or 1)

    async def run(code: str) -> ExecutionResult:
        with waiting():
            await slots.acquire()
        try:
            result = await run_python(code, limits, isolation)
        finally:
            slots.release()
        return replace(result, cost_usd=result.duration_s * config.code.usd_per_s)

    return run


@dataclass(frozen=True)
class SolverInWorker:
    """The solver factory that travels to the workers: plain values, clients are made there."""

    config: RunConfig
    prompts: Prompts
    isolation: tuple[str, ...]
    keys: Mapping[str, str] = field(repr=False)
    service_urls: Mapping[str, str]

    def __call__(self) -> HleSolver:
        from ray_app.retrieval.connect import connect  # imports ray; not needed to test a solver

        router = Router(self.config.called(), self.service_urls, environ=self.keys)
        source = connect(self.config.retriever)
        sandbox = sandbox_of(self.config, self.isolation)
        return make_solver(self.config, self.prompts, router, source, sandbox)


@dataclass(frozen=True)
class ReplayInWorker:
    """The solver factory of a replay: the agent as configured, over nothing."""

    config: RunConfig
    prompts: Prompts

    def __call__(self) -> HleSolver:
        nothing, config = Nothing(), without_time(self.config)
        sandbox = nothing.run if config.code.enabled else None
        return make_solver(config, self.prompts, nothing, nothing, sandbox)
