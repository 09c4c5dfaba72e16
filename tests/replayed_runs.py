"""Runs of the real solver over an outside world that never says the same twice, to be replayed."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_app import comparison, engine, events, lease, planning, rundir
from ray_app.chat import ChatRequest, cost
from ray_app.comparison import Comparison
from ray_app.config import RunConfig
from ray_app.errors import ContextOverflow, EndpointError, EvalError, ToolError
from ray_app.hle import HleSolver, ReplayInWorker, make_solver
from ray_app.journal import EventSink, Journal
from ray_app.options import Options
from ray_app.planning import Tally, WorkItem
from ray_app.prompting import Prompts, load_prompts
from ray_app.records import (
    ChatReply,
    Event,
    ExecutionResult,
    Hit,
    Retrieval,
    Task,
    TaskResult,
    ToolCall,
    Usage,
)
from ray_app.worker import SolverFactory
from tests.stand_ins import config

# What becomes of a task, by its name.
ENDS = {
    "exact": ("ok", None),
    "judged": ("ok", None),
    "unsure": ("owed", "judge"),  # its judge never gives a verdict
    "flaky": ("ok", None),  # its judge is down at first
    "lost": ("ok", None),  # its worker is killed once
    "refused": ("ok", None),  # the retriever refuses its query
    "long": ("failed", "model"),
    "down": ("failed", "infrastructure"),
    "lazy": ("limited", "limit"),  # never chooses a tool
    "slow": ("limited", "limit"),  # hangs until its time is up
}
TASKS = [Task(name, f"What is {name}?", "x" if name != "exact" else "exactly", scope=(1,)) for name in ENDS]
SETTINGS = config(limits={"max_rounds": 4, "wall_s": 3.0})


@dataclass(frozen=True)
class Outside:
    """Models, retriever and sandbox in one. A file for each thing that happens only once."""

    marks: Path

    async def complete(self, request: ChatRequest) -> ChatReply:
        text = request.messages[-1].content
        name = re.findall(r"What is (\w+)\?", text)[-1]
        if "<correct>" in text:
            return self._judge(name)
        if request.tools:
            return await self._choose(name, text)
        if "<query>" in text:
            return _says(f"<query>about {name} {secrets.token_hex(4)}</query>")
        if "complete Python program" in text:
            return _says(f"```python\nprint({secrets.randbits(32)})\n```")
        if name == "long":
            raise ContextOverflow("too long by far")
        return _says(f"<think>{secrets.token_hex(4)}</think><answer>{name}ly</answer>")

    async def _choose(self, name: str, text: str) -> ChatReply:
        if name == "lazy":
            return _says("let me think " + secrets.token_hex(4))
        if "Doc 1" not in text and "retriever says no" not in text:
            return _calls("search", "search-1")
        if name == "down":
            raise EndpointError("endpoint down " + secrets.token_hex(4))
        if name == "slow":
            await asyncio.Event().wait()
        if name == "lost" and self._is_first("lost"):
            os.kill(os.getpid(), signal.SIGKILL)
        ran = "```output" in text
        return _calls("answer", "answer-1") if ran else _calls("enhance_reasoning", "reasoner-1")

    def _judge(self, name: str) -> ChatReply:
        if name == "flaky" and self._is_first("flaky"):
            raise EndpointError("judge down")
        if name == "unsure":
            return _says("hard to tell " + secrets.token_hex(4))
        return _says(f"<correct>{bool(secrets.randbits(1))}</correct>")

    def _is_first(self, name: str) -> bool:
        try:
            (self.marks / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        if "refused" in query:
            raise ToolError("retriever says no to " + secrets.token_hex(4))
        hit = Hit(1, f"a text {secrets.token_hex(8)}", 0.1 + secrets.randbits(20) / 2**20)
        return Retrieval((hit,), cost_usd=0.012, web_calls=2, web_error="")

    async def run(self, code: str) -> ExecutionResult:
        return ExecutionResult(f"{code} {secrets.token_hex(4)}", "", 0, False, 0.1, ("pid",))


def _says(text: str) -> ChatReply:
    return _reply(text, (), "stop", Usage(100, 10, 7))


def _calls(tool: str, alias: str) -> ChatReply:
    call = ToolCall(secrets.token_hex(4), tool, f'{{"model": "{alias}"}}')
    return _reply("", (call,), "tool_calls", Usage(100, 10))


def _reply(text: str, calls: tuple[ToolCall, ...], finish: str, usage: Usage) -> ChatReply:
    price = cost(usage, SETTINGS.models["m"])
    return ChatReply(text, calls, finish, usage, model="m-1", endpoint="e", prefill_s=0.1, cost_usd=price)


@dataclass(frozen=True)
class LiveInWorker:
    marks: Path

    def __call__(self) -> HleSolver:
        outside = Outside(self.marks)
        return make_solver(SETTINGS, load_prompts(), outside, outside, outside.run)


@dataclass
class Seen:
    """Stops the run after so many results."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    after: int = 10**9
    results: list[TaskResult] = field(default_factory=list)

    def started(self, item: WorkItem) -> None:
        pass

    def committed(self, result: TaskResult, tally: Tally) -> None:
        self.results.append(result)
        if len(self.results) >= self.after:
            self.stop.set()

    def tick(self) -> None:
        pass


async def drive(
    run_dir: Path, make: SolverFactory, tasks: Sequence[Task] = TASKS, stop_after: int = 10**9, **options: Any
) -> Seen:
    """One driver's life over what the run directory leaves to do."""
    held, seen = lease.take(run_dir), Seen(after=stop_after)
    settings = replace(Options(run_dir, run_dir.name, held.epoch, 20, 2, 1), **options)
    rows = events.results(run_dir).to_pylist() if (run_dir / "log").exists() else []
    log = settings.writer("driver")
    try:
        work = planning.plan(tasks, 1, rows)
        await engine.run(work, make, settings, log=log, lease=held, watcher=seen, stop=seen.stop)
    finally:
        held.release()
        await asyncio.to_thread(log.close)
    return seen


async def replayed(
    recorded: Path, run_dir: Path, prompts: Prompts | None = None, settings: RunConfig = SETTINGS
) -> Comparison:
    """A replay by the engine, compared with what it replays."""
    make = ReplayInWorker(settings, prompts or load_prompts())
    await drive(run_dir, make, replays=recorded)
    return comparison.compare(comparison.traces(recorded), comparison.traces(run_dir), len(TASKS))


async def record_here(run_dir: Path, tasks: Sequence[Task], solver: HleSolver) -> None:
    """A run directory as the job leaves it, without Ray: one attempt at each task."""
    rundir.open_run(run_dir, SETTINGS, {"prompt_digest": load_prompts().digest})
    options = Options(run_dir, "run", 1, 1, 1, 1)
    log = options.writer("w001")
    for task in tasks:
        result = TaskResult(task.task_id, task.rollout_key, task.judge_key, 0, 1, "failed")
        journal = journal_of(task, log)
        try:
            solved = await solver.solve(task, journal)
            result = replace(result, outcome="ok" if solved.verdict else "owed", prediction=solved.prediction)
        except EvalError as error:
            result = replace(result, error_kind=error.kind, error=str(error))
        log.append(engine.result_event(replace(result, model_calls=journal.live_model_calls), options, log))
    await asyncio.to_thread(log.close)


def journal_of(task: Task, log: EventSink) -> Journal:
    place = {"rollout_key": task.rollout_key, "judge_key": task.judge_key, "task_id": task.task_id}
    return Journal(task, log, Event("attempt", 0.0, epoch=1, attempt=1, **place))  # type: ignore[arg-type]
