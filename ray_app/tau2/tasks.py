"""A tau2 task as its files hold it (`tasks.json`): scenario, initial state, and what is rewarded.

Fields that nothing here needs are carried along: files of several versions of tau2-bench are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ray_app.tau2.dialogue import Answered, Call, Entry, Said, Side

Basis = Literal["DB", "ENV_ASSERTION", "NL_ASSERTION", "ACTION", "COMMUNICATE"]


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Action(Spec):
    """A gold tool call. `compare_args` names the arguments that matter; None: those that the call has."""

    action_id: str = ""
    requestor: Side = "assistant"
    name: str
    arguments: dict[str, Any]
    compare_args: list[str] | None = None

    def is_done_by(self, call: Call) -> bool:
        """Whether `call` does what this action asks for."""
        if call.name != self.name:
            return False
        names = set(call.arguments if self.compare_args is None else self.compare_args)
        made = {name: value for name, value in call.arguments.items() if name in names}
        return made == {name: value for name, value in self.arguments.items() if name in names}


class FunctionCall(Spec):
    """A call of any function of a side's tools, a hidden one too."""

    env_type: Side
    func_name: str
    arguments: dict[str, Any]


class Assertion(FunctionCall):
    assert_value: bool = True
    message: str | None = None


class Criteria(Spec):
    """What is rewarded: the product over `reward_basis`, each 0 or 1."""

    actions: list[Action] | None = None
    env_assertions: list[Assertion] | None = None
    communicate_info: list[str] | None = None
    nl_assertions: list[str] | None = None
    reward_basis: list[Basis] = ["DB", "COMMUNICATE"]


class InitialData(Spec):
    agent_data: dict[str, Any] | None = None
    user_data: dict[str, Any] | None = None


class InitialState(Spec):
    initialization_data: InitialData | None = None
    initialization_actions: list[FunctionCall] | None = None
    message_history: list[dict[str, Any]] | None = None


class Instructions(Spec):
    domain: str
    reason_for_call: str
    known_info: str | None = None
    unknown_info: str | None = None
    task_instructions: str


class Scenario(Spec):
    persona: str | None = None
    instructions: Instructions | str

    def text(self) -> str:
        """The scenario as the user's model is told it: one labelled paragraph for each part."""
        parts = {"Persona": self.persona}
        if isinstance(self.instructions, str):
            parts["Instructions"] = self.instructions
        else:
            parts["Reason for call"] = self.instructions.reason_for_call
            parts["Known info"] = self.instructions.known_info
            parts["Unknown info"] = self.instructions.unknown_info
            parts["Task instructions"] = self.instructions.task_instructions
        return "\n\n".join(f"{label}:\n{text}" for label, text in parts.items() if text)


class TaskSpec(Spec):
    id: str
    user_scenario: Scenario
    ticket: str | None = None
    initial_state: InitialState | None = None
    evaluation_criteria: Criteria | None = None
    user_tools: list[str] | None = None

    def history(self) -> tuple[Entry, ...]:
        """What was said before the simulation begins."""
        messages = (self.initial_state and self.initial_state.message_history) or ()
        return entries_of(messages)


def entries_of(messages: Sequence[dict[str, Any]]) -> tuple[Entry, ...]:
    """tau2's JSON messages as entries; times and costs of theirs are left out."""
    return tuple(_entry(message) for message in messages)


def _entry(message: dict[str, Any]) -> Entry:
    if message["role"] == "tool":
        side = message.get("requestor", "assistant")
        return Answered(message["id"], message.get("content") or "", side, bool(message.get("error")))
    calls = tuple(
        Call(call.get("id", ""), call["name"], call["arguments"], call.get("requestor", "assistant"))
        for call in message.get("tool_calls") or ()
    )
    return Said(message["role"], message.get("content") or "", calls)
