"""Equal work that is under way is shared: who asks second waits for what the first began.

Owns the tasks. Nothing is kept of work that is done: a cache is somebody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Landing(Generic[T]):
    """What shared work gave. Exactly one of those who waited is told that it `is_first`: it pays."""

    value: T
    is_first: bool


@dataclass(eq=False)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0
    is_claimed: bool = False


class Flights(Generic[T]):
    """The work that is under way on one event loop, by key."""

    def __init__(self) -> None:
        self._flying: dict[str, _Flight[T]] = {}

    async def share(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> Landing[T]:
        """What `work` gives, begun here or before. Raises what it raises, to everybody who waits.

        Cancelling one who waits harms no other; the work is cancelled when nobody waits any more.
        """
        flight = self._flying.get(key) or self._begin(key, work)
        flight.waiters += 1
        try:
            value = await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                self._end(key, flight)
        is_first, flight.is_claimed = not flight.is_claimed, True
        return Landing(value, is_first)

    async def close(self) -> None:
        """Cancels what is under way."""
        tasks = [flight.task for flight in self._flying.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> _Flight[T]:
        flight = self._flying[key] = _Flight(asyncio.create_task(work()))
        flight.task.add_done_callback(_known)
        return flight

    def _end(self, key: str, flight: _Flight[T]) -> None:
        # Out of the way at once: nobody may join work that is being cancelled.
        if self._flying.get(key) is flight:
            del self._flying[key]
        flight.task.cancel()  # does nothing to work that is done


def _known(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # nobody may be left to hear of it, which asyncio would complain about
