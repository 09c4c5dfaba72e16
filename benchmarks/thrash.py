"""Engines whose throughput peaks and then falls with the calls in flight, without a word: their curves, and
one in virtual time. Nothing here waits."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ray_app.concurrency import Bounds, Controller, Observation
from ray_app.slots import Sample

Curve = Callable[[int], float]
MOST = 1024


@dataclass(frozen=True)
class Points:
    """Calls a second at so many in flight, straight between the points over the logarithm of the level."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, level: int) -> float:
        first, last = self.points[0], self.points[-1]
        if level <= first[0]:
            return float(first[1] * (level / first[0]) ** 0.8)
        for (low, slow), (high, fast) in pairwise(self.points):
            if level <= high:
                return slow + (fast - slow) * math.log(level / low) / math.log(high / low)
        return float(last[1] * (last[0] / level) ** 0.5)


@dataclass(frozen=True)
class Peak:
    """Saturates towards `peak` (knee: how late), falls beyond it with an exponent, never below a share."""

    peak: int
    rate: float
    knee: float
    fall: float
    floor: float

    def __call__(self, level: int) -> float:
        at = level / self.peak
        if at <= 1:
            return self.rate * at * (1 + self.knee) / (at + self.knee)
        return float(self.rate * (self.floor + (1 - self.floor) * at**-self.fall))


# Calls a second. The first two: tasks a minute of an agent workload on one GPU, at 32, 64 and 128 in flight,
# times its 49 calls a task.
SEED = Points(((32, 3.08), (64, 3.37), (128, 2.65)))
EARLY = Points(((16, 2.6), (32, 2.90), (64, 2.04), (128, 1.97)))
SHARP = Peak(peak=12, rate=3.0, knee=0.5, fall=1.5, floor=0.1)
CURVES: dict[str, Curve] = {"seed 32/64/128": SEED, "early fall": EARLY, "sharp, peak 12": SHARP}


def drawn(seed: int) -> Peak:
    """A curve at random: where it peaks, how it rises, how deep it falls."""
    rng = random.Random(seed)
    return Peak(
        peak=round(2 ** rng.uniform(2, 8)),
        rate=2 ** rng.uniform(0, 4),
        knee=2 ** rng.uniform(-3, 2),
        fall=2 ** rng.uniform(-1.5, 1.5),
        floor=rng.uniform(0.02, 0.4),
    )


class Best(NamedTuple):
    level: int
    rate: float


def best(curve: Curve) -> Best:
    """The best fixed limit and what it yields."""
    level = max(range(1, MOST + 1), key=curve)
    return Best(level, curve(level))


@dataclass(frozen=True)
class Yield:
    """Of one simulated run: when each call ended and the limits over time."""

    ended_s: Sequence[float]
    works: Sequence[float]
    limits: Sequence[tuple[float, int, str]]


class VirtualEngine:
    """Processor sharing: n calls in flight together do curve(n) units of work a second."""

    def __init__(self, curve: Curve, rng: random.Random, tail: float, drift: float) -> None:
        self.curve, self.rng, self.tail, self.drift = curve, rng, tail, drift
        self.now = self.service = 0.0
        self.open: list[tuple[float, float, float]] = []  # (service at its end, began, work)
        self.pace, self.pace_until = 1.0, 0.0

    def begin(self) -> float:
        """A call begins; the work that it is."""
        work = self.rng.lognormvariate(-(self.tail**2) / 2, self.tail)
        heapq.heappush(self.open, (self.service + work, self.now, work))
        return work

    def drop(self, works: Collection[float]) -> None:
        """The callers of these calls hang up."""
        self.open = [call for call in self.open if call[2] not in works]
        heapq.heapify(self.open)

    def run(self, until: float) -> list[tuple[float, float]]:
        """Advance to the next end of a call or to `until`; (duration, work) of what ended."""
        if self.now >= self.pace_until:
            self.pace = math.exp(self.rng.gauss(0, self.drift))
            self.pace_until = self.now + 10
        level = len(self.open)
        if level == 0:
            self.now = until
            return []
        speed = self.curve(level) * self.pace / level
        stop = min(until, self.pace_until)
        due = self.now + (self.open[0][0] - self.service) / speed
        if due > stop:
            self.service += (stop - self.now) * speed
            self.now = stop
            return []
        self.service, self.now = self.open[0][0], due
        _, began, work = heapq.heappop(self.open)
        return [(self.now - began, work)]


def simulate(
    curve: Curve,
    start: int,
    calls: int,
    *,
    seed: int = 0,
    demand: Callable[[float], int] = lambda at: 2 * MOST,
    tail: float = 1.0,
    drift: float = 0.05,
    tokens_per_work: float = 500.0,
    most: int = MOST,
) -> Yield:
    """`calls` calls through a controller that starts at `start`; `demand` is how many callers there are."""
    engine = VirtualEngine(curve, random.Random(seed), tail, drift)
    controller = Controller(Bounds(start=start, most=most))
    ended: list[float] = []
    works: list[float] = []
    limits = [(0.0, controller.limit, "")]
    samples: list[Sample] = []
    tick = 1.0
    while len(ended) < calls:
        while len(engine.open) < min(controller.limit, demand(engine.now)):
            engine.begin()
        for duration, work in engine.run(tick):
            ended.append(engine.now)
            works.append(work)
            samples.append(Sample("ok", duration, completion_tokens=round(work * tokens_per_work)))
        if engine.now >= tick:
            flying = len(engine.open)
            waiting = max(0, demand(engine.now) - flying)
            before = controller.limit
            limit = controller.observe(Observation(engine.now, samples, flying, waiting))
            if limit != before:
                limits.append((engine.now, limit, controller.reason))
            samples = []
            tick += 1.0
    return Yield(ended, works, limits)
