"""Statistics of two runs over the same tasks: numbers in, numbers out.

The unit is the task: where it was tried several times, its trials are averaged first, so that they count as
one observation and not as several independent ones. A difference is second minus first, a ratio second
over first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from analysis.numbers import Interval

ALPHA = 0.05
POWER = 0.8
# Above so many points of its lattice the distribution of a sum is taken as normal.
MOST_POINTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of `n` tasks: its interval, the two-sided p of no difference, what `n` can detect.

    `discordance` is the mean squared difference: with one trial, the share of tasks whose outcome changed.
    `interval`, `p_value` and `detectable` are None where there is nothing to compute them from.
    """

    n: int
    mean: float | None
    interval: Interval | None
    p_value: float | None
    discordance: float | None
    detectable: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio over `n` tasks with its interval; None where it has none (no task, or one alone)."""

    n: int
    ratio: float | None
    interval: Interval | None


def difference(values: Sequence[Fraction]) -> Difference:
    """All figures of the tasks' differences, each between -1 and 1."""
    n = len(values)
    if n == 0:
        return Difference(0, None, None, None, None, None)
    discordance = float(sum(value * value for value in values) / n)
    return Difference(
        n,
        float(sum(values) / n),
        difference_interval([float(value) for value in values]),
        randomisation_p(values),
        discordance,
        detectable_difference(n, discordance),
    )


def difference_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The adjusted Wald interval of a mean difference of paired proportions; (-1, 1) without pairs.

    One task is added that got better and one that got worse, which keeps the interval honest where few or
    none differ. Source: D. G. Bonett, R. M. Price, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data", J. Educ. Behav. Stat. 37 (2012) 479-488; recommended by
    M. W. Fagerland, S. Lydersen, P. Laake, Statist. Med. 33 (2014) 2850-2875. Values that are means over
    trials take the place of the paper's -1, 0 and 1: the variance is that of the task means.
    """
    n = len(values) + 2
    mean = sum(values) / n
    variance = (sum(value * value for value in values) + 2) / n - mean * mean
    half = _z(confidence) * math.sqrt(variance / n)
    return Interval(max(-1.0, mean - half), min(1.0, mean + half))


def randomisation_p(values: Sequence[Fraction]) -> float:
    """The exact two-sided p of "no difference": how often random signs give a sum as far from zero.

    With one trial a task this is the exact McNemar test. Sources: Q. McNemar, Psychometrika 12 (1947)
    153-157; E. J. G. Pitman, "Significance tests which may be applied to samples from any populations",
    J. R. Statist. Soc. Suppl. 4 (1937) 119-130. Exact to about 1e-14, by the characteristic function of the
    sum, the product of cos(d t); normal where the values have too many different denominators for that.
    """
    differing = [abs(value) for value in values if value]
    if not differing:
        return 1.0
    scale = math.lcm(*(value.denominator for value in differing))
    sizes = Counter(int(value * scale) for value in differing)
    observed, reach = abs(int(sum(values) * scale)), sum(size * n for size, n in sizes.items())
    if len(sizes) == 1:
        ((size, n),) = sizes.items()
        return _sign_test_p(n, observed // size)
    if 2 * reach + 1 > MOST_POINTS:
        spread = math.sqrt(sum(size * size * n for size, n in sizes.items()))
        return 2 * NormalDist().cdf(-observed / spread)
    points = 2 * reach + 1
    angles = 2 * np.pi * np.arange(points) / points
    transform = np.ones(points)
    for size, n in sizes.items():
        transform *= np.cos(size * angles) ** n
    chances = np.fft.fft(transform).real / points  # the chance of the sum s stands at s modulo `points`
    tail = float(chances[max(observed, 1) : reach + 1].sum())
    return min(1.0, max(2 * tail + (0.0 if observed else float(chances[0])), 2.0 ** (1 - len(differing))))


def _sign_test_p(n: int, lead: int) -> float:
    """P(|heads - tails| >= lead) of `n` fair coins, in whole numbers to the last division."""
    if lead == 0:
        return 1.0
    above = sum(math.comb(n, heads) for heads in range((n + lead) // 2, n + 1))
    return float(Fraction(2 * above, 1 << n))


def detectable_difference(
    n: int, discordance: float, power: float = POWER, alpha: float = ALPHA
) -> float | None:
    """The smallest true difference that `n` tasks show with `power`, at the discordance observed.

    Solves n d^2 = (z(1 - alpha/2) sqrt(psi) + z(power) sqrt(psi - d^2))^2 for d. None where no difference
    that this discordance allows (at most all of it in one direction) would be found. Source: R. J. Connor,
    "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43 (1987)
    207-211.
    """
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    under_root = n - z_alpha**2 + z_power**2
    if discordance <= 0 or under_root < 0:
        return None
    found = math.sqrt(discordance) * (z_alpha * math.sqrt(n) + z_power * math.sqrt(under_root))
    found /= n + z_power**2
    return found if found <= discordance else None


def geometric_ratio(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Ratio:
    """The geometric mean of second over first, task by task, with Student's interval of the mean log.

    Every task weighs the same. Tasks in which either is not positive are left out.
    """
    kept = _positive(first, second)
    n = len(kept)
    if n == 0:
        return Ratio(0, None, None)
    logs = np.log(kept[:, 1]) - np.log(kept[:, 0])
    mean = float(logs.mean())
    if n == 1:
        return Ratio(1, math.exp(mean), None)
    half = _t(n - 1, confidence) * float(logs.std(ddof=1)) / math.sqrt(n)
    return Ratio(n, math.exp(mean), Interval(math.exp(mean - half), math.exp(mean + half)))


def ratio_of_totals(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Ratio:
    """The total of second over that of first: what the bill did. Long and dear tasks weigh most.

    The interval is Student's on the log of the ratio, its variance linearised. Source: W. G. Cochran,
    "Sampling Techniques", 3rd ed. (1977), section 6.4. Over the same tasks as `geometric_ratio`.
    """
    kept = _positive(first, second)
    n = len(kept)
    if n == 0:
        return Ratio(0, None, None)
    totals = kept.sum(axis=0)
    log = math.log(totals[1] / totals[0])
    if n == 1:
        return Ratio(1, math.exp(log), None)
    shares = kept / totals
    spread = math.sqrt(n / (n - 1) * float(((shares[:, 1] - shares[:, 0]) ** 2).sum()))
    half = _t(n - 1, confidence) * spread
    return Ratio(n, math.exp(log), Interval(math.exp(log - half), math.exp(log + half)))


def _positive(first: Sequence[float], second: Sequence[float]) -> NDArray[np.float64]:
    """The pairs of which both are positive, as rows of two."""
    pairs = np.array([*zip(first, second, strict=True)], dtype=np.float64).reshape(-1, 2)
    return pairs[(pairs > 0).all(axis=1)]


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _t(degrees: int, confidence: float) -> float:
    from scipy.special import stdtrit  # a tenth of a second, which no other command need wait for

    return float(stdtrit(degrees, 0.5 + confidence / 2))
