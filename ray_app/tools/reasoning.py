"""`enhance_reasoning`: an expert writes a program, the sandbox runs it, the next turn sees both.

A program that fails is shown with its exit status and the end of its stderr, so that the next turn
differs from this one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from ray_app import extract
from ray_app.config import Alias, ToolName
from ray_app.errors import ToolError
from ray_app.journal import CODE, Journal
from ray_app.prompting import Prompts
from ray_app.records import ExecutionResult, Message, Task
from ray_app.tools.base import Answer, Caller
from ray_app.workspace import CodeRun, Workspace

Sandbox = Callable[[str], Awaitable[ExecutionResult]]
NOT_RUN = "[not run: code execution is off in this run]"


@dataclass(frozen=True)
class Reasoning:
    aliases: Mapping[str, Alias]
    caller: Caller
    prompts: Prompts
    sandbox: Sandbox | None
    name: ToolName = "enhance_reasoning"
    purpose: str = "Analyse the problem with a program that is written, run, and shown with its output."

    async def use(self, alias: str, task: Task, space: Workspace, journal: Journal) -> Answer | None:
        code = await self._program(self.aliases[alias], task, space, journal)
        if not code:
            raise ToolError(f"enhance_reasoning with {alias} wrote no program")
        if self.sandbox is None:
            space.runs.append(CodeRun(code, NOT_RUN))
            return None
        sandbox = self.sandbox
        result = await journal.call(CODE, code, lambda: sandbox(code))
        space.runs.append(CodeRun.of(code, result))
        return None

    async def _program(self, alias: Alias, task: Task, space: Workspace, journal: Journal) -> str:
        def write(context: str) -> tuple[Message, ...]:
            text = self.prompts.render("reasoning", context=context, question=task.question)
            return (Message("user", text, self.caller.images(alias.model, task)),)

        reply = await self.caller.ask_expert(journal, alias, task, space, write)
        return extract.program(reply.content)
