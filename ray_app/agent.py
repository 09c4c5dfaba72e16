"""The turn loop: ask the orchestrator, run the tool it chose, until one of them answers.

Knows a chat client (through `Caller`) and tools; nothing of benchmarks, judges, Ray or files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray_app.budgets import check_spent
from ray_app.config import Limits, Orchestrator
from ray_app.errors import LimitReached, ToolError
from ray_app.journal import Journal
from ray_app.prompting import Prompts
from ray_app.records import ChatReply, Message, Task
from ray_app.tools.base import Answer, Caller, Prompt, Tool, schema
from ray_app.workspace import Workspace, orchestrator_context


@dataclass(frozen=True, slots=True)
class Choice:
    """A valid decision of the orchestrator."""

    tool: Tool
    alias: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """A reply that chose nothing; `reason` is told to the orchestrator in the next turn."""

    reason: str


@dataclass(frozen=True)
class Agent:
    """One orchestrator with its tools. Holds no state of a task; `run` may be called concurrently."""

    config: Orchestrator
    limits: Limits
    tools: Sequence[Tool]
    caller: Caller
    prompts: Prompts

    async def run(self, task: Task, journal: Journal) -> Answer:
        """The answer to `task`. Raises LimitReached when a budget is used up before one is given.

        Budgets hold for each call, so that a turn stops in its middle; the judge is not one of them.
        """
        journal.guard = partial(check_spent, self.limits)
        try:
            return await self._turns(task, journal)
        finally:
            journal.guard = None

    async def _turns(self, task: Task, journal: Journal) -> Answer:
        space = Workspace()
        feedback = ""
        for turn in range(self.limits.max_rounds):
            journal.turn = turn
            started = journal.timer()
            offered = self._offered(space)
            chosen = choose(await self._decide(task, space, offered, feedback, journal), offered)
            if isinstance(chosen, Invalid):
                feedback = chosen.reason
                journal.note("turn", started=started, status="invalid", error=feedback)
                continue
            answer, feedback = await self._use(chosen, task, space, journal)
            journal.note("turn", started=started, detail=chosen.tool.name)
            if answer is not None:
                return answer
        raise LimitReached(f"no answer within {self.limits.max_rounds} turns (limits.max_rounds)")

    async def _decide(
        self, task: Task, space: Workspace, offered: Mapping[str, Tool], feedback: str, journal: Journal
    ) -> ChatReply:
        journal.tool = journal.alias = ""
        model, budget = self.config.model, self.config.budget
        tokens = self.caller.tokens(model)
        prompt = Prompt(
            partial(self._messages, task, feedback),
            lambda room: orchestrator_context(space, room, budget, tokens),
            task.question,
            budget.context_tokens,
        )
        models = self.caller.models
        schemas = tuple(
            schema(tool, models, is_strict=models[model].strict_tools) for tool in offered.values()
        )
        return await self.caller.ask_about(
            journal, "orchestrator", model, prompt, self.config.sampling, schemas
        )

    def _messages(self, task: Task, feedback: str, context: str) -> tuple[Message, ...]:
        user = self.prompts.render(
            "orchestrator",
            question=task.question,
            context=context,
            feedback=self.prompts.render("feedback", reason=feedback) if feedback else "",
        )
        return (
            Message("system", self.prompts.render("orchestrator_system").strip()),
            Message("user", user, self.caller.images(self.config.model, task)),
        )

    async def _use(
        self, chosen: Choice, task: Task, space: Workspace, journal: Journal
    ) -> tuple[Answer | None, str]:
        """The tool's answer, if it gave one, and what the orchestrator is told if it failed."""
        journal.tool, journal.alias = chosen.tool.name, chosen.alias
        model = chosen.tool.aliases[chosen.alias].model
        space.tools_used.append(chosen.tool.name)
        started = journal.timer()
        try:
            answer = await chosen.tool.use(chosen.alias, task, space, journal)
        except ToolError as error:
            journal.note(
                "tool_call",
                started=started,
                model=model,
                status="error",
                error_kind="tool",
                error=str(error),
            )
            return None, str(error)
        journal.note("tool_call", started=started, model=model)
        return answer, ""

    def _offered(self, space: Workspace) -> dict[str, Tool]:
        """The tools of this turn; the explicit options of the config may leave one out."""
        waits = {"answer"} if self.config.require_documents and not space.documents else set()
        last = space.tools_used[-2:]
        is_repeat = self.config.repeat_tool == "forbid" and len(last) == 2 and last[0] == last[1]
        repeated = {last[0]} if is_repeat else set()
        # Where nothing else is left, a repeat is better than an answer from nothing.
        allowed = [tool for tool in self.tools if tool.name not in waits]
        fresh = [tool for tool in allowed if tool.name not in repeated]
        return {tool.name: tool for tool in fresh or allowed}


def choose(reply: ChatReply, offered: Mapping[Any, Tool]) -> Choice | Invalid:
    """The first valid call of the reply, or why there is none. One tool runs in each turn."""
    if not reply.tool_calls:
        return Invalid(f"no tool was called; call one of {', '.join(offered)}")
    reasons = []
    for call in reply.tool_calls:
        if call.name not in offered:
            reasons.append(f"{call.name!r} is not offered now; call one of {', '.join(offered)}")
            continue
        tool = offered[call.name]
        alias = _alias(call.arguments)
        if isinstance(alias, str) and alias in tool.aliases:
            return Choice(tool, alias)
        allowed = ", ".join(tool.aliases)
        reasons.append(
            f'{call.name} needs the arguments {{"model": one of {allowed}}}, got {call.arguments[:200]}'
        )
    return Invalid("; ".join(reasons))


def _alias(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except ValueError:
        return None
    return value.get("model") if isinstance(value, dict) else None
