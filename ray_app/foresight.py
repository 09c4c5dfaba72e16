"""What the rest of a run will take and cost, with 90 % intervals, from measured tasks. Pure, seeded.

Wall time is simulated: durations are drawn for the tasks that are left and scheduled in their order on the
slots. A duration is its task's location (of its stratum, shrunk towards all by how much strata really
differ; or what a prior run says of this very task) times a residual. Residuals are those measured, and beyond
their upper tenth a lognormal tail: the last task sets the end, and it is longer than any of a small sample.
Each draw is of a resampled sample, so that what the sample itself may be wrong by is in the interval. A run
that meets what no measured task met (an endpoint that slows down under more load) is outside of this.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CONFIDENCE = 0.9
DRAWS = 400
FEWEST = 8  # measured tasks that a forecast is made from
TAIL = 0.1  # of the residuals, replaced by a tail
TAIL_FROM = 0.5  # residuals above this quantile say how steep the tail is
SMALL = 10  # a stratum with fewer measured tasks is one of the rest
# Of the logarithm of a task's duration from run to run, where nothing measures it.
ASSUMED_REPEAT = 0.3
SHORTEST_S = 1e-3


class Range(NamedTuple):
    """A 90 % interval and the middle."""

    low: float
    middle: float
    high: float

    def plus(self, known: float) -> Range:
        return Range(self.low + known, self.middle + known, self.high + known)


@dataclass(frozen=True)
class Sample:
    """Measured tasks: stratum, seconds, US dollars; seconds of the same task in a prior run, or NaN."""

    strata: Sequence[str]
    durations_s: Floats
    costs_usd: Floats
    priors_s: Floats

    def __len__(self) -> int:
        return len(self.strata)


@dataclass(frozen=True)
class Rest:
    """Tasks that are left, in the order in which they will start."""

    strata: Sequence[str]
    priors_s: Floats


@dataclass(frozen=True)
class Load:
    """A model's calls: how many of it are open per running task on average, and how many may be at most."""

    per_task: float
    limit: int


@dataclass(frozen=True)
class Place:
    """Where tasks run: slots for them, the longest that one may take (seconds), what bounds their calls."""

    slots: int
    longest_s: float | None = None
    loads: tuple[Load, ...] = ()


class Forecast(NamedTuple):
    """Of the tasks that are left; the wall time is from the first one's start to the last one's end."""

    wall_s: Range
    cost_usd: Range


def makespan_s(durations_s: Iterable[float], slots: int) -> float:
    """When the last task ends if each, in order, starts on the slot that is free first."""
    free = [0.0] * slots
    for duration_s in durations_s:
        heapq.heapreplace(free, free[0] + duration_s)
    return max(free)


def forecast(sample: Sample, rest: Rest, place: Place, seed: int = 0, draws: int = DRAWS) -> Forecast | None:
    """None where fewer than FEWEST tasks were measured."""
    if len(sample) < FEWEST or not rest.strata:
        return None
    rng = np.random.default_rng(seed)
    return Forecast(_wall(sample, rest, place, rng, draws), _cost(sample, rest, rng, draws))


def _levels(n: int) -> tuple[float, float]:
    """The quantiles of simulations from `n` tasks that hold CONFIDENCE between them.

    What has not been sampled is not resampled, so plain percentiles hold too little; they are expanded as
    Student's t is wider than the normal. What matters here are the largest values, so that n counts as TAIL
    of it. Source: T. C. Hesterberg, "What teachers should know about the bootstrap", Amer. Statist. 69 (2015)
    371-386, section 3.3.
    """
    count = max(2.0, n * TAIL)
    outside = float(ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - CONFIDENCE) / 2)))
    return outside, 1 - outside


# Wall time.


def _wall(sample: Sample, rest: Rest, place: Place, rng: np.random.Generator, draws: int) -> Range:
    codes, left = _codes(sample.strata, rest.strata)
    logs = np.log(np.maximum(sample.durations_s, SHORTEST_S))
    priors, ahead = (np.log(np.maximum(each, SHORTEST_S)) for each in (sample.priors_s, rest.priors_s))
    at = _locations(logs, codes, int(max(codes.max(), left.max())) + 1)
    is_pair, has_prior = ~np.isnan(priors), ~np.isnan(ahead)
    found = []
    for _ in range(draws):
        drawn = at.draw(rng)[left] + _residuals(_again(at.residuals, rng), len(left), rng)
        if has_prior.any():
            drawn[has_prior] = _repeated(logs[is_pair], priors[is_pair], ahead[has_prior], rng)
        seconds = np.exp(drawn)
        if place.longest_s is not None:
            seconds = np.minimum(seconds, place.longest_s)
        work = float(seconds.sum())
        bound = max((load.per_task * work / load.limit for load in place.loads), default=0.0)
        found.append(max(bound, makespan_s(seconds.tolist(), place.slots)))
    low, high = _levels(len(sample))
    return Range(*np.quantile(found, (low, 0.5, high)).tolist())


def _again(values: Floats, rng: np.random.Generator) -> Floats:
    """As many of them, with replacement."""
    return values[rng.integers(len(values), size=len(values))]


@dataclass(frozen=True)
class _Locations:
    """Of each stratum the logarithm of a typical duration and how far that may be off; what is left over.

    Residuals are spread as those of tasks not measured: the degrees of freedom that locations took are back.
    """

    means: Floats
    errors: Floats
    residuals: Floats

    def draw(self, rng: np.random.Generator) -> Floats:
        return self.means + self.errors * rng.standard_normal(len(self.means))


def _locations(logs: Floats, codes: Ints, size: int) -> _Locations:
    """The mean of each stratum, shrunk towards that of all by the ratio of the variances within and between.

    Source of the shrinkage: the one-way random effects model, its variances by moments (S. R. Searle,
    G. Casella, C. E. McCulloch, "Variance Components" (1992), chapters 3 and 7).
    """
    n, counts = len(logs), np.bincount(codes, minlength=size)
    whole, used = float(logs.mean()), int((counts > 0).sum())
    sums = np.bincount(codes, logs, minlength=size)
    means = np.divide(sums, counts, out=np.full(size, whole), where=counts > 0)
    within = float(logs.var())
    between = 0.0
    if 1 < used < n:
        within = float(((logs - means[codes]) ** 2).sum()) / (n - used)
        typical = (n - float((counts**2).sum()) / n) / (used - 1)
        between = max(0.0, (float((counts * (means - whole) ** 2).sum()) / (used - 1) - within) / typical)
    weight = counts * between / (counts * between + within) if within > 0 else np.zeros(size)
    found = weight * means + (1 - weight) * whole
    errors = np.sqrt(between * (1 - weight) + within / n)
    taken = 1 + float(weight.sum())
    return _Locations(found, errors, (logs - found[codes]) * np.sqrt(n / max(1.0, n - taken)))


def _residuals(measured: Floats, size: int, rng: np.random.Generator) -> Floats:
    """Draws from what was measured; in the upper TAIL from a normal tail that goes on beyond it.

    Its slope is that of the upper half against normal scores, so that it does not hang on the few longest.
    """
    ordered = np.sort(measured)
    n = len(ordered)
    at = (np.arange(1, n + 1) - 0.375) / (n + 0.25)
    uniform = rng.random(size)
    found = np.interp(uniform, at, ordered)
    upper = at >= TAIL_FROM
    slope = max(0.0, _slope(ndtri(at[upper]), ordered[upper]))
    is_tail = uniform > 1 - TAIL
    start = float(np.interp(1 - TAIL, at, ordered))
    found[is_tail] = start + slope * (ndtri(uniform[is_tail]) - ndtri(1 - TAIL))
    return found


def _slope(scores: Floats, values: Floats) -> float:
    """Of the least squares line."""
    spread = scores - scores.mean()
    return float((spread * (values - values.mean())).sum() / (spread**2).sum())


def _repeated(logs: Floats, priors: Floats, ahead: Floats, rng: np.random.Generator) -> Floats:
    """Tasks that a prior run measured: by the line through the pairs, else as they were, give or take."""
    n = len(logs)
    if n < FEWEST:
        shift = float((logs - priors).mean()) if n else 0.0
        return ahead + shift + rng.normal(0.0, ASSUMED_REPEAT, len(ahead))
    picked = rng.integers(n, size=n)
    logs, priors = logs[picked], priors[picked]
    slope = _slope(priors, logs) if priors.std() > 0 else 0.0
    off = (logs - logs.mean() - slope * (priors - priors.mean())) * np.sqrt(n / (n - 2))
    line: Floats = float(logs.mean()) + slope * (ahead - priors.mean())
    return line + _residuals(off, len(ahead), rng)


# Cost.


def _cost(sample: Sample, rest: Rest, rng: np.random.Generator, draws: int) -> Range:
    """The total of the tasks that are left: by strata, the interval by the bootstrap-t.

    Costs are skewed, so that the sample's mean is below the true one more often than above it, and its
    spread with it: the t form corrects that, where percentiles would not. To the variance of the means comes
    that of the tasks still to be drawn. Source: B. Efron, R. J. Tibshirani, "An Introduction to the
    Bootstrap" (1993), section 12.5, stratum by stratum.
    """
    codes, left = _codes(sample.strata, rest.strata, smallest=SMALL)
    groups = [sample.costs_usd[codes == code] for code in range(int(codes.max()) + 1)]
    sizes = np.bincount(left, minlength=len(groups)).astype(float)
    total, mean_error, drawn = 0.0, 0.0, 0.0
    totals, errors = np.zeros(draws), np.zeros(draws)
    for costs, size in zip(groups, sizes.tolist(), strict=True):
        n = len(costs)
        again = costs[rng.integers(n, size=(draws, n))]
        total += size * float(costs.mean())
        totals += size * again.mean(axis=1)
        if n > 1:
            mean_error += size**2 * float(costs.var(ddof=1)) / n
            errors += size**2 * again.var(axis=1, ddof=1) / n
            drawn += size * float(costs.var(ddof=1))
    spread = np.sqrt(errors)
    if mean_error == 0 or not (spread > 0).any():
        return Range(total, total, total)
    pivots = (totals[spread > 0] - total) / spread[spread > 0]
    low, high = np.quantile(pivots, _levels(len(sample))[::-1]).tolist()
    error = float(np.sqrt(mean_error + drawn))
    return Range(max(0.0, total - low * error), total, total - high * error)


def _codes(measured: Sequence[str], left: Sequence[str], smallest: int = 1) -> tuple[Ints, Ints]:
    """Strata as numbers, for the measured tasks and for those left; too small ones are one together.

    Where that one is too small itself, or has no measured task, it is one with all others.
    """
    counts = dict.fromkeys(sorted({*measured, *left}), 0)
    for name in measured:
        counts[name] += 1
    kept = [name for name, count in counts.items() if count >= smallest]
    others = sum(count for count in counts.values() if count < smallest)
    if len(kept) < len(counts) and others < smallest and smallest > 1:
        kept = []  # nothing to learn from for some of them
    place = {name: number for number, name in enumerate(kept)}
    found = [np.array([place.get(name, len(kept)) for name in names], np.int64) for names in (measured, left)]
    return found[0], found[1]
