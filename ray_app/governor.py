"""The driver's side of the limits: one controller for each route, shares for each worker, dollars spent.

Knows neither Ray nor the network: the pool brings reports and takes grants, the driver's loop ticks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_app.concurrency import Bounds, Controller, Observation
from ray_app.quotas import Grant, Share, Use, WorkerReport, alone, held_back, split
from ray_app.records import Event
from ray_app.slots import RouteKey, Sample

# A little less than the second between two looks of the driver, or every other one would come to nothing.
INTERVAL_S = 0.9
# Where there are fewer places than workers that want one, they take turns of so many intervals.
TURN = 5


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


@dataclass
class _Route:
    controller: Controller
    samples: list[Sample] = field(default_factory=list)
    preemptions: float | None = None


class Governor:
    """For one event loop."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        workers: int = 1,
        pressure: Callable[[RouteKey], Pressure | None] = lambda key: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._pressure, self._clock = policy or Policy(), pressure, clock
        self._workers = workers
        self._routes: dict[RouteKey, _Route] = {}
        self._reports: dict[str, WorkerReport] = {}
        self._gone_usd = 0.0
        self._shares: dict[str, dict[RouteKey, Share]] = {}
        self._changes: list[Event] = []
        self._ticks, self._ticked_s = 0, clock()
        for key in self._policy.bounds:
            self._route(key)  # before the first call goes out

    @property
    def spent_usd(self) -> float:
        """By this run: earlier commands, workers that are gone, and those that live."""
        living = sum(report.spent_usd for report in self._reports.values())
        return self._policy.spent_before_usd + self._gone_usd + living

    @property
    def may_spend(self) -> bool:
        limit = self._policy.run_cost_usd
        return limit is None or self.spent_usd < limit

    @property
    def is_spent_out(self) -> bool:
        """The limit is reached, and every worker has said that nothing of it is under way any more."""
        reports = self._reports.values()
        return not self.may_spend and all(r.has_stopped and r.open_calls == 0 for r in reports)

    def limits(self) -> dict[RouteKey, int]:
        return {key: route.controller.limit for key, route in self._routes.items()}

    def figures(self) -> dict[str, Any]:
        """For the status, from any thread: the limit of each route, and dollars spent where they have one."""
        limits = [[key.model, key.url, route.controller.limit] for key, route in list(self._routes.items())]
        most_usd = self._policy.run_cost_usd
        budget = {} if most_usd is None else {"spent_usd": self.spent_usd, "limit_usd": most_usd}
        return {"limits": limits, **budget}

    def hear(self, worker: str, report: WorkerReport) -> None:
        """What `worker` reported; its samples count once."""
        self._reports[worker] = report
        for key, use in report.uses.items():
            self._route(key).samples.extend(use.samples)

    def lose(self, worker: str) -> None:
        """A worker that is gone has spent what it spent, and wants nothing."""
        gone = self._reports.pop(worker, None)
        self._gone_usd += gone.spent_usd if gone else 0.0
        self._shares.pop(worker, None)

    def grant(self, worker: str) -> Grant:
        """What `worker` may do until it is heard of again. One that is new starts with an even share, as far
        as the others have left it."""
        if worker not in self._shares:
            self._shares[worker] = {key: self._first(key, limit) for key, limit in self.limits().items()}
        return Grant(dict(self._shares[worker]), self.may_spend)

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
        for key, route in self._routes.items():
            self._observe(key, route, now)
            self._share(key, route)
        changes, self._changes = self._changes, []
        return changes

    def _observe(self, key: RouteKey, route: _Route, now: float) -> None:
        uses = [use for report in self._reports.values() if (use := report.uses.get(key))]
        pressure = self._pressure(key) or Pressure()
        before = route.preemptions
        route.preemptions = pressure.preemptions
        seen = Observation(
            now,
            route.samples,
            sum(use.in_flight for use in uses),
            sum(use.waiting for use in uses),
            pressure.kv_used,
            pressure.queued,
            0.0 if before is None else max(0.0, pressure.preemptions - before),
        )
        route.samples = []
        old = route.controller.limit
        if self.may_spend and route.controller.observe(seen) != old:
            self._changes.append(_change(key, old, route.controller))

    def _share(self, key: RouteKey, route: _Route) -> None:
        nothing = Use((), 0, 0)
        uses = {name: report.uses.get(key, nothing) for name, report in self._reports.items()}
        limit = route.controller.limit
        shares = split(limit, [use.demand for use in uses.values()], self._ticks // TURN)
        shares = held_back(shares, [use.in_flight for use in uses.values()])
        safe = alone(limit, len(uses))
        for name, share in zip(uses, shares, strict=True):
            self._shares.setdefault(name, {})[key] = Share(share, safe)

    def _route(self, key: RouteKey) -> _Route:
        if key not in self._routes:
            bounds = self._policy.bounds.get(key, Bounds())
            self._routes[key] = _Route(Controller(bounds))
            self._changes.append(_change(key, None, self._routes[key].controller))
            self._share(key, self._routes[key])
        return self._routes[key]


def _change(key: RouteKey, old: int | None, controller: Controller) -> Event:
    detail = {"old": old, "new": controller.limit, "reason": controller.reason}
    return Event("limit", time.time(), model=key.model, endpoint=key.url, detail=json.dumps(detail))
