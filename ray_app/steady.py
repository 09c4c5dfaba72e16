"""Wall time that no step of the clock moves, for what a run says of its past.

Somebody may set a machine's clock in the middle of a run: by an hour, where it was wrong. Events keep their
order and their distances all the same, and their durations stay what they were. The processes of a run on one
machine agree on the clock as the driver's beginning had it; another machine has a clock of its own.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# Less is what two readings lie apart, and nobody waits for.
LEAST_STEP_S = 0.5


class Beginning(NamedTuple):
    """The time (Unix seconds) at which a machine started, by its wall clock at a later moment; and which
    start of which machine that was, "" where nobody can tell."""

    wall_s: float
    boot: str


def clock_s() -> float:
    """Seconds that nobody sets, and that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


_agreed = Beginning(time.time() - clock_s(), "")


def beginning() -> Beginning:
    """What other processes of the run are to be told."""
    return Beginning(_agreed.wall_s, _boot())


def agree(told: Beginning) -> None:
    """Has this process show the time as that one does, where both are on one machine."""
    global _agreed  # noqa: PLW0603  (a process has one clock)
    if told.boot and told.boot == _boot():
        _agreed = told


def now() -> float:
    """Unix seconds by the clock as it was in the beginning, whatever was done to it since."""
    return _agreed.wall_s + clock_s()


def step_s() -> float:
    """By how much the machine's clock was set since: what `now` must be moved by to agree with it."""
    moved_s = time.time() - now()
    return moved_s if abs(moved_s) >= LEAST_STEP_S else 0.0
