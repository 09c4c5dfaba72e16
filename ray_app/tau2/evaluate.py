"""The reward by our own reading of a task's criteria; the same number as tau2's evaluator gives.

Data are compared by replaying: a fresh environment that saw the simulation's calls against a fresh one that
saw the gold actions. Nothing here asks a judge: what it said is handed in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray_app import extract
from ray_app.errors import JudgeError
from ray_app.prompting import Prompts
from ray_app.records import Message
from ray_app.tau2.dialogue import Entry, Said, tool_calls
from ray_app.tau2.domain import Domain, Environment, prepare, replay
from ray_app.tau2.reward import Reward
from ray_app.tau2.simulation import REGULAR, Simulation
from ray_app.tau2.tasks import Criteria, TaskSpec


def needs_judge(spec: TaskSpec, simulation: Simulation) -> bool:
    """Whether the reward depends on what a judge says."""
    criteria = spec.evaluation_criteria
    if criteria is None or simulation.reason not in REGULAR:
        return False
    return "NL_ASSERTION" in criteria.reward_basis and bool(criteria.nl_assertions)


def questions(prompts: Prompts, spec: TaskSpec, simulation: Simulation) -> tuple[Message, ...]:
    """What the judge is asked: of each assertion whether the dialogue meets it. () where none counts."""
    criteria = spec.evaluation_criteria
    if criteria is None or not needs_judge(spec, simulation):
        return ()
    listed = "\n".join(f"{n}. {text}" for n, text in enumerate(criteria.nl_assertions or (), 1))
    text = prompts.render("judge", dialogue=transcript(simulation.entries), assertions=listed)
    return (Message("user", text),)


def transcript(entries: Sequence[Entry]) -> str:
    """The dialogue as plain text, with tool calls and their answers."""
    lines = []
    for entry in entries:
        if not isinstance(entry, Said):
            lines.append(f"tool: {entry.text}")
            continue
        who = "agent" if entry.side == "assistant" else "user"
        lines += [f"{who}: {entry.text}"] if entry.text else []
        lines += [f"{who} calls {call.name}({json.dumps(dict(call.arguments))})" for call in entry.calls]
    return "\n".join(lines)


def read_judged(reply: str, spec: TaskSpec) -> list[bool]:
    """Whether each of the task's assertions is met, by the judge's reply. Raises JudgeError."""
    criteria = spec.evaluation_criteria
    count = len((criteria and criteria.nl_assertions) or ())
    fields = extract.json_object(extract.without_thinking(reply)) or {}
    met = [fields.get(str(n)) for n in range(1, count + 1)]
    if not all(isinstance(value, bool) for value in met):
        raise JudgeError(
            f"judge reply {reply[:200]!r}: expected a JSON object with true or false for 1 to {count}"
        )
    return [value is True for value in met]


def evaluate(domain: Domain, spec: TaskSpec, simulation: Simulation, met: Sequence[bool] = ()) -> Reward:
    """The reward of a simulation. `met`: of each natural-language assertion, where they count."""
    if simulation.reason not in REGULAR:
        return Reward(0.0, note=f"ended by {simulation.reason}", record=_record(0.0, None))
    criteria = spec.evaluation_criteria
    if criteria is None:
        return Reward(1.0, note="the task has no criteria", record=_record(1.0, None))
    parts: dict[str, float] = {}
    if {"DB", "ENV_ASSERTION"} & set(criteria.reward_basis):
        parts |= _environment_parts(domain, spec, simulation, criteria)
    if "ACTION" in criteria.reward_basis:
        parts["ACTION"] = float(all(_done(criteria, simulation.entries)))
    if "NL_ASSERTION" in criteria.reward_basis:
        parts["NL_ASSERTION"] = float(all(met))
    if "COMMUNICATE" in criteria.reward_basis:
        parts["COMMUNICATE"] = float(all(_told(criteria, simulation.entries)))
    value = 1.0
    for part in parts.values():
        value *= part
    return Reward(value, parts, record=_record(value, criteria, parts))


def _environment_parts(
    domain: Domain, spec: TaskSpec, simulation: Simulation, criteria: Criteria
) -> dict[str, float]:
    """DB and ENV_ASSERTION, as far as the task counts them; both 1 where nothing is expected of either."""
    if criteria.actions is None and criteria.env_assertions is None:
        return {}
    reached = domain.environment(is_solo=simulation.is_solo)
    reached.initialise(spec.initial_state)
    replay(reached, simulation.entries)
    parts = {}
    if "DB" in criteria.reward_basis:
        parts["DB"] = float(_target(domain, spec, criteria).state_hash() == reached.state_hash())
    if "ENV_ASSERTION" in criteria.reward_basis:
        held = [reached.holds(assertion) for assertion in criteria.env_assertions or ()]
        parts["ENV_ASSERTION"] = float(all(held))
    return parts


def _target(domain: Domain, spec: TaskSpec, criteria: Criteria) -> Environment:
    """The state that the gold actions lead to. A gold action that fails changes nothing, and is no fault."""
    target = prepare(domain, spec)
    for action in criteria.actions or ():
        with suppress(Exception):  # whatever a tool raises
            target.perform(action)
    return target


def _done(criteria: Criteria, entries: Sequence[Entry]) -> list[bool]:
    calls = tool_calls(entries)
    return [any(action.is_done_by(call) for call in calls) for action in criteria.actions or ()]


def _told(criteria: Criteria, entries: Sequence[Entry]) -> list[bool]:
    """Whether the agent wrote each of the texts, whatever the case and the commas in its numbers."""
    texts = [
        entry.text.lower().replace(",", "")
        for entry in entries
        if isinstance(entry, Said) and entry.side == "assistant"
    ]
    return [any(info.lower() in text for text in texts) for info in criteria.communicate_info or ()]


def _record(value: float, criteria: Criteria | None, parts: dict[str, float] | None = None) -> dict[str, Any]:
    """tau2's RewardInfo, as far as it can be told here."""
    basis = list(criteria.reward_basis) if criteria else None
    return {"reward": value, "reward_basis": basis, "reward_breakdown": parts or {}}
