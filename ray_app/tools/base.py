"""What a tool is: a name, the aliases it offers, and one coroutine that does the work.

A tool asks its expert through `Caller`, so prompts, budgets, sampling and the journal are handled
once. A ToolError is told to the orchestrator in its next turn; other errors end the attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ray_app import fitting
from ray_app.chat import ChatClient, ChatRequest
from ray_app.config import Alias, ModelConfig, Sampling, ToolName
from ray_app.errors import ContextOverflow
from ray_app.fitting import Fit
from ray_app.journal import CHAT, Journal, tried
from ray_app.records import ChatReply, Message, Role, Task
from ray_app.tokens import TokenCounter, counter
from ray_app.workspace import Context, Workspace, expert_context


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


Write = Callable[[str], tuple[Message, ...]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages around a context: `gather` gives it for so many tokens, `write` puts it between the rest.

    `context_tokens` is what question and context may have together, by the config.
    """

    write: Write
    gather: Callable[[int], Context] = lambda room: Context()
    question: str = ""
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A call that can be made shorter: what to say, and with how much context and how long a reply."""

    model: str
    prompt: Prompt
    fit: Fit
    context: Context
    sampling: Sampling
    tools: tuple[Mapping[str, Any], ...]
    session: str

    def within(self, fit: Fit) -> _Draft:
        context = self.prompt.gather(fit.context)
        return replace(self, context=context, fit=replace(fit, context=context.tokens))

    def request(self) -> ChatRequest:
        sampling = self.sampling
        if self.fit.reply != sampling.max_tokens:
            sampling = sampling.model_copy(update={"max_tokens": self.fit.reply})
        messages = self.prompt.write(self.context.text)
        return ChatRequest(self.model, messages, sampling, self.tools, session=self.session)


@dataclass(frozen=True)
class Caller:
    """Model calls of a task: every one goes through its journal and fits into its model's context."""

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
        prompt = Prompt(lambda context: messages)
        return await self.ask_about(journal, role, model, prompt, sampling, tools, check)

    async def ask_expert(
        self, journal: Journal, alias: Alias, task: Task, space: Workspace, write: Write
    ) -> ChatReply:
        """One call of the alias's model, which sees of the workspace what its budget has room for."""
        tokens, budget = self.tokens(alias.model), alias.budget
        prompt = Prompt(
            write,
            lambda room: expert_context(space, room, budget, tokens),
            task.question,
            budget.context_tokens,
        )
        return await self.ask_about(journal, "expert", alias.model, prompt, alias.sampling)

    async def ask_about(
        self,
        journal: Journal,
        role: Role,
        model: str,
        prompt: Prompt,
        sampling: Sampling,
        tools: tuple[Mapping[str, Any], ...] = (),
        check: Callable[[ChatReply], object] | None = None,
    ) -> ChatReply:
        """`ask` with a context that gives way where the prompt is too long. Raises ContextOverflow."""
        draft = self._draft(model, prompt, sampling, tools, journal.task.rollout_key)
        request = draft.request()
        columns: dict[str, Any] = {}
        return await journal.call(
            CHAT,
            what_is_asked(request),
            lambda: self._complete(journal, role, draft, request, columns),
            role=role,
            check=check,
            columns=columns,
        )

    def _draft(
        self,
        model: str,
        prompt: Prompt,
        sampling: Sampling,
        tools: tuple[Mapping[str, Any], ...],
        session: str,
    ) -> _Draft:
        tokens = self.tokens(model)
        fixed = fitting.size(prompt.write(""), tools, tokens)
        room = max(0, prompt.context_tokens - tokens.count(prompt.question)) if prompt.question else 0
        wanted = Fit(fixed, room, sampling.max_tokens)
        fit = fitting.fit(model, self.models[model], wanted, tokens, prompt.question)
        return _Draft(model, prompt, fit, Context(), sampling, tools, session).within(fit)

    async def _complete(
        self, journal: Journal, role: Role, draft: _Draft, request: ChatRequest, columns: dict[str, Any]
    ) -> ChatReply:
        """The reply; a prompt that the endpoint calls too long is shortened and asked again.

        All within one recorded call, so that a resume is given the reply without asking in vain again.
        """
        for number in range(1, fitting.MAX_SHORTENINGS + 2):
            columns |= {"context_tokens": draft.context.tokens, "context_cut": draft.context.cut}
            started = journal.timer()
            try:
                return await self.client.complete(request)
            except ContextOverflow as error:
                shorter = fitting.shortened(draft.fit, str(error), number)
                if shorter is None or number > fitting.MAX_SHORTENINGS:
                    raise
                journal.note(
                    "overflow",
                    started=started,
                    role=role,
                    model=draft.model,
                    status="error",
                    error_kind="model",
                    error=str(error),
                    **tried(error),
                    **columns,
                )
                draft = draft.within(shorter)
                request = draft.request()
        raise AssertionError("unreachable: the last round returns or raises")

    def tokens(self, model: str) -> TokenCounter:
        return counter(self.models[model].tokenizer)

    def images(self, model: str, task: Task) -> tuple[str, ...]:
        return task.images if self.models[model].accepts_images else ()


def what_is_asked(request: ChatRequest) -> dict[str, Any]:
    """What decides the reply, as plain data. Its digest names the call in the record of every run: nothing
    of one run (a session, an address, a time) may be in it."""
    return {
        "model": request.model,
        "messages": [_plain(message) for message in request.messages],
        "sampling": request.sampling.model_dump(),
        "tools": list(request.tools),
    }


def _plain(message: Message) -> list[Any]:
    plain = [message.role, message.content, list(message.images)]
    if message.tool_calls or message.tool_call_id:
        calls = [[call.call_id, call.name, call.arguments] for call in message.tool_calls]
        return [*plain, calls, message.tool_call_id]
    return plain


def schema(tool: Tool, models: Mapping[str, ModelConfig], *, is_strict: bool = False) -> dict[str, Any]:
    """The function tool that the orchestrator sees: one required argument, an alias from the enum.

    `is_strict` asks an endpoint that knows the word to let nothing else be decoded.
    """
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
            **({"strict": True} if is_strict else {}),
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
    price = alias.told(model)
    cost = f"${price.input:g} in, ${price.output:g} out per million tokens" if price else ""
    latency = f"about {alias.latency_s:g} s" if alias.latency_s is not None else ""
    facts = ", ".join(fact for fact in (cost, latency) if fact)
    said = "; ".join(part for part in (alias.blurb, facts) if part)
    return f"{name}: {said}." if said else f"{name}."
