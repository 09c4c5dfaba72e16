"""A simulation as tau2's own `SimulationRun` JSON, so that its viewer and its tools read what was run here.

Pure: made without tau2. Costs and sources of messages go into the fields that tau2 has for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ray_app.records import digest
from ray_app.tau2.dialogue import Answered, Call, Entry, Said, entries_cost
from ray_app.tau2.reward import Reward
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.tasks import entries_of


def simulation_json(simulation: Simulation, reward: Reward | None = None) -> dict[str, Any]:
    """The run as JSON data; `reward_info` is null until there is a reward."""
    entries = simulation.entries
    return {
        "id": digest([simulation.domain, simulation.task_id, simulation.trial, simulation.started]),
        "task_id": simulation.task_id,
        "timestamp": _time(simulation.started),
        "start_time": _time(simulation.started),
        "end_time": _time(simulation.ended),
        "duration": simulation.ended - simulation.started,
        "termination_reason": simulation.reason,
        "agent_cost": entries_cost("assistant", entries),
        "user_cost": entries_cost("user", entries),
        "reward_info": dict(reward.record) if reward else None,
        "messages": [message_json(entry, turn) for turn, entry in enumerate(entries)],
        "trial": simulation.trial,
        "seed": simulation.seed,
        "info": {
            "domain": simulation.domain,
            "state_hash": simulation.state_hash,
            "detail": simulation.detail,
            "steps": simulation.steps,
            "errors": simulation.errors,
            "solo": simulation.is_solo,
        },
    }


def simulation_of(run: Mapping[str, Any]) -> Simulation:
    """The simulation whose JSON `run` is; of its messages without costs, tokens and sources."""
    info, messages = run["info"], run["messages"]
    entries = entries_of(messages)
    return Simulation(
        task_id=run["task_id"],
        domain=info["domain"],
        reason=run["termination_reason"],
        entries=tuple(
            replace(entry, at=_at(message["timestamp"]))
            for entry, message in zip(entries, messages, strict=True)
        ),
        steps=info["steps"],
        errors=info["errors"],
        state_hash=info["state_hash"],
        started=_at(run["start_time"]),
        ended=_at(run["end_time"]),
        is_solo=info["solo"],
        trial=run["trial"],
        seed=run["seed"],
        detail=info["detail"],
    )


def message_json(entry: Entry, turn: int | None = None) -> dict[str, Any]:
    """One entry as a tau2 message."""
    common = {"turn_idx": turn, "timestamp": _time(entry.at)}
    if isinstance(entry, Answered):
        return {
            "role": "tool",
            "id": entry.call_id,
            "content": entry.text,
            "requestor": entry.side,
            "error": entry.is_error,
            **common,
        }
    return {
        "role": entry.side,
        "content": entry.text or None,
        "tool_calls": [_call_json(call) for call in entry.calls] or None,
        "cost": entry.cost_usd,
        "usage": _usage(entry),
        "raw_data": dict(entry.source) or None,
        "generation_time_seconds": entry.took_s,
        **common,
    }


def _call_json(call: Call) -> dict[str, Any]:
    return {
        "id": call.call_id,
        "name": call.name,
        "arguments": dict(call.arguments),
        "requestor": call.side,
    }


def _usage(said: Said) -> Mapping[str, int]:
    return {
        "prompt_tokens": said.usage.prompt_tokens,
        "completion_tokens": said.usage.completion_tokens,
    }


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None).isoformat(timespec="microseconds")


def _at(time: str) -> float:
    return datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp()
