"""A route's limit decided once for all runs of a cluster, and each run's share of it. Pure.

Once a second each run tells what its calls met at each route, and is told its share until the next time. One
controller sees the calls of all runs, so what it tries is tried by all of them together. A share that a run
does not need flows to the others; a run's own bounds hold for its share alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ray_app.concurrency import Bounds, Controller, Observation
from ray_app.quotas import held_back, split
from ray_app.slots import RouteKey, Sample

# A run that was not heard of for so long takes part no more, and one that heard nothing goes on alone.
LEASE_S = 10.0
# Where runs bring limits of which nothing is known here, so long is waited for others that do.
GATHER_S = 3.0
# A run that is late is waited for so long, before the others' limit is decided without news of it.
LATE_S = 2.0
# Where there are fewer places than runs that want one, they take turns of so many decisions.
TURN = 5


@dataclass(frozen=True, slots=True)
class RunUse:
    """What a run made of a route since it last told. `had`: the limit that it went by, where it had one.

    `seen.at_s` is of the run's own clock, and not used.
    """

    bounds: Bounds
    seen: Observation
    had: int | None = None

    @property
    def wanted(self) -> int:
        """Calls that it would have open, were nothing but its own bounds in the way."""
        return max(self.seen.in_flight, min(self.seen.in_flight + self.seen.waiting, self.bounds.most))


class RunShare(NamedTuple):
    """What a run may have open of a route: `now`. `limit` is for all `runs` together, `reason` why."""

    now: int
    limit: int
    runs: int
    reason: str


class JointLimits:
    """Of all routes that living runs have told of."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard_s: dict[str, float] = {}
        self._routes: dict[RouteKey, _Route] = {}

    @property
    def runs(self) -> int:
        return len(self._heard_s)

    def exchange(self, run: str, uses: Mapping[RouteKey, RunUse]) -> dict[RouteKey, RunShare]:
        """Hear what `run` made of its routes; its share of each."""
        now = self._clock()
        self._heard_s[run] = now
        self.drop_silent()
        for key, use in uses.items():
            if key not in self._routes:
                self._routes[key] = _Route(use, now)
            self._routes[key].hear(run, use, now)
        return {key: self._routes[key].share(run) for key in uses}

    def drop_silent(self) -> None:
        """Let go of runs that were not heard of for the lease."""
        now = self._clock()
        for run in [run for run, heard_s in self._heard_s.items() if now - heard_s > LEASE_S]:
            self.leave(run)

    def leave(self, run: str) -> None:
        """What `run` had is the others' from their next exchange on."""
        self._heard_s.pop(run, None)
        for key, route in list(self._routes.items()):
            route.leave(run)
            if not route.uses:
                del self._routes[key]


class _Route:
    def __init__(self, first: RunUse, now: float) -> None:
        self.uses: dict[str, RunUse] = {}
        self._controller = Controller(first.bounds)
        self._shares: dict[str, int] = {}
        self._had: dict[str, int] = {}  # by runs that were heard of while it gathers; some may be gone
        self._samples: list[Sample] = []
        self._fresh: set[str] = set()  # heard of since the last decision
        self._preemptions = 0.0
        self._decided_s, self._decisions = now, 0
        self._gathers_until = None if first.had is None else now + GATHER_S

    def hear(self, run: str, use: RunUse, now: float) -> None:
        is_new = run not in self.uses
        self.uses[run] = use
        self._samples += use.seen.samples
        self._preemptions += use.seen.preemptions
        self._fresh.add(run)
        if self._gathers_until is not None:
            self._gather(now)
        elif self._fresh >= self.uses.keys() or now - self._decided_s >= LATE_S:
            self._decide(now)
        elif is_new:
            self._share_out()

    def leave(self, run: str) -> None:
        if self.uses.pop(run, None) is not None:
            self._fresh.discard(run)
            del self._shares[run]

    def share(self, run: str) -> RunShare:
        limit, runs = self._controller.limit, len(self.uses)
        return RunShare(self._shares[run], limit, runs, self._controller.reason)

    def _gather(self, now: float) -> None:
        """Each keeps what it had; once all were heard of, that together is where the search goes on."""
        self._had |= {run: 1 if use.had is None else use.had for run, use in self.uses.items()}
        self._shares = {run: max(self._least(use), self._had[run]) for run, use in self.uses.items()}
        bounds = self._bounds()
        self._controller = Controller.resumed(bounds, sum(self._had.values()), "resumed")
        if self._gathers_until is not None and now >= self._gathers_until:
            self._gathers_until = None

    def _decide(self, now: float) -> None:
        self._controller.rebound(self._bounds())
        self._controller.observe(self._seen(now))
        self._samples, self._fresh, self._preemptions = [], set(), 0.0
        self._decided_s, self._decisions = now, self._decisions + 1
        self._share_out()

    def _seen(self, now: float) -> Observation:
        uses = self.uses.values()
        pressures = [use.seen.pressure for use in uses if use.seen.pressure is not None]
        queued = [use.seen.queued for use in uses if use.seen.queued is not None]
        return Observation(
            now,
            self._samples,
            sum(use.seen.in_flight for use in uses),
            sum(use.wanted - use.seen.in_flight for use in uses),
            max(pressures, default=None),
            max(queued, default=None),
            self._preemptions,
        )

    def _bounds(self) -> Bounds:
        """A fixed run takes what it takes: no limit below that is one. The others have at least a place."""
        uses = self.uses.values()
        adaptive = [use for use in uses if not use.bounds.is_fixed]
        fixed = [use.bounds.floor for use in uses if use.bounds.is_fixed and (use.wanted or not adaptive)]
        floor = sum(fixed) + sum(use.bounds.floor for use in adaptive[:1])
        return replace(self._controller.bounds, floor=floor, most=sum(use.bounds.most for use in uses))

    def _share_out(self) -> None:
        limit, uses = self._controller.limit, list(self.uses.values())
        taken = [use.bounds.floor if use.bounds.is_fixed and use.wanted else 0 for use in uses]
        # A run that wants nothing yet has a place to begin with, where there are enough.
        least = 1 if limit >= 2 * len(uses) else 0
        wanted = [max(0, max(least, use.wanted) - own) for use, own in zip(uses, taken, strict=True)]
        shares = split(max(0, limit - sum(taken)), wanted, self._decisions // TURN)
        flying = [max(0, use.seen.in_flight - own) for use, own in zip(uses, taken, strict=True)]
        shares = held_back(shares, flying)
        self._shares = {
            run: max(self._least(use), min(use.bounds.most, own + share))
            for (run, use), own, share in zip(self.uses.items(), taken, shares, strict=True)
        }

    @staticmethod
    def _least(use: RunUse) -> int:
        return use.bounds.floor if use.bounds.is_fixed else 0
