"""What a route yields at each limit that was tried: work finished a second, with its standard error.

By Little's law the work that n open calls finish in a second is n times the work of a call over its
duration. A ratio of sums over whole calls says so long before counted completions do: how long single calls
are cancels out, so a heavy tail of durations is hardly noise. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ray_app.slots import Sample

# Of a level, so many calls are remembered; older ones fade.
MEMORY_CALLS = 400
# What is left of a level's old calls when it is tried again: the load may have changed meanwhile.
KEPT = 0.3
# No estimate is better than this, relative: what calls have in common is not in their scatter.
ERROR_FLOOR = 0.03
# How far from its limit a level may be, as a factor, for a call that tells of it; and while many calls drain,
# which would otherwise have to be waited for twice.
NARROW, WIDE = 1.3, 2.0
HISTORY_S = 1800.0


class Estimate(NamedTuple):
    """Work a second, its relative standard error, and from how many calls."""

    rate: float
    error: float
    calls: float


@dataclass
class _Sums:
    """Over calls, of a = level x work and d = duration; over intervals, of a = calls ended and d = span."""

    calls: float = 0.0
    a: float = 0.0
    d: float = 0.0
    aa: float = 0.0
    ad: float = 0.0
    dd: float = 0.0

    def fade(self, kept: float) -> None:
        for name in ("calls", "a", "d", "aa", "ad", "dd"):
            setattr(self, name, getattr(self, name) * kept)

    def add(self, a: float, d: float, calls: int = 1) -> None:
        if self.calls >= MEMORY_CALLS:
            self.fade(1 - min(calls / MEMORY_CALLS, 0.5))
        self.calls += calls
        self.a, self.d = self.a + a, self.d + d
        self.aa, self.ad, self.dd = self.aa + a * a, self.ad + a * d, self.dd + d * d

    def estimate(self) -> Estimate:
        """The ratio of the sums; its error by the delta method."""
        if self.a <= 0 or self.d <= 0:
            return Estimate(0.0, math.inf, self.calls)
        rate = self.a / self.d
        variance = max(0.0, self.aa - 2 * rate * self.ad + rate * rate * self.dd) / self.d**2
        return Estimate(rate, math.hypot(math.sqrt(variance) / rate, ERROR_FLOOR), self.calls)


class Goodput:
    """Learns from each call that spent its life at about one level."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._areas: list[float] = []  # call-seconds until then
        self._levels: list[int] = []
        self._sums: dict[int, _Sums] = {}

    def observe(self, at_s: float, in_flight: int) -> None:
        """How many calls are open at `at_s`."""
        area = 0.0
        if self._times:
            area = self._areas[-1] + in_flight * (at_s - self._times[-1])
        self._times.append(at_s)
        self._areas.append(area)
        self._levels.append(in_flight)
        if len(self._times) > 2 * HISTORY_S and (old := bisect_left(self._times, at_s - HISTORY_S)):
            del self._times[:old], self._areas[:old], self._levels[:old]

    def add(self, limit: int, samples: Iterable[Sample], low: float, high: float) -> None:
        """Count the calls that ended by the last observation, and lived while `low` to `high` were open."""
        for sample in samples:
            if sample.ending == "cancelled" or sample.duration_s <= 0:
                continue
            level = self._level(sample.duration_s, low, high)
            if level is None:
                continue
            work = max(1, sample.completion_tokens) if sample.ending == "ok" else 0
            self._sums.setdefault(limit, _Sums()).add(level * work, sample.duration_s)

    def count(self, limit: int, ended: int) -> None:
        """Count the calls that ended in the last interval, where nobody tells how much work they were."""
        if len(self._times) > 1 and (span := self._times[-1] - self._times[-2]) > 0:
            self._sums.setdefault(limit, _Sums()).add(ended, span, ended)

    def _level(self, duration_s: float, low: float, high: float) -> float | None:
        """The mean level during a life that ends now; None where it was not within the bounds throughout."""
        end = len(self._times) - 1
        began = self._times[end] - duration_s
        start = bisect_left(self._times, began)
        if start == 0 and began < self._times[0]:
            return None
        # The first observation after the beginning: what was before is not of this life.
        start = min(start, end)
        span = self._times[end] - self._times[start]
        mean = (self._areas[end] - self._areas[start]) / span if span > 0 else float(self._levels[end])
        is_steady = all(low <= level <= high for level in (mean, self._levels[start], self._levels[end]))
        return mean if is_steady else None

    def at(self, limit: int) -> Estimate:
        sums = self._sums.get(limit)
        return Estimate(0.0, math.inf, 0.0) if sums is None else sums.estimate()

    def forget(self) -> None:
        self._sums = {}

    def known(self, calls: float) -> dict[int, Estimate]:
        """Of each level with so many calls."""
        return {level: sums.estimate() for level, sums in self._sums.items() if sums.calls >= calls}

    def revisit(self, limit: int, kept: float = KEPT) -> None:
        """What was seen at `limit` before counts for less from now on."""
        if limit in self._sums:
            self._sums[limit].fade(kept)
