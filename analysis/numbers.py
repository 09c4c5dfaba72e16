"""Statistics of a run as pure functions: numbers in, numbers out.

Refuses non-finite values (ValueError): a NaN here would spread silently into every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ray_app.records import Outcome

PERCENTILES = (1, 10, 25, 40, 50, 75, 80, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of a proportion, as fractions."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """`describe`'s answer, in the unit of the values; every field but `n` is None where n is 0."""

    n: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    p1: float | None = None
    p10: float | None = None
    p25: float | None = None
    p40: float | None = None
    p50: float | None = None
    p75: float | None = None
    p80: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None
    share_under_5s: float | None = None


@dataclass(frozen=True, slots=True)
class Histogram:
    """`bins + 1` edges, and per bin the count and its percent of all values."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    percent: tuple[float, ...]


class Counted(NamedTuple):
    """What accounting needs to know of a counted result."""

    outcome: Outcome
    is_correct: bool | None


@dataclass(frozen=True, slots=True)
class Accounting:
    """planned = ok + failed + limited + owed + pending; `correct` is a part of `ok`.

    `accuracy` (a fraction), its Wilson `interval` and its `wald` interval are over all planned; None where
    nothing is planned.
    """

    planned: int
    ok: int
    failed: int
    limited: int
    owed: int
    pending: int
    correct: int
    accuracy: float | None
    interval: Interval | None
    wald: Interval | None


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a proportion; (0, 1) for n = 0.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    J. Amer. Statist. Assoc. 22 (1927) 209-212; without continuity correction.
    """
    z = _quantile(successes, n, confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The bounds are exact at the ends; rounding would leave 1e-18 there.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(low, high)


def wald_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """p +- z * sqrt(p (1 - p) / n), the "+-" that most papers print; (0, 1) for n = 0.

    Not clipped: it can leave [0, 1] and has no width at p = 0 or 1, which is why summaries print Wilson's.
    Source: the normal approximation, e.g. L. D. Brown, T. T. Cai, A. DasGupta, "Interval estimation for a
    binomial proportion", Statist. Sci. 16 (2001) 101-133, section 1.
    """
    z = _quantile(successes, n, confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    p = successes / n
    half = z * math.sqrt(p * (1 - p) / n)
    return Interval(p - half, p + half)


def pass_hat_k(trials: int, successes: int, k: int) -> float:
    """The chance that k of a task's trials, drawn without return, all succeed: a ratio of binomials.

    tau-bench's pass^k (arXiv:2406.12045) is its mean over tasks. Raises ValueError unless 1 <= k <= trials.
    """
    if not 1 <= k <= trials or not 0 <= successes <= trials:
        raise ValueError(
            f"pass^{k} of {successes} in {trials}: expected 1 <= k <= trials and at most that many"
        )
    return math.comb(successes, k) / math.comb(trials, k)


def describe(values: ArrayLike, five_seconds: float | None = 5.0) -> Summary:
    """Moments and percentiles of a flat list of numbers.

    `std` has ddof 1 (0 for a single value). `five_seconds` is what 5 s is in the unit of the values; None
    where they are no durations.
    """
    numbers = ordered(values)
    if numbers.size == 0:
        return Summary(n=0)
    points = dict(zip(PERCENTILES, quantiles(numbers, [p / 100 for p in PERCENTILES]).tolist(), strict=True))
    under = None if five_seconds is None else int(np.searchsorted(numbers, five_seconds))
    return Summary(
        n=int(numbers.size),
        mean=float(numbers.mean()),
        std=float(numbers.std(ddof=1)) if numbers.size > 1 else 0.0,
        min=float(numbers[0]),
        max=float(numbers[-1]),
        share_under_5s=None if under is None else under / numbers.size,
        **{f"p{percent}": value for percent, value in points.items()},
    )


def quantiles(values: ArrayLike, fractions: ArrayLike) -> NDArray[np.float64]:
    """The values below which these fractions of `values` lie; values must not be empty.

    Interpolates linearly between order statistics: numpy's default, definition 7 of R. J. Hyndman, Y. Fan,
    "Sample quantiles in statistical packages", Amer. Statist. 50 (1996) 361-365.
    """
    numbers = ordered(values)
    places = np.asarray(fractions, dtype=np.float64) * (numbers.size - 1)
    below = np.floor(places).astype(np.int64)
    low, high = numbers[below], numbers[np.minimum(below + 1, numbers.size - 1)]
    found: NDArray[np.float64] = low + (places - below) * (high - low)
    return found


def linear_histogram(values: ArrayLike, bins: int = 10) -> Histogram | None:
    """Equal-width bins from the smallest to the largest value; None where there are no values.

    Bins are half-open, the last one closed. Equal values all fall into the first of `bins` bins that
    together are 1e-9 wide (wider where a float could not tell their edges apart).
    """
    numbers = ordered(values)
    if numbers.size == 0:
        return None
    low, high = float(numbers[0]), float(numbers[-1])
    if high == low:
        high = low + max(1e-9, 2 * bins * float(np.spacing(abs(low))))
    return _histogram(numbers, np.linspace(low, high, bins + 1))


def log_histogram(values: ArrayLike, bins: int = 10) -> Histogram | None:
    """Geometric bins from the smallest positive value to the largest; None where no value is positive.

    Values of zero or less are counted in the first bin. Where all positive values are equal, the bins
    reach up to ten times that value.
    """
    numbers = ordered(values)
    positive = numbers[np.searchsorted(numbers, 0.0, side="right") :]
    if positive.size == 0:
        return None
    low, high = float(positive[0]), float(positive[-1])
    return _histogram(numbers, np.geomspace(low, high if high > low else low * 10, bins + 1))


def ordered(values: ArrayLike) -> NDArray[np.float64]:
    """`values` as sorted doubles; those that are sorted already are returned as they are.

    What is asked several questions is sorted once, by this.
    """
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(numbers).all():
        raise ValueError("values hold NaN or infinity; expected finite numbers")
    return numbers if bool((numbers[:-1] <= numbers[1:]).all()) else np.sort(numbers)


def accounting(results: Iterable[Counted], planned: int) -> Accounting:
    """Where every planned task is. Limited, failed, owed and pending ones count as not correct.

    Raises ValueError where there are more results than planned: then one of the two is wrong.
    """
    rows = list(results)
    count = {name: sum(row.outcome == name for row in rows) for name in ("ok", "failed", "limited", "owed")}
    pending = planned - sum(count.values())
    if pending < 0:
        raise ValueError(
            f"{planned - pending} results for {planned} planned tasks; expected no more than planned"
        )
    correct = sum(row.outcome == "ok" and row.is_correct is True for row in rows)
    return Accounting(
        planned=planned,
        pending=pending,
        correct=correct,
        accuracy=correct / planned if planned else None,
        interval=wilson_interval(correct, planned) if planned else None,
        wald=wald_interval(correct, planned) if planned else None,
        **count,
    )


def _quantile(successes: float, n: float, confidence: float) -> float:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}; expected 0 <= successes <= n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}; expected a fraction between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _histogram(numbers: NDArray[np.float64], edges: NDArray[np.float64]) -> Histogram:
    """Of sorted numbers; what lies outside of the edges counts in the bin at that end."""
    inner = np.searchsorted(numbers, edges[1:-1], side="left")
    counts = np.diff(np.concatenate([[0], inner, [numbers.size]]))
    return Histogram(
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        percent=tuple((100 * counts / numbers.size).tolist()),
    )
