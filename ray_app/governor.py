"""The driver's side of the limits: one controller for each route, shares for each worker, dollars spent.

Knows neither Ray nor the network: the pool brings reports and takes grants, the driver's loop ticks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ray_app import steady
from ray_app.concurrency import Bounds, Controller, Observation
from ray_app.joint_limits import LEASE_S, TURN, RunShare, RunUse
from ray_app.quotas import Grant, Share, Use, WorkerReport, alone, held_back, split
from ray_app.records import Event
from ray_app.slots import RouteKey, Sample

# A little less than the second between two looks of the driver, or every other one would come to nothing.
INTERVAL_S = 0.9


@dataclass(frozen=True, slots=True)
class Pressure:
    """What an engine says of itself; see `concurrency.Observation`. `preemptions` only ever grows."""

    kv_used: float | None = None
    queued: float | None = None
    preemptions: float = 0.0


@dataclass(frozen=True)
class Policy:
    """What a config says of a run's limits. A route that it does not name has the default bounds."""

    bounds: Mapping[RouteKey, Bounds] = field(default_factory=dict)
    run_cost_usd: float | None = None
    spent_before_usd: float = 0.0  # by earlier commands of this run


class Decided(NamedTuple):
    """A limit that so many runs share."""

    limit: int
    runs: int
    reason: str

    @property
    def each(self) -> int:
        return max(1, self.limit // self.runs)


@dataclass
class _Route:
    """Its limit is a share of the joint one, or found by its own controller. `told`: by the last event."""

    bounds: Bounds
    controller: Controller
    samples: list[Sample] = field(default_factory=list)
    preemptions: float | None = None
    share: RunShare | None = None
    is_begun: bool = False  # its limit has been in force
    kept: int | None = None  # the last share, while nothing is heard of the other runs
    answered_s: float | None = None  # when a worker last told of an answer
    told: Decided | None = None

    @property
    def limit(self) -> int:
        return self.controller.limit if self.share is None else self.share.now

    @property
    def decided(self) -> Decided:
        if self.share is None:
            return Decided(self.controller.limit, 1, self.controller.reason)
        return Decided(self.share.limit, self.share.runs, self.share.reason)

    @property
    def had(self) -> int | None:
        """What a new joint decision is to begin from; None where calls have had no limit yet."""
        if self.share is None and self.kept is not None:
            return self.kept
        return self.limit if self.is_begun else None

    def go_alone(self) -> None:
        """From the share that it had, and with others there never beyond that: they may have more by now."""
        share, self.share = self.share, None
        if share is None:
            return
        now = max(1, share.now)
        self.kept = now if share.runs > 1 else None
        bounds = self.bounds if share.runs == 1 else replace(self.bounds, most=min(self.bounds.most, now))
        self.controller = Controller.resumed(bounds, now, "alone: no word of other runs")


class Governor:
    """For one event loop. One that `is_shared` has its limits of `follow`, as long as that is called."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        workers: int = 1,
        pressure: Callable[[RouteKey], Pressure | None] = lambda key: None,
        warn: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
        is_shared: bool = False,
    ) -> None:
        self.is_shared, self._followed_s = is_shared, -math.inf
        self._policy, self._pressure, self._clock = policy or Policy(), pressure, clock
        self._workers, self._warn = workers, warn
        self._denials = set[RouteKey]()
        self._routes: dict[RouteKey, _Route] = {}
        self._reports: dict[str, WorkerReport] = {}
        self.gone_usd: dict[str, float] = {}  # by worker that is gone
        self.stopped_for = ""  # why nothing more may be called, where it is not for want of money
        self._shares: dict[str, dict[RouteKey, Share]] = {}
        self._changes: list[Event] = []
        self._ticks, self._ticked_s = 0, clock()
        for key in self._policy.bounds:
            self._route(key)  # before the first call goes out

    @property
    def spent_usd(self) -> float:
        """By this run: earlier commands, workers that are gone, and those that live."""
        living = sum(report.spent_usd for report in list(self._reports.values()))
        return self._policy.spent_before_usd + sum(list(self.gone_usd.values())) + living

    @property
    def may_spend(self) -> bool:
        limit = self._policy.run_cost_usd
        return not self.stopped_for and (limit is None or self.spent_usd < limit)

    @property
    def is_spent_out(self) -> bool:
        """Nothing more may be called, and every worker has said that nothing is under way any more."""
        reports = self._reports.values()
        return not self.may_spend and all(r.has_stopped and r.open_calls == 0 for r in reports)

    def limits(self) -> dict[RouteKey, int]:
        return {key: route.limit for key, route in self._routes.items()}

    def figures(self) -> dict[str, Any]:
        """For the status, from any thread: the limit of each route, with that of all runs and their number
        where they are several; the calls that it does not take with what it says; and dollars spent and
        their limit, where they have one."""
        limits = [
            [*key, route.limit, *((share.limit, share.runs) if share and share.runs > 1 else ())]
            for key, route in list(self._routes.items())
            for share in [route.share]
        ]
        most_usd = self._policy.run_cost_usd
        budget = {} if most_usd is None else {"spent_usd": self.spent_usd, "limit_usd": most_usd}
        return {"limits": limits, "refused": self.refused(), **budget}

    def refused(self) -> list[list[Any]]:
        """Model, URL, calls that wait since it took none, and what it said, of each route that has some."""
        found: dict[RouteKey, list[Any]] = {}
        for report in list(self._reports.values()):
            for key, use in report.uses.items():
                if use.pausing:
                    row = found.setdefault(key, [key.model, key.url, 0, use.refusal])
                    row[2] += use.pausing
        return list(found.values())

    def hear(self, worker: str, report: WorkerReport) -> None:
        """What `worker` reported; its samples count once."""
        self._reports[worker] = report
        for key, use in report.uses.items():
            route = self._route(key)
            route.samples.extend(use.samples)
            if any(sample.ending == "ok" for sample in use.samples):
                route.answered_s = self._clock()
            self.stopped_for = self.stopped_for or use.away
            if use.denial and key not in self._denials:
                self._denials.add(key)
                self._warn(f"warning: model {key.model}: {use.denial}; its tasks go to the other endpoints")
                self._changes.append(
                    Event("warning", steady.now(), model=key.model, endpoint=key.url, error=use.denial)
                )

    def lose(self, worker: str) -> None:
        """A worker that is gone has spent what it last said, and wants nothing."""
        gone = self._reports.pop(worker, None)
        self.gone_usd[worker] = gone.spent_usd if gone else 0.0
        self._shares.pop(worker, None)

    @property
    def counts_money(self) -> bool:
        return self._policy.run_cost_usd is not None

    def settle(self, worker: str, spent_usd: float) -> None:
        """What the log has of a worker that is gone: with the calls that ended after its last report."""
        self.gone_usd[worker] = max(spent_usd, self.gone_usd.get(worker, 0.0))

    def grant(self, worker: str) -> Grant:
        """What `worker` may do until it is heard of again. One that is new starts with an even share, as far
        as the others have left it."""
        if worker not in self._shares:
            self._shares[worker] = {key: self._first(key, limit) for key, limit in self.limits().items()}
        now = self._clock()
        answered = {
            key: now - route.answered_s for key, route in self._routes.items() if route.answered_s is not None
        }
        return Grant(dict(self._shares[worker]), self.may_spend, answered)

    def _first(self, key: RouteKey, limit: int) -> Share:
        workers = max(self._workers, len(self._reports))
        left = limit - sum(shares[key].now for shares in self._shares.values() if key in shares)
        return Share(max(0, min(max(1, limit // workers), left)), alone(limit, workers))

    def tick(self) -> list[Event]:
        """Once an interval: limits and shares anew. What has changed, as events."""
        now = self._clock()
        if now - self._ticked_s < INTERVAL_S:
            return []
        self._ticked_s, self._ticks = now, self._ticks + 1
        if self.is_shared and now - self._followed_s > LEASE_S:
            for route in self._routes.values():
                route.go_alone()
        for key, route in self._routes.items():
            if route.share is None and self.may_spend:
                seen = self._seen(key, route, now)
                route.is_begun |= seen.in_flight > 0
                route.controller.observe(seen)
            self._tell(key, route)
            self._share(key, route)
        changes, self._changes = self._changes, []
        return changes

    def uses(self) -> dict[RouteKey, RunUse]:
        """What to tell of each route for the joint limits; each call counts once, here or in `tick`."""
        now = self._clock()
        return {
            key: RunUse(route.bounds, self._seen(key, route, now), route.had)
            for key, route in self._routes.items()
        }

    def follow(self, shares: Mapping[RouteKey, RunShare]) -> None:
        """Go by this run's shares of the joint limits."""
        self._followed_s = self._clock()
        for key, share in shares.items():
            route = self._routes[key]
            route.share, route.is_begun = share, True
            self._share(key, route)

    def _seen(self, key: RouteKey, route: _Route, now: float) -> Observation:
        uses = [use for report in self._reports.values() if (use := report.uses.get(key))]
        pressure = self._pressure(key) or Pressure()
        before = route.preemptions
        samples, route.samples, route.preemptions = route.samples, [], pressure.preemptions
        return Observation(
            now,
            samples,
            sum(use.in_flight for use in uses),
            sum(use.waiting for use in uses) if self.may_spend else 0,  # else for money
            pressure.kv_used,
            pressure.queued,
            0.0 if before is None else max(0.0, pressure.preemptions - before),
        )

    def _tell(self, key: RouteKey, route: _Route) -> None:
        """A decision is an event; that a share of it moves with what runs want is none."""
        decided, before = route.decided, route.told
        if before is None or decided[:2] != before[:2]:
            self._changes.append(_change(key, decided, before))
            route.told = decided

    def _share(self, key: RouteKey, route: _Route) -> None:
        nothing = Use((), 0, 0)
        uses = {name: report.uses.get(key, nothing) for name, report in self._reports.items()}
        limit = route.limit
        shares = split(limit, [use.demand for use in uses.values()], self._ticks // TURN)
        shares = held_back(shares, [use.in_flight for use in uses.values()])
        safe = alone(limit, len(uses))
        for name, share in zip(uses, shares, strict=True):
            self._shares.setdefault(name, {})[key] = Share(share, safe)

    def _route(self, key: RouteKey) -> _Route:
        if key not in self._routes:
            bounds = self._policy.bounds.get(key, Bounds())
            route = self._routes[key] = _Route(bounds, Controller(bounds))
            self._tell(key, route)
            self._share(key, route)
        return self._routes[key]


def _change(key: RouteKey, decided: Decided, before: Decided | None) -> Event:
    """Of a limit that runs share, `new` is an even share: what a run gets where all want more."""
    reason = decided.reason
    if before and before.limit == decided.limit:
        reason = "shared with another run" if decided.runs > before.runs else "shared with fewer runs"
    detail: dict[str, Any] = {"old": before.each if before else None, "new": decided.each, "reason": reason}
    if decided.runs > 1:
        detail |= {"all_runs": decided.limit, "runs": decided.runs}
    return Event("limit", steady.now(), model=key.model, endpoint=key.url, detail=json.dumps(detail))
