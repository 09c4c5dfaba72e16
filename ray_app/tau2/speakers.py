"""The sides of a dialogue as models: one call for each message, through the task's journal.

The agent may hand a turn to an expert: with `call_expert` among its tools, the chosen expert is asked the
same with the domain's tools, and what it says is the turn. Both calls are events; an expert that fails
fails the attempt, like every model, and is never taken for the end of the dialogue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_app import extract
from ray_app.config import Alias, Sampling
from ray_app.errors import EvalError, UnusableReply, kind_of
from ray_app.journal import Journal
from ray_app.prompting import Prompts
from ray_app.records import ChatReply, Message, Role, ToolCall, Usage
from ray_app.tau2.dialogue import Call, Entry, Said, Side, chat
from ray_app.tau2.domain import Schema, function_schema
from ray_app.tau2.simulation import STOP
from ray_app.tools.base import Caller, describe

# A reply that is no message is asked for again so often, with the reason told.
MAX_REPLIES = 3
CALL_EXPERT = "call_expert"
DONE = "done"  # the tool by which an agent that works alone ends


@dataclass
class ModelSpeaker:
    """A side whose messages one model writes."""

    side: Side
    role: Role
    model: str
    sampling: Sampling
    system: str
    schemas: tuple[Schema, ...]
    caller: Caller
    journal: Journal
    prompts: Prompts
    experts: Mapping[str, Alias] = field(default_factory=dict)
    expert_system: str = ""  # the experts' own, which tells of no further expert
    is_solo: bool = False

    async def speak(self, entries: Sequence[Entry]) -> Said:
        started = self.journal.timer()
        asked = chat(self.side, self.system, entries)
        reply = await self._ask(self.role, self.model, self.sampling, asked, self._offered())
        replies = [(self.role, reply)]
        name = self._expert(reply)
        if name is not None:
            reply = await self._ask_expert(name, entries)
            replies.append(("expert", reply))
        took_s = self.journal.timer() - started
        source = [_source(role, each) for role, each in replies]
        if name is not None:
            source[-1]["alias"] = name
        return Said(
            self.side,
            self._text(reply),
            self._calls(reply),
            self.journal.clock(),
            took_s,
            sum(each.cost_usd for _, each in replies),
            _total([each.usage for _, each in replies]),
            {"calls": source},
        )

    async def _ask_expert(self, name: str, entries: Sequence[Entry]) -> ChatReply:
        journal, alias = self.journal, self.experts[name]
        asked = chat(self.side, self.expert_system, entries)
        journal.tool, journal.alias = CALL_EXPERT, name
        started = journal.timer()
        try:
            reply = await self._ask("expert", alias.model, alias.sampling, asked, self.schemas)
        except EvalError as error:
            journal.note(
                "tool_call",
                started=started,
                model=alias.model,
                status="error",
                error_kind=kind_of(error),
                error=str(error),
            )
            raise
        journal.note("tool_call", started=started, model=alias.model)
        journal.tool = journal.alias = ""
        return reply

    async def _ask(
        self,
        role: Role,
        model: str,
        sampling: Sampling,
        asked: tuple[Message, ...],
        schemas: tuple[Schema, ...],
    ) -> ChatReply:
        messages = asked
        names = {schema["function"]["name"] for schema in schemas}

        def check(reply: ChatReply) -> None:
            self._check(reply, may_ask_expert=CALL_EXPERT in names)

        for tries in range(MAX_REPLIES):
            try:
                return await self.caller.ask(
                    self.journal, role, model, messages, sampling, schemas, check=check
                )
            except UnusableReply as error:
                if tries == MAX_REPLIES - 1:
                    raise
                told = Message("user", self.prompts.render("feedback", reason=str(error)).strip())
                messages = (*asked, told)
        raise AssertionError("unreachable: the last try returns or raises")

    def _offered(self) -> tuple[Schema, ...]:
        return (*self.schemas, expert_schema(self.experts, self.caller)) if self.experts else self.schemas

    def _check(self, reply: ChatReply, *, may_ask_expert: bool) -> None:
        """Raises UnusableReply where nothing can be made of the reply."""
        if not reply.tool_calls and not self._text(reply).strip():
            raise UnusableReply("the reply is empty; write a message or call a tool")
        for call in reply.tool_calls:
            arguments = _arguments(call)
            if not isinstance(arguments, dict):
                raise UnusableReply(
                    f"the arguments of {call.name} are no JSON object: {call.arguments[:200]}"
                )
            if call.name == CALL_EXPERT and may_ask_expert and arguments.get("expert") not in self.experts:
                known = ", ".join(self.experts)
                raise UnusableReply(f"call_expert needs one of {known}, got {call.arguments[:200]}")
        if self.is_solo and not reply.tool_calls:
            raise UnusableReply(f"nobody reads a message here; call a tool, or {DONE} at the end")

    def _expert(self, reply: ChatReply) -> str | None:
        asked = [call for call in reply.tool_calls if call.name == CALL_EXPERT and self.experts]
        return str(_arguments(asked[0])["expert"]) if asked else None

    def _text(self, reply: ChatReply) -> str:
        return STOP if self._is_done(reply) else extract.without_thinking(reply.content)

    def _calls(self, reply: ChatReply) -> tuple[Call, ...]:
        if self._is_done(reply):
            return ()
        return tuple(
            Call(call.call_id or f"call_{self.journal.made}_{n}", call.name, _arguments(call), self.side)
            for n, call in enumerate(reply.tool_calls)
        )

    def _is_done(self, reply: ChatReply) -> bool:
        return self.is_solo and any(call.name == DONE for call in reply.tool_calls)


def expert_schema(experts: Mapping[str, Alias], caller: Caller) -> Schema:
    """The tool by which the agent hands its turn to an expert: names, prices, latencies."""
    lines = [describe(name, alias, caller.models[alias.model]) for name, alias in experts.items()]
    return function_schema(
        CALL_EXPERT,
        "Let an expert write this turn in your place: its message or its tool call is taken as yours.",
        {
            "expert": {
                "type": "string",
                "enum": list(experts),
                "description": "Who writes it. " + " ".join(lines),
            }
        },
    )


def done_schema() -> Schema:
    return function_schema(DONE, "Say that the ticket is settled, or cannot be; this ends the work.", {})


def _arguments(call: ToolCall) -> Any:
    try:
        return json.loads(call.arguments or "{}")
    except ValueError:
        return None


def _source(role: Role, reply: ChatReply) -> dict[str, Any]:
    return {
        "role": role,
        "model": reply.model,
        "endpoint": reply.endpoint,
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "cost_usd": reply.cost_usd,
        "finish_reason": reply.finish_reason,
        "tool_calls": [call.name for call in reply.tool_calls],
    }


def _total(usages: Sequence[Usage]) -> Usage:
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
    )
