"""Runs in virtual time whose every duration and price is known: tasks of several categories, lognormal or
not, and a prior run of the same tasks. Order, sample and forecast are the product's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_app import foresight, ordering, planning
from ray_app.foresight import Place, Range, Rest, Sample
from ray_app.ordering import Asked, Durations
from ray_app.records import Task

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Floats]

# Shares of the categories, unequal as a benchmark's are; and of the answers that are multiple choice.
CATEGORIES = (0.41, 0.12, 0.11, 0.10, 0.09, 0.07, 0.06, 0.04)
CHOICE = 0.24
CATEGORY_SPREAD = 0.3  # of the logarithm of a duration, between categories
MEDIAN_S = 60.0


def normal(rng: np.random.Generator, size: int) -> Floats:
    return rng.standard_normal(size)


@dataclass(frozen=True)
class Shape:
    """How durations spread around their category's: `sigma` times unit noise in the logarithm.

    A prior run of the same tasks shares `correlation` of the noise's variance with this one.
    """

    sigma: float = 0.7
    correlation: float = 0.7
    noise: Noise = normal


@dataclass(frozen=True)
class World:
    """Tasks with what each takes (s) and costs (US dollars), and what it took in the prior run."""

    tasks: tuple[Task, ...]
    durations_s: Mapping[str, float]
    costs_usd: Mapping[str, float]
    priors: Durations

    def takes(self, items: Sequence[planning.WorkItem]) -> list[float]:
        return [self.durations_s[item.task.rollout_key] for item in items]

    def makespan_s(self, asked: Asked, slots: int) -> float:
        """Of the whole run, all at once."""
        work = ordering.arranged(planning.plan(self.tasks, 1, []), self.tasks, asked, self._known(asked))
        return foresight.makespan_s(self.takes(work.items), slots)

    def _known(self, asked: Asked) -> Durations:
        return Durations() if asked.durations_from is None else self.priors


class Told(NamedTuple):
    """What was foretold of the rest after a pilot, and what came."""

    wall_s: Range
    cost_usd: Range
    actual_s: float
    actual_usd: float

    @property
    def holds_wall(self) -> bool:
        return self.wall_s.low <= self.actual_s <= self.wall_s.high

    @property
    def holds_cost(self) -> bool:
        return self.cost_usd.low <= self.actual_usd <= self.cost_usd.high


def world(seed: int, count: int, shape: Shape) -> World:
    rng = np.random.default_rng(seed)
    shares = np.array(CATEGORIES) / sum(CATEGORIES)
    of = rng.choice(len(shares), size=count, p=shares)
    is_choice = rng.random(count) < CHOICE
    level = rng.normal(0.0, CATEGORY_SPREAD, len(shares))[of] - 0.2 * is_choice
    own, now, then = (shape.noise(rng, count) for _ in range(3))
    kept, fresh = np.sqrt(shape.correlation), np.sqrt(1 - shape.correlation)
    seconds, before = (
        MEDIAN_S * np.exp(level + shape.sigma * (kept * own + fresh * each)) for each in (now, then)
    )
    costs = 0.002 * seconds**0.8 * rng.lognormal(0.0, 0.5, count)
    tasks = tuple(
        Task(
            f"t{n}",
            f"question {n} " + "x" * int(rng.integers(500)),
            "",
            "multipleChoice" if is_choice[n] else "exactMatch",
            category=f"category {of[n]}",
        )
        for n in range(count)
    )
    keys = [task.rollout_key for task in tasks]
    by_key = [dict(zip(keys, each.tolist(), strict=True)) for each in (seconds, costs, before)]
    return World(tasks, by_key[0], by_key[1], Durations(by_key[2]))


def after_pilot(found: World, size: int, slots: int, seed: int, *, with_prior: bool = False) -> Told:
    """A pilot of `size` tasks, the forecast from it, then the rest."""
    asked, known = Asked(pilot=size, seed=seed), found.priors if with_prior else Durations()
    work = ordering.arranged(planning.plan(found.tasks, 1, []), found.tasks, asked, known)
    rows = [_row(item.task) for item in work.items]
    left = planning.plan(found.tasks, 1, rows)
    left = ordering.arranged(left, found.tasks, Asked(), known)
    keys = [item.task.rollout_key for item in work.items]
    sample = Sample(
        [ordering.stratum(item.task) for item in work.items],
        np.array(found.takes(work.items)),
        np.array([found.costs_usd[key] for key in keys]),
        _priors(work.items, known),
    )
    rest = Rest([ordering.stratum(item.task) for item in left.items], _priors(left.items, known))
    told = foresight.forecast(sample, rest, Place(slots), seed)
    if told is None:
        raise RuntimeError(f"a pilot of {size} tasks is too small to tell from")
    actual_usd = sum(found.costs_usd[item.task.rollout_key] for item in left.items)
    return Told(*told, foresight.makespan_s(found.takes(left.items), slots), actual_usd)


def _priors(items: Sequence[planning.WorkItem], known: Durations) -> Floats:
    return np.array([known.of(item.task) or np.nan for item in items])


def _row(task: Task) -> dict[str, Any]:
    keys = {"rollout_key": task.rollout_key, "judge_key": task.judge_key, "trial": 0, "attempt": 1}
    return {**keys, "outcome": "ok", "error_kind": None}
