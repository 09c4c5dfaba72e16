"""A worker's side of the limits: what it was granted, what it reports, what it does when it hears nothing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping

from ray_app.quotas import Grant, Use, WorkerReport
from ray_app.slots import RouteKey, Slots

# A worker that has heard nothing for so long takes the share that is safe whatever the others have.
LEASE_S = 5.0
# An answer to another worker is told of so much later at most; it must not seem younger than it is.
HEARSAY_S = 10.0


class Allowance:
    """For one event loop. `slots` may be empty: a solver without a model client is bounded by nobody."""

    def __init__(
        self,
        slots: Mapping[RouteKey, Slots],
        *,
        open_calls: Callable[[], int] = lambda: 0,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self._open_calls, self._lease_s, self._clock = slots, open_calls, lease_s, clock
        self._grant = Grant()
        self._heard_s = clock()
        self.spent_usd = 0.0
        self._watching: asyncio.Task[None] | None = None

    @property
    def may_spend(self) -> bool:
        return self._grant.may_spend

    @property
    def may_fail(self) -> bool:
        """Whether what ends badly now counts: not once the run is about to stop, for want of money or of an
        endpoint."""
        return self.may_spend and not any(slots.away for slots in self._slots.values())

    def exchange(self, grant: Grant, node: str) -> WorkerReport:
        """Take what is granted from now on; what has happened since the last time."""
        uses = {key: use_of(slots) for key, slots in self._slots.items()}
        # A call that waits for its place has not gone out.
        open_calls = max(0, self._open_calls() - sum(use.waiting for use in uses.values()))
        report = WorkerReport(node, uses, self.spent_usd, open_calls, not self.may_spend)
        self._grant, self._heard_s = grant, self._clock()
        for key, age_s in grant.answered.items():
            if slots := self._slots.get(key):
                slots.answered_at = max(slots.answered_at, self._clock() - age_s - HEARSAY_S)
        self._apply(is_alone=False)
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        return report

    def _apply(self, *, is_alone: bool) -> None:
        for key, slots in self._slots.items():
            share = self._grant.shares.get(key)
            if not self.may_spend:
                slots.limit = 0
            elif share is not None:
                slots.limit = min(share) if is_alone else share.now
            else:
                slots.limit = math.inf

    def check(self) -> None:
        """Fall back where the driver is silent: it may be dead, or may have shared out anew."""
        if self._clock() - self._heard_s > self._lease_s:
            self._apply(is_alone=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 5)
            self.check()

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()


def use_of(slots: Slots) -> Use:
    counts = slots.in_flight, slots.waiting, slots.pausing
    return Use(slots.take(), *counts, slots.refusal, slots.denial, slots.away)
