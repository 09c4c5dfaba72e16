"""The dialogue: agent, user and environment in turns, until one side stops or a rule ends it.

A pure function of what the sides say: tools are deterministic, so a resumed dialogue makes the same calls
and its environment comes to the same state. Each tool call is an event with the hash of that state, and a
resume that comes to another one stops, rather than going on with a state that nobody saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ray_app.errors import UnusableReply
from ray_app.journal import Codec, Journal
from ray_app.tau2.dialogue import Answered, Call, Entry, Said, Side
from ray_app.tau2.domain import Environment, ReplayError
from ray_app.tau2.simulation import STOP, USER_STOPS, Reason, Simulation
from ray_app.tau2.tasks import TaskSpec

Place = Literal["agent", "user", "environment"]
SIDES: Mapping[Side, Place] = {"assistant": "agent", "user": "user"}


class Speaker(Protocol):
    """One side of a dialogue."""

    async def speak(self, entries: Sequence[Entry]) -> Said:
        """What it says next. Raises UnusableReply where nothing can be made of it."""
        ...


@dataclass(frozen=True, slots=True)
class Rules:
    """When a dialogue ends that nobody ends. A step is one message of a side, or one round of tool calls."""

    max_steps: int = 200
    max_errors: int = 10
    is_solo: bool = False  # the agent works alone, with the tools of both sides


@dataclass(frozen=True, slots=True)
class ToolResult:
    """An answer of the environment as it is recorded.

    `state_hash` is of the state after the last tool that may change it, "" where there was none.
    """

    text: str
    is_error: bool
    state_hash: str


def _columns(result: ToolResult) -> dict[str, Any]:
    return {"error_kind": "tool", "error": result.text[:2000]} if result.is_error else {}


TOOL: Codec[ToolResult] = Codec(
    "tool_call",
    lambda result, keep: json.dumps(asdict(result), ensure_ascii=False),
    lambda body, texts: ToolResult(**json.loads(body)),
    _columns,
)


@dataclass
class Dialogue:
    """One simulation in progress: whose message goes to whom next."""

    spec: TaskSpec
    environment: Environment
    agent: Speaker
    user: Speaker
    rules: Rules
    journal: Journal
    greeting: str
    seed: int | None = None
    entries: list[Entry] = field(default_factory=list)
    to: Place = "user"
    steps: int = 0
    errors: int = 0
    reason: Reason | None = None
    detail: str = ""
    state: str = ""
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.journal.clock()

    async def run(self, domain: str) -> Simulation:
        """The simulation, from its task's first message to its end."""
        await self._begin()
        while self.reason is None:
            await self._step()
            self._check_rules()
        return self.so_far(domain, self.reason)

    def so_far(self, domain: str, reason: Reason) -> Simulation:
        """What there is of the simulation, as one that ended for `reason`."""
        return Simulation(
            task_id=self.spec.id,
            domain=domain,
            reason=reason,
            entries=tuple(self.entries),
            steps=self.steps,
            errors=self.errors,
            state_hash=self.environment.fingerprint(),
            started=self.started,
            ended=self.journal.clock(),
            is_solo=self.rules.is_solo,
            trial=self.journal.base.trial,
            seed=self.seed,
            detail=self.detail,
        )

    async def _begin(self) -> None:
        """The task's own history, or a greeting; an agent that works alone begins by itself."""
        self.entries = list(self.spec.history())
        if self.entries:
            self._go_on_from(self.entries[-1])
        elif self.rules.is_solo:
            await self._speak("assistant")
        else:
            self.entries.append(Said("assistant", self.greeting, at=self.journal.clock()))
            self.to = "user"
        self.environment.sync()

    def _go_on_from(self, last: Entry) -> None:
        if isinstance(last, Answered):
            self.to = SIDES[last.side]
            return
        self.to = "environment" if last.calls else SIDES["user" if last.side == "assistant" else "assistant"]
        self.reason = self._stopped(last)

    async def _step(self) -> None:
        if self.to == "environment":
            await self._use_tools()
        else:
            await self._speak("assistant" if self.to == "agent" else "user")
        self.steps += 1
        self.environment.sync()

    async def _speak(self, side: Side) -> None:
        journal = self.journal
        journal.turn += 1
        journal.tool = journal.alias = ""
        started = journal.timer()
        try:
            said = await (self.agent if side == "assistant" else self.user).speak(self.entries)
        except UnusableReply as error:
            self.reason, self.detail = f"{SIDES[side]}_error", str(error)  # type: ignore[assignment]
            journal.note("turn", started=started, status="invalid", error=str(error), detail=SIDES[side])
            return
        self.entries.append(said)
        self.to = "environment" if said.calls else SIDES["user" if side == "assistant" else "assistant"]
        self.reason = self._stopped(said)
        journal.note("turn", started=started, detail=SIDES[side])

    def _stopped(self, said: Said) -> Reason | None:
        if said.side == "user":
            is_stop = not said.calls and any(token in said.text for token in USER_STOPS)
            return "user_stop" if is_stop else None
        if not self.rules.is_solo:
            return None
        if STOP in said.text:
            return "agent_stop"
        return None if said.calls else "agent_error"  # nobody is there to read a text

    async def _use_tools(self) -> None:
        said = self.entries[-1]
        assert isinstance(said, Said)
        for call in said.calls:
            answer = await self._answer(call)
            self.errors += answer.is_error
            self.entries.append(answer)
        self.to = SIDES[said.side]

    async def _answer(self, call: Call) -> Answered:
        """The environment's answer, which a record of the same call has to agree with."""
        journal = self.journal
        journal.tool, journal.alias = call.name, SIDES[call.side]
        made: list[ToolResult] = []

        async def perform() -> ToolResult:
            made.append(self._result(call))
            return made[0]

        request = [call.call_id, call.side, call.name, dict(call.arguments)]
        recorded = await journal.call(TOOL, request, perform, is_awaited=False)
        result = made[0] if made else self._result(call)
        if recorded != result:
            raise ReplayError(
                f"{call.name}: state {result.state_hash[:12]} and answer {result.text[:80]!r} now, "
                f"{recorded.state_hash[:12]} and {recorded.text[:80]!r} when it was recorded; "
                "resume with the domain's code and data of then"
            )
        return Answered(call.call_id, result.text, call.side, result.is_error, journal.clock())

    def _result(self, call: Call) -> ToolResult:
        answer = self.environment.call(call)
        if self.environment.has_tool(call.name) and self.environment.mutates(call.name):
            self.state = self.environment.fingerprint()
        return ToolResult(answer.text, answer.is_error, self.state)

    def _check_rules(self) -> None:
        """As in tau2, a limit that is reached by the last message counts before what that message said."""
        if self.to == "environment":
            return
        if self.steps >= self.rules.max_steps:
            self.reason = "max_steps"
        if self.errors >= self.rules.max_errors:
            self.reason = "too_many_errors"
