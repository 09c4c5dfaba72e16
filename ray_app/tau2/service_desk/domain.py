"""The service desk as a domain: loads anywhere, needs nothing but this package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ray_app.errors import DatasetError
from ray_app.prompting import Prompts
from ray_app.records import Message
from ray_app.tau2 import evaluate
from ray_app.tau2.domain import Environment
from ray_app.tau2.reward import Reward
from ray_app.tau2.service_desk.agent_tools import AgentTools
from ray_app.tau2.service_desk.data import DeskData, Device
from ray_app.tau2.service_desk.user_tools import UserTools
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.tasks import TaskSpec
from ray_app.tau2.toolkit import LocalEnvironment

NAME = "service_desk"
FOLDER = Path(__file__).parent
GREETING = "Hello, this is the service desk. What can I do for you?"


def synchronise(agent: AgentTools, user: UserTools) -> None:
    """The laptop's VPN follows its owner's profile."""
    owner = agent.db.employees.get(user.db.owner_id)
    if owner is None:
        return
    user.db.profile_active = owner.vpn_profile == "active"
    if not user.db.profile_active:
        user.db.vpn = "disconnected"


def agent_tools() -> AgentTools:
    return AgentTools(DeskData.model_validate_json(_text("db.json")))


def user_tools() -> UserTools:
    return UserTools(Device())


def policy() -> str:
    return _text("policy.md")


def read_tasks(split: str) -> list[dict[str, Any]]:
    """The tasks of a split, in tau2's JSON shape. Raises DatasetError."""
    splits = json.loads(_text("split_tasks.json"))
    if split not in splits:
        raise DatasetError(f"split {split!r}: {NAME} has {', '.join(splits)}")
    return [task for task in json.loads(_text("tasks.json")) if task["id"] in splits[split]]


@cache
def _text(name: str) -> str:
    return (FOLDER / name).read_text()


@dataclass(frozen=True)
class ServiceDesk:
    prompts: Prompts
    name: str = NAME
    greeting: str = GREETING

    def tasks(self, split: str) -> list[dict[str, Any]]:
        return read_tasks(split)

    def environment(self, *, is_solo: bool = False) -> Environment:
        return LocalEnvironment(policy(), agent_tools(), user_tools(), synchronise, is_solo)

    def agent_prompt(self, spec: TaskSpec, environment: Environment, *, is_solo: bool) -> str:
        if is_solo:
            return self.prompts.render("agent_solo", policy=environment.policy, ticket=spec.ticket or "")
        return self.prompts.render("agent", policy=environment.policy)

    def user_prompt(self, spec: TaskSpec, environment: Environment) -> str:
        has_tools = bool(environment.schemas("user", spec.user_tools))
        device = self.prompts.render("user_tools") if has_tools else ""
        return self.prompts.render("user", device=device, scenario=spec.user_scenario.text())

    def questions(self, spec: TaskSpec, simulation: Simulation) -> tuple[Message, ...]:
        return evaluate.questions(self.prompts, spec, simulation)

    def check_judged(self, spec: TaskSpec, judged: str) -> None:
        evaluate.read_judged(judged, spec)

    def reward(self, spec: TaskSpec, simulation: Simulation, judged: str) -> Reward:
        met = evaluate.read_judged(judged, spec) if judged else []
        return evaluate.evaluate(self, spec, simulation, met)
