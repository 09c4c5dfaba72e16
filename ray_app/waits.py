"""The time that an attempt at a task waits before a call can go out: for a place, or for what is away.

It says how busy or how broken everything else is, nothing of the task; so the task's own limits stand
still meanwhile. Who makes a call wait says so (`waiting`); who sets a limit uses `standing_still`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Waits:
    """Of one attempt, for one event loop."""

    def __init__(self) -> None:
        self._total_s = self._began = 0.0
        self._open = 0  # waits at this moment: calls of a task may overlap
        self._left: dict[asyncio.Timeout, float] = {}  # seconds that each limit has when time goes on

    @property
    def total_s(self) -> float:
        return self._total_s + (time.monotonic() - self._began if self._open else 0.0)

    def begin(self) -> None:
        self._open += 1
        if self._open == 1:
            self._began = time.monotonic()
            for limit in self._left:
                self._stop(limit)

    def end(self) -> None:
        self._open -= 1
        if not self._open:
            self._total_s += time.monotonic() - self._began
            for limit, left_s in self._left.items():
                if not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time() + left_s)

    @contextmanager
    def standing_still(self, limit: asyncio.Timeout) -> Iterator[None]:
        """`limit`, which has been entered, loses no time by waits that are open within this context."""
        self._left[limit] = 0.0
        if self._open:
            self._stop(limit)
        try:
            yield
        finally:
            del self._left[limit]

    def _stop(self, limit: asyncio.Timeout) -> None:
        when = limit.when()
        if when is not None and not limit.expired():
            self._left[limit] = when - asyncio.get_running_loop().time()
            limit.reschedule(None)


_CURRENT: ContextVar[Waits | None] = ContextVar("waits", default=None)


def of_this_attempt() -> Waits:
    """The waits of the attempt that runs here; begun with the first question for them."""
    waits = _CURRENT.get()
    if waits is None:
        waits = begin_attempt()
    return waits


def begin_attempt() -> Waits:
    """New waits for what this asyncio task, and those that it starts, do from now on."""
    waits = Waits()
    _CURRENT.set(waits)
    return waits


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait that is no part of its task's time."""
    waits = _CURRENT.get()
    if waits is None:
        yield
        return
    waits.begin()
    try:
        yield
    finally:
        waits.end()
