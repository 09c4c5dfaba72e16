"""Wall time that no step of the clock moves, for what a run says of its past.

Somebody may set a machine's clock in the middle of a run: by an hour, where it was wrong. Events of one
process keep their order and their distances all the same, and their durations stay what they were.
"""

from __future__ import annotations

import time

# Less is what two readings lie apart, and nobody waits for.
LEAST_STEP_S = 0.5


def clock_s() -> float:
    """Seconds that nobody sets, and that go on while the machine sleeps."""
    return time.clock_gettime(_CLOCK)


_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the former on Linux only
_BEGAN = time.time() - clock_s()


def now() -> float:
    """Unix seconds by the clock as it was when this process began, whatever was done to it since."""
    return _BEGAN + clock_s()


def step_s() -> float:
    """By how much the machine's clock was set since: what `now` must be moved by to agree with it."""
    moved_s = time.time() - now()
    return moved_s if abs(moved_s) >= LEAST_STEP_S else 0.0
