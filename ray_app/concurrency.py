"""How many calls a route (a model at an endpoint) may have open, decided about once a second. Pure.

Three modes. `start`: the limit doubles about once per call duration, until something speaks against it.
`climb`: no endpoint has to say that it is overloaded; the limit goes up or down by a factor, the work
finished a second is compared (`goodput.py`), and what is better stays. So it finds the peak of an engine
that thrashes beyond it in silence. `avoid`: the endpoint does say so (429, 503, time-outs, a full KV cache):
one decrease per episode, then additive growth. What it refuses once in a long while, as any server on its
way does, is no overload: that costs less than a lower limit.

The limit changes only while it is what holds calls back: an idle route or the tail of a run teaches nothing.
How long an endpoint asks a caller to wait (`Retry-After`) is no reason to change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ray_app.goodput import KEPT, NARROW, WIDE, Goodput
from ray_app.slots import Sample

Mode = Literal["start", "climb", "avoid"]

# How long a limit is given to show something: a call's duration, within these bounds.
SHORTEST_ROUND_S, LONGEST_ROUND_S = 2.0, 10.0
# A start that nothing speaks for or against goes no further than this.
BLIND_MOST = 512
# Nor where calls end at less than this share of the pace before.
STALLED = 0.5
# Calls that doubling is judged by.
START_CALLS = 6
# A route is at its limit when calls wait, or this share of it is used.
USED = 0.9
# A congested route keeps this share of what was open.
DECREASE = 0.75
GROWTH = 0.03
# Refusals of less than this share of the calls are chance; a call counts half after so many later ones.
RARE, HALF_LIFE_CALLS = 0.01, 300
# Of the limit: with fewer calls open and all others refused, none is served.
OPEN_IN_VAIN = 0.1
# A limit that holds nothing back for so long comes down to what is open, to be judged there.
UNUSED_S = 120.0
# Without congestion for so long, the limit is searched for by what it yields again.
CALM_S = 300.0
# KV cache in use: from here no growth; from the second on, with calls waiting in the engine, congestion.
PRESSURE_HOLDS, PRESSURE_FULL = 0.9, 0.95
# No growth either where this share of the open calls only waits inside the engine.
QUEUED = 0.5

# Calls that a level is judged by: at least, and where they do not settle it.
FEWEST_CALLS, MOST_CALLS = 24, 160
# Where nobody tells how much work a call was, its duration is mostly chance.
MOST_BLIND_CALLS = 400
SURE = 2.0  # standard errors
# A difference below the second is not believed before the level has had so many seconds: engines have moods.
SHORTEST_LOOK_S, PLAIN = 15.0, 0.15
# What another level must yield more to be worth the move.
GAIN = 0.01
# By such wide steps, fewer calls that yield as much are as good: a plateau shows no way.
TIE, WIDE_STEP = -0.06, 1.0
# At such a level and above it takes too long to wait for calls that have seen nothing else.
DRAIN_LEVEL = 96
FIRST_STEP, LAST_STEP, FAR_STEP = 1.0, 0.25, 2.0  # octaves
# At the top of the hill: calls at the best level between two looks around, growing to the second.
REST_CALLS, LONGEST_REST_CALLS = 600, 2400


@dataclass(frozen=True, slots=True)
class Observation:
    """One interval of a route, over all workers.

    `pressure` is the KV cache in use, 0 to 1; `queued` the calls that wait inside the engine; `preemptions`
    how many running calls it had to put back. None where nobody tells.
    """

    at_s: float
    samples: Sequence[Sample]
    in_flight: int
    waiting: int
    pressure: float | None = None
    queued: float | None = None
    preemptions: float = 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the config says of a route's limit."""

    start: int = 128
    floor: int = 1
    most: int = 1024

    @property
    def is_fixed(self) -> bool:
        return self.floor == self.most


@dataclass
class Controller:
    """One route. `observe` once per interval; `limit` and `reason` are what it decided."""

    bounds: Bounds = Bounds()
    reason: str = "start"
    mode: Mode = "start"
    _goodput: Goodput = field(default_factory=Goodput)
    _duration_s: float = 0.0  # of a typical call; 0 while none has ended
    _changed_s: float | None = None
    _busy_s: float | None = None  # since when calls have been open
    _decreased_s: float = -math.inf
    _used_s: float | None = None  # when the limit last held calls back

    def __post_init__(self) -> None:
        self.limit = self._best = self._within(self.bounds.start)
        self._step, self._way, self._refused = FIRST_STEP, 1, set[int]()
        self._ended = 0.0  # calls, at the present limit
        self._rest = float(REST_CALLS)
        self._tells_work, self._looked_far = False, 0
        self._before = 0  # the limit before this one
        self._pace = 0.0  # calls that ended a second at the limit before, in slow start
        self._taken = self._not_taken = 0.0  # calls, by what the endpoint said; the old ones count less

    @classmethod
    def resumed(cls, bounds: Bounds, limit: int, reason: str) -> Controller:
        """Goes on from `limit`, which another found: it is searched for from there, without a slow start."""
        controller = cls(replace(bounds, start=limit), reason)
        controller._begin_climb(controller.limit, -1)
        return controller

    def rebound(self, bounds: Bounds) -> None:
        """Go on within other bounds, with all that was learned."""
        self.bounds = bounds
        self._best = self._within(self._best)
        if (limit := self._within(self.limit)) != self.limit:
            self._before, self.limit, self._ended = self.limit, limit, 0.0
            self.reason = f"{self.mode}: within {bounds.floor} to {bounds.most}"

    def observe(self, seen: Observation) -> int:
        """The limit from now on, never below the floor."""
        self._learn(seen)
        if self._is_congested(seen):
            self._decrease(seen)
        elif self._is_used(seen):
            self._used_s = seen.at_s
            {"start": self._double, "climb": self._climb, "avoid": self._add}[self.mode](seen)
        elif self.mode != "avoid" and self._is_idle_above(seen):
            self._set(seen.in_flight, seen, "no more are wanted")
            self._begin_climb(self.limit, -1)
        return self.limit

    def _is_idle_above(self, seen: Observation) -> bool:
        """For long, fewer calls than the limit are open, yet many: they may be too many themselves."""
        if self._used_s is None:
            self._used_s = seen.at_s
        return seen.in_flight > 0.5 * self.limit and seen.at_s - self._used_s > UNUSED_S

    def _learn(self, seen: Observation) -> None:
        self._goodput.observe(seen.at_s, seen.in_flight)
        self._weigh(seen)
        if self._changed_s is None:
            self._changed_s = seen.at_s
        if seen.in_flight == 0 or self._busy_s is None:
            self._busy_s = seen.at_s
        taken = sum(sample.ending == "ok" for sample in seen.samples)
        refused = sum(sample.ending == "congested" for sample in seen.samples)
        fades = 0.5 ** ((taken + refused) / HALF_LIFE_CALLS)
        self._taken, self._not_taken = fades * self._taken + taken, fades * self._not_taken + refused
        for sample in seen.samples:
            if sample.ending == "ok":
                self._ended += 1
                share = 0.05 if self._duration_s else 1.0
                self._duration_s += share * (sample.duration_s - self._duration_s)

    def _weigh(self, seen: Observation) -> None:
        if not self._tells_work and any(sample.completion_tokens for sample in seen.samples):
            self._tells_work = True
            self._goodput.forget()
        if self._tells_work:
            self._goodput.add(self.limit, seen.samples, *self._near())
        elif self._ended >= self.limit / 2 and self._is_used(seen) and not self._is_over(seen):
            # Which calls end first after a change depends on how long they are: half must be new.
            self._goodput.count(self.limit, sum(sample.ending == "ok" for sample in seen.samples))

    def _near(self) -> tuple[float, float]:
        """What counts as the present level: less than half way (of factors) to the one before."""
        low, high = self.limit / NARROW, self.limit * NARROW
        between = math.sqrt(self.limit * (self._before or self.limit))
        if self._before < self.limit:
            low = max(low, between)
        elif self._drains:
            high = self.limit * WIDE
        else:
            high = min(high, between)
        return low, high + 1

    @property
    def _drains(self) -> bool:
        return self._before >= 2 * self.limit and self.limit >= DRAIN_LEVEL

    def _is_over(self, seen: Observation) -> bool:
        return seen.in_flight > NARROW * self.limit + 1

    def _is_used(self, seen: Observation) -> bool:
        return seen.waiting > 0 or seen.in_flight >= USED * self.limit

    def _since_change(self, seen: Observation) -> float:
        return seen.at_s - (self._changed_s or 0.0)

    def _round_s(self, now_s: float) -> float:
        """While no call has ended, one takes at least as long as the oldest is open."""
        typical = self._duration_s or now_s - (self._busy_s or now_s)
        return min(max(typical, SHORTEST_ROUND_S), LONGEST_ROUND_S)

    # Congestion that is shown or told.

    def _is_congested(self, seen: Observation) -> bool:
        """Of calls that began after the last decrease: the earlier ones belong to its episode."""
        told = any(
            sample.ending == "congested" and seen.at_s - sample.duration_s >= self._decreased_s
            for sample in seen.samples
        )
        is_full = seen.pressure is not None and seen.pressure >= PRESSURE_FULL and bool(seen.queued)
        told = told and not self._is_rare and not _takes_none(seen, self.limit)
        if not told and not is_full and seen.preemptions <= 0:
            return False
        # What was open before has to drain, and what was refused comes again: one episode.
        is_drained = seen.in_flight <= self.limit
        return is_drained and seen.at_s - self._decreased_s > 2 * self._round_s(seen.at_s)

    @property
    def _is_rare(self) -> bool:
        return self._not_taken < RARE * (self._taken + self._not_taken)

    def _decrease(self, seen: Observation) -> None:
        self.mode = "avoid"
        self._decreased_s = seen.at_s
        self._set(min(self.limit, math.floor(DECREASE * max(1, seen.in_flight))), seen, "congested")

    def _holds(self, seen: Observation) -> bool:
        """Whether the engine says that it has all it can take."""
        is_full = seen.pressure is not None and seen.pressure >= PRESSURE_HOLDS
        return is_full or (seen.queued or 0.0) > QUEUED * max(1, seen.in_flight)

    def _add(self, seen: Observation) -> None:
        if seen.at_s - self._decreased_s > CALM_S:
            self._begin_climb(self.limit, 1)
        elif any(sample.ending == "congested" for sample in seen.samples) and not self._is_rare:
            return  # still of the last episode
        elif self._since_change(seen) >= self._round_s(seen.at_s) and not self._holds(seen):
            self._set(self.limit + max(1, round(GROWTH * self.limit)), seen, "no congestion")

    # Slow start.

    def _double(self, seen: Observation) -> None:
        fewest = START_CALLS if self._tells_work else FEWEST_CALLS
        known = self._goodput.known(fewest)
        here = known.pop(self.limit, None)
        below = max(known, key=lambda level: known[level].rate, default=None)
        if here and below and here.rate < 1.05 * known[below].rate:
            self._begin_climb(below, -1)
            self._refused = {1}
            self._set(below, seen, "more yielded no more")
            return
        waited_s = self._since_change(seen)
        if seen.in_flight < USED * self.limit or waited_s < (SHORTEST_ROUND_S if here else LONGEST_ROUND_S):
            return
        if self._wanted(2 * self.limit, seen) == self.limit or self._holds(seen):
            self._begin_climb(self.limit, -1)
        elif here or self._may_go_blind(waited_s):
            self._pace = self._ended / waited_s
            self._set(self._wanted(2 * self.limit, seen), seen, "slow start")

    def _may_go_blind(self, waited_s: float) -> bool:
        """Nothing has lived at this limit yet. Where fewer calls end than did before, that is told enough."""
        if self.limit >= BLIND_MOST or (self._duration_s and not self._tells_work):
            return False
        return self._ended / waited_s >= STALLED * self._pace

    # Hill climbing on what the limits yield.

    def _begin_climb(self, best: int, way: int) -> None:
        self.mode, self._best, self._way = "climb", best, way
        self._step, self._refused = FIRST_STEP, set()
        self._rest = FEWEST_CALLS

    def _climb(self, seen: Observation) -> None:
        if self.limit == self._best:
            if self._ended >= self._rest and self._goodput.at(self._best).calls >= FEWEST_CALLS:
                self._probe(seen)
            return
        here, best = self._goodput.at(self.limit), self._goodput.at(self._best)
        gain = here.rate / best.rate - 1 if best.rate else 0.0
        error = math.hypot(here.error, best.error)
        most = MOST_CALLS if self._tells_work else MOST_BLIND_CALLS
        is_settled = here.calls >= most or abs(gain) > SURE * error
        # Half of the calls are new: the first that end after a change are the short ones.
        is_turned_over = self._ended >= self.limit / 2
        if here.calls < FEWEST_CALLS or not is_settled or not is_turned_over:
            return
        if self._is_over(seen):
            return
        if abs(gain) < PLAIN and self._since_change(seen) < SHORTEST_LOOK_S:
            return
        is_plateau = self._way < 0 and self._step == WIDE_STEP and gain > TIE
        if gain > GAIN or is_plateau:
            self._step = min(self._step, FIRST_STEP)
            self._best, self._ended = self.limit, 0.0
            self._refused = {-self._way}
            self._rest = 0
            self.reason = f"{gain:+.0%} work a second"
        else:
            self._refuse(seen, gain)

    def _probe(self, seen: Observation) -> None:
        """Try the next level; where both ways are refused, come closer, and at last rest longer."""
        if self._way > 0 and self._holds(seen):
            self._refused.add(1)
        for way in (self._way, -self._way):
            factor = self._best * 2.0 ** (way * self._step)
            more, fewer = max(factor, self._best + 1), min(factor, self._best - 1)
            target = self._wanted(more, seen) if way > 0 else self._within(fewer)
            if way not in self._refused and target != self._best:
                self._way = way
                self._goodput.revisit(target)
                self._set(target, seen, "more" if way > 0 else "fewer")
                return
        self._refused = set()
        if self._step == FAR_STEP:
            self._step = LAST_STEP
        elif self._step > LAST_STEP:
            self._step /= 2
        else:
            if not self._looked_far / 2 < self._best < self._looked_far * 2:
                # A small hill may stand on the slope of a large one, which is where fewer calls are open.
                self._step, self._way, self._refused = FAR_STEP, -1, {1}
                self._looked_far = self._best
            self._rest = min(max(REST_CALLS, 2 * self._rest), LONGEST_REST_CALLS)
            self._ended = 0.0

    def _refuse(self, seen: Observation, gain: float) -> None:
        self._refused.add(self._way)
        self._way = -self._way
        # What was seen of the best level while others drained tells less than what comes now.
        self._goodput.revisit(self._best, 0.0 if self._step >= WIDE_STEP else KEPT)
        self._rest = max(self._rest, FEWEST_CALLS + self._best / 2)
        self._set(self._best, seen, f"back: {gain:+.0%} work a second")

    def _wanted(self, limit: float, seen: Observation) -> int:
        """No more than there is demand for: a limit above it holds nothing back and could not be judged."""
        return self._within(min(limit, max(self.limit, seen.in_flight + seen.waiting)))

    def _within(self, limit: float) -> int:
        return max(self.bounds.floor, 1, min(round(limit), self.bounds.most))

    def _set(self, limit: int, seen: Observation, reason: str) -> None:
        self._before = self.limit
        self.limit, self.reason = self._within(limit), f"{self.mode}: {reason}"
        self._changed_s, self._ended = seen.at_s, 0.0


def _takes_none(seen: Observation, limit: int) -> bool:
    """Whether every call is refused, as by a server that restarts: its limit says nothing of that, the calls'
    own pauses keep them away, and a limit made of what is open then would be 1."""
    refused = sum(sample.ending == "congested" for sample in seen.samples)
    is_served = any(sample.ending == "ok" for sample in seen.samples)
    return not is_served and seen.in_flight <= min(refused, max(1, round(OPEN_IN_VAIN * limit)))
