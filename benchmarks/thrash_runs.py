"""Several runs on one engine that thrashes in silence, in virtual time: governors as drivers have them, with
the decision that they share or each with its own. Nothing here waits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from benchmarks.thrash import Curve, VirtualEngine
from ray_app.concurrency import Bounds
from ray_app.governor import Governor, Policy
from ray_app.joint_limits import JointLimits
from ray_app.quotas import Use, WorkerReport
from ray_app.slots import RouteKey, Sample

KEY = RouteKey("thrash", "http://127.0.0.1:1/v1")
TOKENS_PER_WORK = 500
PLENTY = 2048


@dataclass(frozen=True)
class Part:
    """A run: where its limit starts, how many callers it has, and from when to when.

    One that `is_killed` does not say that it ends; its calls leave the engine with it.
    """

    start: int = 64
    callers: int = PLENTY
    begins_s: float = 0.0
    ends_s: float = math.inf
    is_killed: bool = False
    most: int = 1024


@dataclass(frozen=True)
class Scene:
    """What happens to the runs. `outage`: from when to when the shared decision answers nobody; it has
    forgotten everything then."""

    parts: Sequence[Part]
    together: bool = True
    capacity: int | None = None
    outage: tuple[float, float] = (math.inf, math.inf)
    tail: float = 1.0
    drift: float = 0.05


class Done(NamedTuple):
    at_s: float
    work: float
    run: int


class Moment(NamedTuple):
    """What each run had open, and might have."""

    at_s: float
    opened: Sequence[int]
    limits: Sequence[int]


class Played(NamedTuple):
    done: Sequence[Done]
    moments: Sequence[Moment]

    def shares(self, begin_s: float, end_s: float) -> list[float]:
        """Of the work that was done meanwhile, by run."""
        works = [0.0] * len(self.moments[0].opened)
        for at_s, work, run in self.done:
            if begin_s <= at_s < end_s:
                works[run] += work
        return [work / sum(works) for work in works]

    def rate(self, begin_s: float, end_s: float) -> float:
        """Work a second of all runs."""
        return sum(work for at_s, work, _ in self.done if begin_s <= at_s < end_s) / (end_s - begin_s)


@dataclass
class _Run:
    name: str
    part: Part
    governor: Governor
    open: int = 0
    samples: list[Sample] = field(default_factory=list)
    answer: dict[RouteKey, object] | None = None

    def lives(self, now: float) -> bool:
        return self.part.begins_s <= now < self.part.ends_s

    @property
    def limit(self) -> int:
        return self.governor.limits()[KEY]

    def hear(self) -> None:
        """Its one worker reports."""
        use = Use(self.samples, self.open, max(0, self.part.callers - self.open))
        self.governor.hear("w", WorkerReport("here", {KEY: use}))
        self.samples = []


class Stage:
    """Plays a scene once."""

    def __init__(self, curve: Curve, scene: Scene, seed: int) -> None:
        self.scene, self.engine = scene, VirtualEngine(curve, random.Random(seed), scene.tail, scene.drift)
        self._lot = random.Random(seed)
        self._joint = JointLimits(self._clock)
        self._is_out = False
        self._runs: list[_Run] = []
        for number, part in enumerate(scene.parts):
            policy = Policy({KEY: Bounds(start=part.start, most=part.most)})
            governor = Governor(policy, clock=self._clock, is_shared=scene.together)
            self._runs.append(_Run(f"run{number}", part, governor))
        self._owners: dict[float, _Run] = {}  # by the work of a call, of which no two are equal
        self._ended: set[str] = set()
        self._done: list[Done] = []
        self._moments: list[Moment] = []

    def _clock(self) -> float:
        return self.engine.now

    def play(self, calls: float, seconds: float) -> Played:
        tick = 0.0
        while self.engine.now < seconds and len(self._done) < calls:
            if self.engine.now >= tick:
                self._tick()
                tick += 1.0
            self._begin_calls()
            for duration, work in self.engine.run(tick):
                run = self._owners.pop(work)
                run.open -= 1
                run.samples.append(Sample("ok", duration, completion_tokens=round(work * TOKENS_PER_WORK)))
                self._done.append(Done(self.engine.now, work, self._runs.index(run)))
        return Played(self._done, self._moments)

    def _hungry(self) -> list[_Run]:
        now = self.engine.now
        return [r for r in self._runs if r.lives(now) and r.open < min(r.limit, r.part.callers)]

    def _begin_calls(self) -> None:
        capacity = self.scene.capacity
        while (hungry := self._hungry()) and (capacity is None or len(self.engine.open) < capacity):
            run = self._lot.choice(hungry)
            self._owners[self.engine.begin()] = run
            run.open += 1

    def _tick(self) -> None:
        """What each driver does once a second: its worker's report, limits, and what is shared; the answer
        to that is there a second later, but for the first."""
        now = self.engine.now
        for run in self._runs:
            if not run.lives(now):
                if now >= run.part.ends_s and run.name not in self._ended:
                    self._end(run)
                continue
            if self.scene.capacity is not None and run.open < min(run.limit, run.part.callers):
                run.samples.append(Sample("congested", 0.0))
            run.hear()
            self._exchange(run)
            run.governor.tick()
        opened = [run.open for run in self._runs]
        self._moments.append(Moment(now, opened, [run.limit for run in self._runs]))

    def _exchange(self, run: _Run) -> None:
        if not self.scene.together:
            return
        begin_s, end_s = self.scene.outage
        if begin_s <= self.engine.now < end_s:
            self._is_out, run.answer = True, None
            return
        if self._is_out:
            self._joint, self._is_out = JointLimits(self._clock), False
        is_first = run.answer is None
        if not is_first:
            run.governor.follow(run.answer)  # type: ignore[arg-type]
        run.answer = dict(self._joint.exchange(run.name, run.governor.uses()))
        if is_first:
            run.governor.follow(run.answer)  # type: ignore[arg-type]

    def _end(self, run: _Run) -> None:
        self._ended.add(run.name)
        if not run.part.is_killed:
            self._joint.leave(run.name)
        gone = {work for work, owner in self._owners.items() if owner is run}
        self.engine.drop(gone)
        for work in gone:
            del self._owners[work]
        run.open = 0


def play(
    curve: Curve, scene: Scene, *, calls: float = math.inf, seconds: float = math.inf, seed: int = 0
) -> Played:
    """Until so many calls have ended, or so many seconds have passed."""
    return Stage(curve, scene, seed).play(calls, seconds)


def apart(scene: Scene) -> Scene:
    """The same, each run with a decision of its own."""
    return replace(scene, together=False)
