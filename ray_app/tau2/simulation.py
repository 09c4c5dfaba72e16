"""How a simulation ended: its entries, the reason, and what it took. Reasons have tau2's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray_app.tau2.dialogue import Entry

Reason = Literal[
    "user_stop", "agent_stop", "max_steps", "timeout", "too_many_errors", "agent_error", "user_error"
]
# Only what ended in one of these is looked at; everything else has the reward 0.
REGULAR: tuple[Reason, ...] = ("user_stop", "agent_stop")

STOP = "###STOP###"
# What a user says to end a dialogue: settled, handed to a person, or none of what the scenario covers.
USER_STOPS = (STOP, "###TRANSFER###", "###OUT-OF-SCOPE###")


@dataclass(frozen=True, slots=True)
class Simulation:
    """`started` and `ended` are wall times (Unix seconds); `state_hash` is of the environment at the end."""

    task_id: str
    domain: str
    reason: Reason
    entries: tuple[Entry, ...]
    steps: int
    errors: int
    state_hash: str
    started: float
    ended: float
    is_solo: bool = False
    trial: int = 0
    seed: int | None = None
    detail: str = ""  # of a side whose replies could not be used: why
