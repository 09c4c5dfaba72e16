"""The calls that one process may have open at one route (a model at an endpoint), and how they ended.

Callers wait in order of arrival. A limit may change at any time; one below what is open stops nobody who
has begun. `take` hands over what has been counted since it was last asked.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

# congested: the endpoint said or showed that it has too much (429, 503, a time-out); broken: any other fault.
Ending = Literal["ok", "congested", "broken", "cancelled"]

# Kept until they are taken: more than end within a second, and a bound where nobody takes any.
MAX_SAMPLES = 4096


class RouteKey(NamedTuple):
    """A model of the run config at one of its endpoints: what has a limit of its own."""

    model: str
    url: str


@dataclass(frozen=True, slots=True)
class Sample:
    """How one call ended, in seconds and tokens."""

    ending: Ending
    duration_s: float
    prefill_s: float = 0.0
    completion_tokens: int = 0


class Slots:
    """Bounds the open calls of one route in this process. Not for several threads."""

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self.in_flight = 0
        # Calls between two attempts, because the endpoint took none, and what it said of that.
        self.pausing = 0
        self.refusal = ""
        # When it last answered a call: of this process, or surely of another one (monotonic).
        self.answered_at = -math.inf
        # Said for good once the endpoints of the model have answered nothing for longer than its calls wait,
        # or deny all of them: why the run has to end.
        self.away = ""
        # What the endpoint says where it denies all calls, and the model has others.
        self.denial = ""
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._ended: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    @property
    def waiting(self) -> int:
        """Calls that have not gone out: for want of a place, or until the endpoint takes them."""
        return len(self._waiting) + self.pausing

    @property
    def limit(self) -> float:
        return self._limit

    @limit.setter
    def limit(self, value: float) -> None:
        self._limit = value
        self._admit()

    async def acquire(self) -> None:
        """Returns once this call may begin. A cancelled caller gives up its place."""
        if self.in_flight < self._limit and not self._waiting:
            self.in_flight += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.in_flight -= 1  # admitted and cancelled in the same turn of the loop
                self._admit()
            else:
                self._waiting.remove(place)
            raise

    def release(self, sample: Sample) -> None:
        self.in_flight -= 1
        self._ended.append(sample)
        self._admit()

    def take(self) -> list[Sample]:
        """What ended since the last call; of very much, the latest."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def _admit(self) -> None:
        while self._waiting and self.in_flight < self._limit:
            place = self._waiting.popleft()
            if not place.done():
                self.in_flight += 1
                place.set_result(None)
