"""A route's limit shared out among the workers of a run, and what driver and workers tell each other. Pure.

Once a second each worker reports what it had open and waiting, and is granted its share until the next
time. A share that one does not need flows to the others within that second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ray_app.slots import RouteKey, Sample


class Share(NamedTuple):
    """What a worker may have open: `now`, and where it hears nothing more of the driver (`alone`)."""

    now: int
    alone: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What the driver allows a worker. `answered`: seconds since it heard that a route answered any."""

    shares: Mapping[RouteKey, Share] = field(default_factory=dict)
    may_spend: bool = True
    answered: Mapping[RouteKey, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Use:
    """What a worker made of a route since its last report."""

    samples: Sequence[Sample]
    in_flight: int
    waiting: int  # `pausing` among them: calls that the endpoint did not take, for the reason `refusal`
    pausing: int = 0
    refusal: str = ""
    denial: str = ""  # what the endpoint says where it denies all calls, which others take
    away: str = ""  # why the run has to end: no endpoint of the model answers

    @property
    def demand(self) -> int:
        return self.in_flight + self.waiting


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker tells: `spent_usd` since it started, `open_calls` of any kind that have gone out.

    `has_stopped`: it was told to spend no more, and lets no call out.
    """

    node: str
    uses: Mapping[RouteKey, Use] = field(default_factory=dict)
    spent_usd: float = 0.0
    open_calls: int = 0
    has_stopped: bool = False


def split(limit: int, demands: Sequence[int], turn: int = 0) -> list[int]:
    """Shares of at most `limit` in all: what each wants, where that is too much evenly, the rest to all.

    Where there is less than one for each that wants some, `turn` decides whose it is.
    """
    shares = [0] * len(demands)
    if not demands:
        return shares
    order = sorted(range(len(demands)), key=lambda i: (i - turn) % len(demands))
    left = limit
    wanting = [i for i in order if demands[i] > 0]
    # By what they want only where each gets some: else those that want most would have every turn.
    wanting = sorted(wanting, key=lambda i: demands[i]) if limit >= len(wanting) else wanting[: max(0, limit)]
    for number, i in enumerate(wanting):
        fair = left / (len(wanting) - number)
        shares[i] = min(demands[i], int(fair))
        left -= shares[i]
    # What rounding left, and then what nobody asked for yet: a worker may begin before it is heard of.
    for i in order:
        if left > 0 and shares[i] < demands[i]:
            shares[i] += 1
            left -= 1
    each, more = divmod(left, len(demands))
    for place, i in enumerate(order):
        shares[i] += each + (place < more)
    return shares


def held_back(shares: Sequence[int], in_flight: Sequence[int]) -> list[int]:
    """The shares, less what others still have open beyond theirs: one call may take minutes to end."""
    owed = sum(max(0, flying - share) for share, flying in zip(shares, in_flight, strict=True))
    left = list(shares)
    while owed > 0:
        free = [i for i, share in enumerate(left) if share > in_flight[i]]
        if not free:
            break
        most = max(free, key=lambda i: left[i] - in_flight[i])
        taken = min(owed, max(1, (left[most] - in_flight[most]) // 2))
        left[most], owed = left[most] - taken, owed - taken
    return left


def alone(limit: int, workers: int) -> int:
    """The share that cannot harm, whatever the others are granted meanwhile: an even one, of a half."""
    return max(1, limit // (2 * max(1, workers)))
