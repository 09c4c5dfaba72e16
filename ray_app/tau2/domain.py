"""The seam to a domain: its tasks, its prompts, its environment, and how a simulation of it is rewarded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray_app.errors import InfrastructureError
from ray_app.records import Message
from ray_app.tau2.dialogue import Answered, Call, Entry, Side, exchanges
from ray_app.tau2.reward import Reward
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.tasks import Action, Assertion, InitialState, TaskSpec

Schema = Mapping[str, Any]


class ReplayError(InfrastructureError):
    """A tool answered otherwise than the record says: code or data of the domain have changed since."""


class Environment(Protocol):
    """The state of one simulation, and the tools of both sides that read and change it.

    Deterministic: the same calls in the same order give the same answers and the same state.
    """

    @property
    def policy(self) -> str: ...

    def initialise(self, initial: InitialState | None) -> None:
        """Bring about the task's initial data and actions, without its message history."""

    def schemas(self, side: Side, only: Sequence[str] | None = None) -> tuple[Schema, ...]:
        """The function tools that `side` is offered; `only` leaves out others, [] all of them."""
        ...

    def call(self, call: Call) -> Answered:
        """What the tool answers; a tool that fails answers with an error. Synchronises afterwards."""
        ...

    def perform(self, action: Action) -> None:
        """A gold action, without synchronising afterwards. Raises whatever the tool raises."""

    def has_tool(self, name: str) -> bool: ...

    def mutates(self, name: str) -> bool:
        """Whether the tool may change the state."""
        ...

    def holds(self, assertion: Assertion) -> bool: ...

    def sync(self) -> None:
        """Carry over to one side's data what the other side's imply."""

    def state_hash(self) -> str:
        """Equal for equal data of both sides, however they were reached."""
        ...

    def fingerprint(self) -> str:
        """As `state_hash`, and cheap: equal after the same calls in the same order."""
        ...


class Domain(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def greeting(self) -> str:
        """What the agent says first."""
        ...

    def tasks(self, split: str) -> list[dict[str, Any]]:
        """The tasks of a split in tau2's JSON shape. Raises DatasetError for an unknown split."""
        ...

    def environment(self, *, is_solo: bool = False) -> Environment:
        """A new one in the domain's own initial state."""
        ...

    def agent_prompt(self, spec: TaskSpec, environment: Environment, *, is_solo: bool) -> str: ...

    def user_prompt(self, spec: TaskSpec, environment: Environment) -> str: ...

    def questions(self, spec: TaskSpec, simulation: Simulation) -> tuple[Message, ...]:
        """What a judge has to be asked before `reward` can be told; () where nothing."""
        ...

    def check_judged(self, spec: TaskSpec, judged: str) -> None:
        """Raises JudgeError where the judge's reply cannot be read."""

    def reward(self, spec: TaskSpec, simulation: Simulation, judged: str) -> Reward:
        """The reward; `judged` is the judge's reply, "" where it was not asked."""
        ...


def function_schema(name: str, purpose: str, properties: Mapping[str, Any]) -> Schema:
    """A function tool whose arguments are all required."""
    parameters = {"type": "object", "properties": dict(properties), "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": purpose, "parameters": parameters}}


def prepare(domain: Domain, spec: TaskSpec, *, is_solo: bool = False) -> Environment:
    """A domain's environment in the state in which the task begins."""
    environment = domain.environment(is_solo=is_solo)
    environment.initialise(spec.initial_state)
    replay(environment, spec.history())
    return environment


def replay(environment: Environment, entries: Sequence[Entry]) -> None:
    """Make the calls of a dialogue again. Raises ReplayError where a tool answers otherwise.

    Tools that change nothing are not called again, nor are tools that are not there.
    """
    for call, recorded in exchanges(entries):
        if environment.has_tool(call.name) and environment.mutates(call.name):
            answer = environment.call(call)
            if not is_same_answer(answer.text, recorded.text):
                raise ReplayError(
                    f"{call.name}({dict(call.arguments)}) answered {answer.text[:200]!r}, and "
                    f"{recorded.text[:200]!r} when it was recorded; use the domain's code and data of then"
                )
    environment.sync()


def is_same_answer(mine: str, other: str) -> bool:
    """Equal as JSON where both are, else as texts."""
    return bool(_value(mine) == _value(other))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
