"""What order is worth, and how often a forecast holds: `python -m benchmarks.scheduling`.

Virtual time, but order, sample and forecast are the product's own (`scheduling_world.py`); then one real run
through the engine (pilot, forecast, rest) with a solver that only takes its time. Judged: lognormal durations
(sigma 0.7), 2,500 tasks, 512 at once, a pilot of 5 %, a prior run whose logarithms correlate by 0.7. Other
shapes stand beside that. `--quick` is smaller and judges nothing.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from benchmarks.figures import Figure, report
from benchmarks.scheduling_run import real
from benchmarks.scheduling_world import Floats, Shape, Told, after_pilot, world
from ray_app.ordering import Asked

# Seeds from here on were not seen while the forecast was made.
FIRST_SEED = 10_000
LONGEST_FIRST = Asked(durations_from=Path("prior"))


def of_gamma(rng: np.random.Generator, size: int) -> Floats:
    """Logarithms of gamma durations of shape 2."""
    return np.asarray(np.log(rng.gamma(2.0, 1.0, size)), np.float64)


def of_two_kinds(rng: np.random.Generator, size: int) -> Floats:
    """One task in ten takes eight times as long."""
    is_long = rng.random(size) < 0.1
    return np.asarray(0.4 * rng.standard_normal(size) + np.log(8.0) * is_long, np.float64)


def of_pareto(rng: np.random.Generator, size: int) -> Floats:
    """Logarithms of Pareto durations, whose tail is heavier than any lognormal's."""
    return rng.exponential(1.0, size)


JUDGED = Shape()
OTHERS = {
    "sigma 0.5": Shape(0.5),
    "sigma 1.0": Shape(1.0),
    "gamma": Shape(1.0, 0.0, of_gamma),
    "one in ten eight times as long": Shape(1.0, 0.0, of_two_kinds),
    "Pareto, index 3": Shape(1 / 3, 0.0, of_pareto),
}


@dataclass(frozen=True)
class Sizes:
    tasks: int
    slots: int
    seeds: int  # of the judged figures
    more: int  # seeds for the coverage
    others: int  # seeds for each other shape
    real_tasks: int
    real_slots: int
    real_mean_s: float

    @property
    def pilot(self) -> int:
        return self.tasks // 20


FULL = Sizes(2500, 512, 20, 300, 60, 600, 64, 1.0)
QUICK = Sizes(600, 120, 4, 4, 2, 0, 0, 0.0)


def ratio(sizes: Sizes, shape: Shape, seed: int) -> float:
    """Makespan of longest first by the prior run over that of a random order."""
    found = world(seed, sizes.tasks, shape)
    random = found.makespan_s(Asked(is_shuffled=True, seed=seed), sizes.slots)
    return found.makespan_s(LONGEST_FIRST, sizes.slots) / random


def told(sizes: Sizes, shape: Shape, with_prior: bool, seed: int) -> Told:
    return after_pilot(world(seed, sizes.tasks, shape), sizes.pilot, sizes.slots, seed, with_prior=with_prior)


def _seeds(count: int) -> range:
    return range(FIRST_SEED, FIRST_SEED + count)


def order_figures(sizes: Sizes, pool: ProcessPoolExecutor) -> Iterator[Figure]:
    at = f"{sizes.tasks:,} tasks, {sizes.slots} at once"
    for shape in (JUDGED, Shape(0.5, 0.7), Shape(0.7, 0.5), Shape(0.7, 0.9), Shape(1.0, 0.7)):
        ratios = list(pool.map(partial(ratio, sizes, shape), _seeds(sizes.seeds)))
        name = f"makespan, longest first / random, {at}, sigma {shape.sigma}, correlation {shape.correlation}"
        judged = shape == JUDGED
        yield Figure(f"{name}: median", median(ratios), "<=" if judged else None, 0.9 if judged else None)
        yield Figure("  worst of the seeds", max(ratios))


def forecast_figures(sizes: Sizes, pool: ProcessPoolExecutor) -> Iterator[Figure]:
    found = list(pool.map(partial(told, sizes, JUDGED, False), _seeds(sizes.more), chunksize=4))
    first = found[: sizes.seeds]
    needed = 0.85 * len(first)
    name = f"of {len(first)} runs after a pilot of {sizes.pilot}: within the 90 % interval"
    yield Figure(f"{name}, wall time", sum(one.holds_wall for one in first), ">=", needed)
    yield Figure(f"{name}, cost", sum(one.holds_cost for one in first), ">=", needed)
    yield from _coverage(f"{len(found)} runs", found)
    yield Figure("  width of the interval of the wall time / what came, median", _width(found))
    priors = list(pool.map(partial(told, sizes, JUDGED, True), _seeds(sizes.others), chunksize=4))
    yield from _coverage(f"{len(priors)} runs, longest first by a prior run", priors)
    yield Figure("  width of the interval of the wall time / what came, median", _width(priors))
    for label, shape in OTHERS.items():
        others = list(pool.map(partial(told, sizes, shape, False), _seeds(sizes.others), chunksize=4))
        yield from _coverage(f"{len(others)} runs, {label}", others)


def _coverage(name: str, found: list[Told]) -> Iterator[Figure]:
    yield Figure(
        f"{name}: wall time within", 100 * sum(one.holds_wall for one in found) / len(found), unit="%"
    )
    yield Figure(f"{name}: cost within", 100 * sum(one.holds_cost for one in found) / len(found), unit="%")


def _width(found: list[Told]) -> float:
    return median((one.wall_s.high - one.wall_s.low) / one.actual_s for one in found)


def measure(sizes: Sizes) -> Iterator[Figure]:
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield from order_figures(sizes, pool)
        yield from forecast_figures(sizes, pool)
    if sizes.real_tasks:
        with tempfile.TemporaryDirectory(prefix="bench-scheduling-") as folder:
            yield from asyncio.run(real(Path(folder), sizes.real_tasks, sizes.real_slots, sizes.real_mean_s))


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="A few seconds; judges nothing.")] = False,
) -> None:
    """Measure order and forecast."""
    figures = []
    for figure in measure(QUICK if quick else FULL):
        shown = replace(figure, op=None, target=None) if quick else figure
        print(shown.line, flush=True)
        figures.append(shown)
    raise typer.Exit(report(figures, json))


if __name__ == "__main__":
    typer.run(main)
