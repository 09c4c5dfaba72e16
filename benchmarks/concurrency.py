"""How near the adaptive limit comes to the best fixed one, on engines that thrash in silence.

Breadth in virtual time (the controller alone, an engine of a few lines), the same over HTTP against a
server in a process of its own (governor, shares of two workers, slots, streams), `SPEED` times as fast as the
curves say. The first calls, in which the limit is found, are left out of the ratio and told beside it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import aiohttp
import typer

from benchmarks import thrash
from benchmarks.child import Child
from benchmarks.figures import Figure, report, told
from benchmarks.thrash_server import amount
from ray_app.allowance import Allowance
from ray_app.concurrency import Bounds
from ray_app.governor import Governor, Policy
from ray_app.slots import Ending, RouteKey, Sample, Slots

SPEED = 60.0  # seconds of a curve in one of the clock
WITHIN = 0.9
CALLERS = 640  # tasks that ask one call after the other
# A block of so many calls that is within a tenth of the best: found.
BLOCK = 250
# Curves of this draw were not seen while the controller was made.
FIRST_DRAW = 900_000
EPISODE_S = 10.0  # refused calls that are so far apart belong to two episodes


class Outcome(NamedTuple):
    """Work a second over the best fixed limit's: after learning, of the whole; calls until it was found."""

    settled: float
    whole: float
    found_after: int


@dataclass(frozen=True)
class Sizes:
    calls: int
    learning: int
    draws: int
    http_calls: int
    http_learning: int
    fixed_s: float
    http_draws: int


FULL = Sizes(15_000, 3_000, 50, 5_000, 3_000, 6.0, 2)
QUICK = Sizes(6_000, 3_000, 2, 600, 300, 1.0, 0)


def judged(ended_s: Sequence[float], works: Sequence[float], best: float, learning: int) -> Outcome:
    settled = sum(works[learning:]) / (ended_s[-1] - ended_s[learning - 1])
    found = next(
        (
            end
            for end in range(BLOCK, len(works), 50)
            if sum(works[end - BLOCK : end]) >= WITHIN * best * (ended_s[end - 1] - ended_s[end - BLOCK])
        ),
        len(works),
    )
    return Outcome(settled / best, sum(works) / ended_s[-1] / best, found)


def virtual(curve: thrash.Curve, start: int, sizes: Sizes, seed: int) -> Outcome:
    found = thrash.simulate(curve, start, sizes.calls, seed=seed, demand=lambda at: CALLERS)
    return judged(found.ended_s, found.works, thrash.best(curve)[1], sizes.learning)


def _drawn(asked: tuple[int, Sizes]) -> list[Outcome]:
    """From a limit of 1, from the best one, and from eight times the best."""
    seed, sizes = asked
    curve = thrash.drawn(seed)
    best, _ = thrash.best(curve)
    starts = (1, best, min(CALLERS, 8 * best))
    return [virtual(curve, start, sizes, seed) for start in starts]


@dataclass
class Load:
    """Two workers of a run, without Ray: slots and allowances, one governor, a clock that runs faster."""

    url: str
    bounds: Bounds
    callers: int
    ended_s: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)
    limits: list[tuple[float, int]] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.key = RouteKey("thrash", self.url)
        self.slots = {name: Slots() for name in ("a", "b")}
        self.governor = Governor(Policy({self.key: self.bounds}), workers=2, clock=self.clock)
        self.allowances = {
            name: Allowance({self.key: slots}, clock=self.clock) for name, slots in self.slots.items()
        }
        self._seeds = iter(range(10**9))

    def clock(self) -> float:
        return (time.monotonic() - self.began) * SPEED

    async def run(self, calls: int, until_s: float) -> None:
        """Until so many calls have ended, or so many seconds of the real clock have passed."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            governing = asyncio.create_task(self._govern())
            callers = [
                asyncio.create_task(self._caller(session, self.slots["ab"[n % 2]]))
                for n in range(self.callers)
            ]
            end = time.monotonic() + until_s
            while len(self.works) < calls and time.monotonic() < end:
                await asyncio.sleep(0.02)
                if failed := [task for task in (*callers, governing) if task.done()]:
                    failed[0].result()
            for task in (*callers, governing):
                task.cancel()
            await asyncio.gather(*callers, governing, return_exceptions=True)
        for allowance in self.allowances.values():
            allowance.close()

    async def _govern(self) -> None:
        """What the pool does once a second."""
        while True:
            for name, allowance in self.allowances.items():
                self.governor.hear(name, allowance.exchange(self.governor.grant(name), "here"))
            for _ in self.governor.tick():
                self.limits.append((self.clock(), self.governor.limits()[self.key]))
            await asyncio.sleep(1 / SPEED)

    async def _caller(self, session: aiohttp.ClientSession, slots: Slots) -> None:
        while True:
            seed = next(self._seeds)
            while not await self._call(session, slots, seed):
                pause_s = random.uniform(1, 3)
                await asyncio.sleep(pause_s / SPEED)

    async def _call(self, session: aiohttp.ClientSession, slots: Slots, seed: int) -> bool:
        await slots.acquire()
        began, ending, tokens = self.clock(), "cancelled", 0
        try:
            body = {"model": "thrash", "stream": True, "seed": seed}
            async with session.post(f"{self.url}/v1/chat/completions", json=body) as reply:
                text = await reply.text()
                ending = "ok" if reply.status == 200 else "congested"
            if ending == "congested":
                self.refused_s.append(self.clock())
                return False
            tokens = int(text.split('"completion_tokens": ')[1].split(",")[0])
            self.ended_s.append(self.clock())
            self.works.append(amount(seed))
            return True
        finally:
            duration_s = self.clock() - began
            told: Ending = "ok" if ending == "ok" else "congested" if ending == "congested" else "cancelled"
            slots.release(Sample(told, duration_s, completion_tokens=tokens))


def over_http(
    curve: str, bounds: Bounds, calls: int, until_s: float = 60.0, capacity: int | None = None
) -> Load:
    argument = {"curve": curve, "speed": SPEED, "capacity": capacity}
    with Child("benchmarks.thrash_server", argument) as child:
        load = Load(child.started().hello["url"], bounds, callers=CALLERS if capacity is None else 120)
        asyncio.run(load.run(calls, until_s))
        return load


def fixed_over_http(curve: str, sizes: Sizes) -> float:
    """Work a second of the best fixed limit, measured as the adaptive one is: its second half."""
    known = thrash.CURVES[curve] if curve in thrash.CURVES else thrash.drawn(int(curve))
    level, _ = thrash.best(known)
    load = over_http(curve, Bounds(level, level, level), 10**9, sizes.fixed_s)
    half = len(load.works) // 2
    return sum(load.works[half:]) / (load.ended_s[-1] - load.ended_s[half - 1])


def measure(sizes: Sizes) -> Iterator[Figure]:
    yield from _virtual_figures(sizes)
    yield from _http_figures(sizes)
    yield from _episode_figures(sizes)


def _virtual_figures(sizes: Sizes) -> Iterator[Figure]:
    for name, curve in thrash.CURVES.items():
        level, rate = thrash.best(curve)
        yield Figure(f"{name}: best fixed limit (calls a second at {rate:.2f})", level)
        for start in (1, level, 512):
            found = virtual(curve, start, sizes, start)
            yield Figure(f"{name}, virtual time, from {start}: of the best", found.settled, ">=", WITHIN)
            yield Figure(f"{name}, virtual time, from {start}: whole run", found.whole)
            yield Figure(f"{name}, virtual time, from {start}: found after", found.found_after, unit="calls")
    with ProcessPoolExecutor(2) as pool:
        asked = [(FIRST_DRAW + n, sizes) for n in range(sizes.draws)]
        outcomes = [outcome for group in pool.map(_drawn, asked) for outcome in group]
    ratios = [outcome.settled for outcome in outcomes]
    name = f"{sizes.draws} curves at random x 3 starts, virtual time"
    yield Figure(f"{name}: worst, of the best", min(ratios), ">=", WITHIN)
    yield Figure(f"{name}: share within a tenth", sum(r >= WITHIN for r in ratios) / len(ratios), ">=", 0.95)
    yield Figure(f"{name}: median, of the best", median(ratios))
    yield Figure(f"{name}: whole run, median", median(outcome.whole for outcome in outcomes))
    yield Figure(f"{name}: whole run, worst", min(outcome.whole for outcome in outcomes))
    yield Figure(f"{name}: found after, median", median(o.found_after for o in outcomes), unit="calls")
    yield Figure(f"{name}: found after, worst", max(o.found_after for o in outcomes), unit="calls")


def _http_figures(sizes: Sizes) -> Iterator[Figure]:
    target = WITHIN if sizes.http_draws else 0.0
    named = [(name, start) for name, start in zip(thrash.CURVES, (512, 64, 1), strict=True)]
    drawn = [(str(FIRST_DRAW + n), 64) for n in range(sizes.http_draws)]
    for name, start in named[: None if sizes.http_draws else 1] + drawn:
        best = fixed_over_http(name, sizes)
        load = over_http(name, Bounds(start=start), sizes.http_calls)
        found = judged(load.ended_s, load.works, best, min(sizes.http_learning, len(load.works) // 2))
        label = f"{name}, HTTP, from {start}"
        yield Figure(f"{label}: best fixed limit, work a second", best)
        yield Figure(f"{label}: of the best", found.settled, ">=", target)
        yield Figure(f"{label}: whole run", found.whole)
        yield Figure(f"{label}: found after", found.found_after, unit="calls")


def _episode_figures(sizes: Sizes) -> Iterator[Figure]:
    capacity = 50
    bounds = Bounds(start=64, most=64)  # three quarters of which the server bears
    load = over_http("seed 32/64/128", bounds, sizes.http_calls // 2, capacity=capacity)
    decreases = [at for (_, old), (at, new) in pairwise(load.limits) if new < old]
    episodes = [at for before, at in pairwise([-1e9, *load.refused_s]) if at - before > EPISODE_S]
    yield Figure("429 beyond 50 open, HTTP: episodes of refused calls", len(episodes), ">=", 1)
    yield Figure("429 beyond 50 open, HTTP: decreases an episode", len(decreases) / len(episodes), "<=", 1)
    yield Figure("429 beyond 50 open, HTTP: calls refused, of all", len(load.refused_s) / len(load.works))
    best = thrash.SEED(capacity)
    late = len(load.works) // 2
    rate = sum(load.works[late:]) / (load.ended_s[-1] - load.ended_s[late - 1])
    yield Figure("429 beyond 50 open, HTTP: work a second, of that at 50", rate / best)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="A few seconds; judges no HTTP run.")] = False,
) -> None:
    """Measure the adaptive limit beside the best fixed one."""
    raise typer.Exit(report(told(measure(QUICK if quick else FULL)), json))


if __name__ == "__main__":
    typer.run(main)
