"""`answer`: an expert gives the final answer, in tags or in a box as its model was trained to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from ray_app import extract
from ray_app.config import Alias, ToolName
from ray_app.journal import Journal
from ray_app.prompting import Prompts
from ray_app.records import Message, Task
from ray_app.tools.base import Answer, Caller
from ray_app.workspace import Workspace


@dataclass(frozen=True)
class FinalAnswer:
    aliases: Mapping[str, Alias]
    caller: Caller
    prompts: Prompts
    asks_confidence: bool
    name: ToolName = "answer"
    purpose: str = "Give the final answer from what has been gathered. This ends the problem."

    async def use(self, alias: str, task: Task, space: Workspace, journal: Journal) -> Answer | None:
        expert = self.aliases[alias]
        reply = await self.caller.ask_expert(
            journal, expert, task, space, partial(self._messages, expert, task)
        )
        return Answer(extract.answer(reply.content), extract.without_thinking(reply.content))

    def _messages(self, expert: Alias, task: Task, context: str) -> tuple[Message, ...]:
        is_boxed = self.caller.models[expert.model].answer_format == "boxed"
        text = self.prompts.render(
            "answer_boxed" if is_boxed else "answer_tags",
            context=context,
            question=task.question,
            confidence=self.prompts.render("answer_confidence").rstrip("\n") if self.asks_confidence else "",
        )
        user = Message("user", text, self.caller.images(expert.model, task))
        if not is_boxed:
            return (user,)
        return (Message("system", self.prompts.render("answer_boxed_system").strip()), user)
