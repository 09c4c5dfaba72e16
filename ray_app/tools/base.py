"""What a tool is: a name, the aliases it offers, and one coroutine that does the work.

A tool asks its expert through `Expert`, so prompts, budgets, sampling and the journal are handled
once. A ToolError is told to the orchestrator in its next turn; other errors end the attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray_app.chat import ChatClient, ChatRequest
from ray_app.config import Alias, ContextBudget, ModelConfig, Sampling, ToolName
from ray_app.journal import CHAT, Journal
from ray_app.records import ChatReply, Message, Role, Task
from ray_app.tokens import TokenCounter, counter
from ray_app.workspace import Workspace, expert_context

# Our templates and tool schemas, with room to spare.
INSTRUCTION_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a rollout: what is judged, and the response that it was read from."""

    prediction: str
    response: str


class Tool(Protocol):
    @property
    def name(self) -> ToolName: ...

    @property
    def purpose(self) -> str: ...

    @property
    def aliases(self) -> Mapping[str, Alias]: ...

    async def use(self, alias: str, task: Task, space: Workspace, journal: Journal) -> Answer | None:
        """Add to `space`, or return the answer. Raises ToolError with what the model should know."""
        ...


@dataclass(frozen=True)
class Caller:
    """Model calls of a task: every one goes through its journal."""

    client: ChatClient
    models: Mapping[str, ModelConfig]

    async def ask(
        self,
        journal: Journal,
        role: Role,
        model: str,
        messages: tuple[Message, ...],
        sampling: Sampling,
        tools: tuple[Mapping[str, Any], ...] = (),
        check: Callable[[ChatReply], object] | None = None,
    ) -> ChatReply:
        """One model call of the task; a reply that `check` refuses is never served on resume."""
        request = ChatRequest(model, messages, sampling, tools, session=journal.task.rollout_key)
        asked = {
            "model": model,
            "messages": [_asked(message) for message in messages],
            "sampling": sampling.model_dump(),
            "tools": list(tools),
        }
        return await journal.call(CHAT, asked, lambda: self.client.complete(request), role=role, check=check)

    def context(self, alias: Alias, task: Task, space: Workspace) -> str:
        """What the alias's model is shown of the workspace, inside its budget and its own context."""
        budget = self.budget(alias.model, alias.budget, alias.sampling)
        return expert_context(space, task.question, budget, self.tokens(alias.model))

    def budget(self, model: str, budget: ContextBudget, sampling: Sampling) -> ContextBudget:
        """`budget`, cut to what the model's context leaves once its reply and the instructions fit."""
        room = self.models[model].context_length - sampling.max_tokens - INSTRUCTION_TOKENS
        if budget.context_tokens <= room:
            return budget
        return budget.model_copy(update={"context_tokens": max(room, 1)})

    def tokens(self, model: str) -> TokenCounter:
        return counter(self.models[model].tokenizer)

    def images(self, model: str, task: Task) -> tuple[str, ...]:
        return task.images if self.models[model].accepts_images else ()


def _asked(message: Message) -> list[Any]:
    asked = [message.role, message.content, list(message.images)]
    if message.tool_calls or message.tool_call_id:
        calls = [[call.call_id, call.name, call.arguments] for call in message.tool_calls]
        return [*asked, calls, message.tool_call_id]
    return asked


def schema(tool: Tool, models: Mapping[str, ModelConfig]) -> dict[str, Any]:
    """The function tool that the orchestrator sees: one required argument, an alias from the enum."""
    lines = [describe(name, alias, models[alias.model]) for name, alias in tool.aliases.items()]
    parameter = {
        "type": "string",
        "enum": list(tool.aliases),
        "description": "Who does it. " + " ".join(lines),
    }
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.purpose,
            "parameters": {
                "type": "object",
                "properties": {"model": parameter},
                "required": ["model"],
                "additionalProperties": False,
            },
        },
    }


def describe(name: str, alias: Alias, model: ModelConfig) -> str:
    """An alias as the orchestrator is told of it: what it is good at, its price, its usual latency."""
    price = f"${model.price.input:g} in, ${model.price.output:g} out per million tokens"
    latency = f", about {alias.latency_s:g} s" if alias.latency_s is not None else ""
    blurb = f"{alias.blurb}; " if alias.blurb else ""
    return f"{name}: {blurb}{price}{latency}."
