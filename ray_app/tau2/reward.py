"""The reward of a simulation: 0 or 1, the product of the parts that its task counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Reward:
    """`parts`: those of the task's basis. `record` is tau2's RewardInfo as JSON data."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
