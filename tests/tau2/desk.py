"""The service desk for tests: its domain, its tasks by id, and models that answer as the baseline does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ray_app.baseline import rules
from ray_app.chat import ChatRequest, as_openai
from ray_app.records import ChatReply, Task
from ray_app.tau2.config import Tau2Config
from ray_app.tau2.run import Tau2Solver, make_solver, task_of
from ray_app.tau2.service_desk.domain import NAME, ServiceDesk, read_tasks
from ray_app.tau2.tasks import TaskSpec
from tests.tau2.replays import PROMPTS

DESK = ServiceDesk(PROMPTS)
RAW = {raw["id"]: raw for raw in read_tasks("base")}


def spec(name: str, **changes: object) -> TaskSpec:
    return TaskSpec.model_validate(RAW[name] | changes)


def task(name: str, **changes: object) -> Task:
    return task_of(NAME, RAW[name] | changes)


def config(**changes: object) -> Tau2Config:
    """Agent, user and judge are the model `m`, the expert `expert-1` is the model `e`."""
    endpoints = [{"base_url": "http://127.0.0.1:9/v1"}]
    models = {
        "m": {"endpoints": endpoints, "price": {"input": 1, "output": 2}},
        "e": {"endpoints": endpoints, "price": {"input": 10, "output": 20}},
    }
    side = {"model": "m"}
    values: dict[str, object] = {"models": models, "orchestrator": side, "user": side, "judge": side}
    return Tau2Config.model_validate(values | changes)


@dataclass
class BaselineModel:
    """A chat client that answers by the baseline's rules, but for what `instead` answers."""

    instead: Callable[[ChatRequest], ChatReply | Exception | None] = lambda request: None
    asked: list[ChatRequest] = field(default_factory=list)

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.asked.append(request)
        given = self.instead(request)
        if isinstance(given, Exception):
            raise given
        return given or _reply(request)


def _reply(request: ChatRequest) -> ChatReply:
    body = {"messages": [as_openai(each) for each in request.messages], "tools": list(request.tools)}
    made = rules.reply(body)
    return ChatReply(made.content, made.tool_calls, made.finish_reason, made.usage, cost_usd=0.25)


def solver(model: BaselineModel, settings: Tau2Config | None = None) -> Tau2Solver:
    return make_solver(settings or config(), PROMPTS, model, {NAME: DESK})
