"""tau2-bench's own agent and user simulator, scripted in the place of their models; keeps what they ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from ray_app.tau2.gold import GoldScript
from ray_app.tau2.results import message_json
from ray_app.tau2.tasks import TaskSpec
from ray_app.tau2.upstream import UpstreamDomain, UpstreamEnvironment


@dataclass
class Asked:
    """What a model is asked, in the order of the dialogue: the messages, and the tools by name."""

    script: GoldScript
    requests: list[tuple[list[dict[str, Any]], list[Any]]] = field(default_factory=list)

    def add(self, messages: list[dict[str, Any]], tools: list[Any]) -> None:
        self.requests.append(([_plain(message) for message in messages], tools))


def official_requests(
    domain: UpstreamDomain, spec: TaskSpec, script: GoldScript, patch: pytest.MonkeyPatch
) -> Asked:
    """What tau2's own agent and user ask their models in a dialogue that goes as the script has it."""
    import tau2.agent.llm_agent as agents
    import tau2.user.user_simulator as users
    from tau2.data_model.message import AssistantMessage
    from tau2.data_model.tasks import Task
    from tau2.orchestrator.orchestrator import Orchestrator
    from tau2.runner.build import build_user
    from tau2.utils.llm_utils import to_litellm_messages

    asked = Asked(script)

    def generate(*, messages: Any, tools: Any, call_name: str, **settings: Any) -> Any:
        asked.add(to_litellm_messages(messages), [tool.openai_schema for tool in tools or ()])
        said = message_json(script.next("user" if call_name.startswith("user") else "assistant"))
        return AssistantMessage.model_validate({**said, "role": "assistant", "raw_data": None})

    patch.setattr(agents, "generate", generate)
    patch.setattr(users, "generate", generate)
    environment = domain.environment()
    assert isinstance(environment, UpstreamEnvironment)
    inner, task = environment.inner, Task.model_validate(spec.model_dump(mode="json"))
    agent = agents.LLMAgent(inner.get_tools(), inner.get_policy(), llm="none")
    user = build_user("user_simulator", inner, task, llm="none", llm_args={})
    Orchestrator(domain.name, agent, user, inner, task, max_steps=200).run()
    return asked


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without what changes nothing: empty fields, and a second copy of a tool's name."""
    plain = {key: value for key, value in message.items() if value not in (None, "")}
    if "tool_calls" in plain:
        calls = plain["tool_calls"]
        plain["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
    return plain
