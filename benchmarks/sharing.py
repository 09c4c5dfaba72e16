"""Runs that share an endpoint which thrashes in silence: `python -m benchmarks.sharing`.

Virtual time, with governors as drivers have them and the decision that the actor of a cluster makes
(`thrash_runs.py`): how even the work is shared, and how near all runs together come to the best fixed limit.
Beside it each run with a decision of its own, as runs on different clusters still are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, NamedTuple

import typer

from benchmarks import thrash
from benchmarks.concurrency import FIRST_DRAW, WITHIN
from benchmarks.figures import Figure, report, told
from benchmarks.thrash_runs import Part, Played, Scene, apart, play

# The smaller of two shares: an even one is 0.5.
FAIR = 0.4
STARTS = ((64, 64), (8, 256))
CHANGE_S = 1200.0
# After a change of the runs, before it is judged: their calls drain, and the limit is looked for again.
SETTLING_S = 120.0
END_S = 3600.0
LITTLE = 3


@dataclass(frozen=True)
class Sizes:
    calls: int
    seeds: int
    draws: int


FULL = Sizes(6000, 3, 20)
QUICK = Sizes(6000, 1, 2)


class Late(NamedTuple):
    """Of the second half of the calls: the smaller share of the work, and its rate over the best one."""

    fair: float
    of_best: float


def late(curve: thrash.Curve, scene: Scene, calls: int, seed: int) -> Late:
    played = play(curve, scene, calls=calls, seed=seed)
    begin_s, end_s = played.done[calls // 2].at_s, played.done[-1].at_s
    rate = played.rate(begin_s, end_s) / thrash.best(curve).rate
    return Late(min(played.shares(begin_s, end_s)), rate)


def measure(sizes: Sizes) -> Iterator[Figure]:
    yield from _pairs(sizes)
    yield from _drawn_pairs(sizes)
    for name, curve in thrash.CURVES.items():
        yield from _changes(name, curve)
    refused = late(thrash.SEED, Scene([Part(8), Part(256)], capacity=96), sizes.calls, 1)
    yield Figure("refused beyond 96 open, from 8 and 256: smaller share", refused.fair, ">=", FAIR)


def _pairs(sizes: Sizes) -> Iterator[Figure]:
    for name, curve in thrash.CURVES.items():
        for starts in STARTS:
            scene = Scene([Part(start) for start in starts])
            label = f"{name}, two runs from {starts[0]} and {starts[1]}"
            seeds = range(1, sizes.seeds + 1)
            found = [late(curve, scene, sizes.calls, seed) for seed in seeds]
            yield Figure(f"{label}: smaller share, worst seed", min(one.fair for one in found), ">=", FAIR)
            yield Figure(f"{label}: of the best, worst seed", min(one.of_best for one in found), ">=", WITHIN)
            alone = [late(curve, apart(scene), sizes.calls, seed) for seed in seeds]
            yield Figure(f"{label}, each by itself: smaller share", min(one.fair for one in alone))
            yield Figure(f"{label}, each by itself: of the best", min(one.of_best for one in alone))


def _drawn(asked: tuple[int, int]) -> Late:
    seed, calls = asked
    return late(thrash.drawn(seed), Scene([Part(64), Part(64)]), calls, seed)


def _drawn_pairs(sizes: Sizes) -> Iterator[Figure]:
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(_drawn, [(FIRST_DRAW + n, sizes.calls) for n in range(sizes.draws)]))
    name = f"{sizes.draws} curves at random, two runs"
    yield Figure(f"{name}: smaller share, worst", min(one.fair for one in found), ">=", FAIR)
    yield Figure(f"{name}: of the best, median", median(one.of_best for one in found), ">=", WITHIN)
    yield Figure(f"{name}: of the best, worst", min(one.of_best for one in found))


def _changes(name: str, curve: thrash.Curve) -> Iterator[Figure]:
    """What happens to runs in mid-run; all from a limit of 8, near enough to be settled by then."""
    best = thrash.best(curve).rate
    after_s = CHANGE_S + SETTLING_S

    def played(*parts: Part, outage: tuple[float, float] = (math.inf, math.inf)) -> Played:
        return play(curve, Scene(parts, outage=outage), seconds=END_S, seed=1)

    came = played(Part(8), Part(256, begins_s=CHANGE_S))
    yield Figure(f"{name}, a second run comes: smaller share", min(came.shares(after_s, END_S)), ">=", FAIR)
    yield Figure(f"{name}, a second run comes: of the best", came.rate(after_s, END_S) / best, ">=", WITHIN)
    for word, is_killed in (("ends", False), ("is killed", True)):
        left = played(Part(8), Part(8, ends_s=CHANGE_S, is_killed=is_killed))
        yield Figure(
            f"{name}, one of two {word}: of the best", left.rate(after_s, END_S) / best, ">=", WITHIN
        )
    modest = played(Part(8), Part(8, callers=LITTLE))
    yield Figure(
        f"{name}, one wants {LITTLE}: of the best", modest.rate(CHANGE_S, END_S) / best, ">=", WITHIN
    )
    opened = [moment.opened[1] for moment in modest.moments if moment.at_s > CHANGE_S]
    yield Figure(f"{name}, one wants {LITTLE}: gets, on average", mean(opened), ">=", 0.9 * LITTLE)
    out = played(Part(8), Part(8), outage=(CHANGE_S, CHANGE_S + 60))
    most = max(sum(m.limits) for m in out.moments if CHANGE_S < m.at_s < CHANGE_S + 60)
    before = next(sum(m.limits) for m in out.moments if m.at_s >= CHANGE_S - 1)
    yield Figure(f"{name}, no answer for 60 s: limits, over those before", most / before, "<=", 1.0)
    yield Figure(f"{name}, no answer for 60 s: of the best then", out.rate(CHANGE_S, CHANGE_S + 60) / best)
    yield Figure(f"{name}, all forgotten: of the best", out.rate(after_s, END_S) / best, ">=", WITHIN)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer seeds and curves.")] = False,
) -> None:
    """Measure runs that share an endpoint."""
    raise typer.Exit(report(told(measure(QUICK if quick else FULL)), json))


if __name__ == "__main__":
    typer.run(main)
