"""Statistics of pairs, against scipy, enumeration and values worked by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy import optimize, stats

from analysis.numbers import Interval
from analysis.paired import (
    Ratio,
    detectable_difference,
    difference,
    difference_interval,
    geometric_ratio,
    randomisation_p,
    ratio_of_totals,
)

ONE = Fraction(1)


def of_counts(better: int, worse: int, same: int) -> list[Fraction]:
    return [ONE] * better + [-ONE] * worse + [Fraction(0)] * same


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (6, 1), (10, 10), (3, 17), (250, 180)])
def test_with_one_trial_the_test_is_the_exact_mcnemar_test(better: int, worse: int) -> None:
    p = randomisation_p(of_counts(better, worse, 40))
    expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert p == pytest.approx(expected, abs=1e-12, rel=1e-9)


@pytest.mark.parametrize(
    "values", [["1/3", "2/3", "-1/3", "0", "1"], ["1/2", "-1", "1/3", "1/3"], ["1", "-1", "1/2", "-1/2"]]
)
def test_with_several_trials_it_counts_every_choice_of_signs(values: list[str]) -> None:
    parts = [Fraction(value) for value in values]
    sums = [
        abs(sum((sign * part for sign, part in zip(signs, parts, strict=True)), Fraction(0)))
        for signs in product((1, -1), repeat=len(parts))
    ]
    observed = abs(sum(parts, Fraction(0)))
    expected = sum(value >= observed for value in sums) / len(sums)
    assert randomisation_p(parts) == pytest.approx(expected, abs=1e-12)


def test_a_lattice_that_is_too_fine_is_taken_as_normal() -> None:
    generator = np.random.default_rng(5)
    values = [Fraction(int(n), 9973) for n in generator.integers(-9000, 9973, 3000)]
    spread = math.sqrt(sum(float(value) ** 2 for value in values))
    expected = 2 * stats.norm.sf(abs(float(sum(values))) / spread)
    assert randomisation_p(values) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_that_of_bonett_and_price() -> None:
    # 8 better, 3 worse of 45: proportions of the paper are 9/47 and 4/47.
    up, down, n = 9 / 47, 4 / 47, 47
    half = stats.norm.ppf(0.975) * math.sqrt((up + down - (up - down) ** 2) / n)
    found = difference_interval([float(value) for value in of_counts(8, 3, 34)])
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half), abs=1e-12)
    assert difference_interval([]) == Interval(-1.0, 1.0)
    none_differs = difference_interval([0.0] * 100)
    assert none_differs.low == -none_differs.high and 0.02 < none_differs.high < 0.04


@pytest.mark.parametrize(("up", "down"), [(0.1, 0.1), (0.25, 0.1), (0.02, 0.01), (0.4, 0.05)])
def test_the_interval_covers_the_truth_as_often_as_it_says(up: float, down: float) -> None:
    n = 40
    covered = 0.0
    for better in range(n + 1):
        for worse in range(n + 1 - better):
            found = difference_interval([1.0] * better + [-1.0] * worse + [0.0] * (n - better - worse))
            if found.low <= up - down <= found.high:
                covered += stats.multinomial.pmf(
                    [better, worse, n - better - worse], n, [up, down, 1 - up - down]
                )
    assert covered > 0.94


@pytest.mark.parametrize(("n", "discordance"), [(60, 0.2), (2500, 0.15), (500, 0.4), (30, 0.9)])
def test_what_is_detectable_has_the_power_that_was_asked_for(n: int, discordance: float) -> None:
    def missing_power(true: float) -> float:
        spread = math.sqrt((discordance - true**2) / n)
        return float(stats.norm.cdf((true - 1.959963984540054 * math.sqrt(discordance / n)) / spread) - 0.8)

    expected = optimize.brentq(missing_power, 1e-6, math.sqrt(discordance) - 1e-9, xtol=1e-14)
    assert detectable_difference(n, discordance) == pytest.approx(expected, abs=1e-9)
    assert detectable_difference(4 * n, discordance) < expected


def test_nothing_is_detectable_where_too_little_differs() -> None:
    assert detectable_difference(20, 0.0) is None
    assert detectable_difference(3, 0.5) is None
    assert detectable_difference(20, 0.1) is None  # two tasks of twenty, even if both went one way


def test_all_figures_at_once() -> None:
    found = difference([Fraction(1, 2), Fraction(-1), Fraction(0), Fraction(1)])
    assert (found.n, found.mean, found.discordance) == (4, 0.125, 0.5625)
    assert found.p_value == randomisation_p([Fraction(1, 2), Fraction(-1), Fraction(1)])
    assert difference([]).interval is None and difference([]).mean is None


def test_ratios_are_of_logs_task_by_task_and_of_totals() -> None:
    generator = np.random.default_rng(3)
    first = generator.lognormal(1.0, 0.5, 40)
    second = first * generator.lognormal(0.2, 0.4, 40)
    logs = np.log(second / first)
    interval = stats.t.interval(0.95, 39, logs.mean(), stats.sem(logs))
    found = geometric_ratio([*first, 0.0, 3.0], [*second, 1.0, 0.0])
    assert found.n == 40 and found.interval is not None
    assert (found.ratio, found.interval.low, found.interval.high) == pytest.approx(
        (math.exp(logs.mean()), *np.exp(interval)), rel=1e-9
    )
    total = ratio_of_totals([*first], [*second])
    residuals = second / second.mean() - first / first.mean()
    half = stats.t.ppf(0.975, 39) * stats.sem(residuals)
    assert total.ratio is not None and total.interval is not None
    assert total.ratio == pytest.approx(second.sum() / first.sum(), rel=1e-12)
    assert total.interval.high == pytest.approx(total.ratio * math.exp(half), rel=1e-9)
    assert total.interval.low == pytest.approx(total.ratio / math.exp(half), rel=1e-9)


def test_a_ratio_of_nothing_and_of_one_task_says_so() -> None:
    for ratio_of in (geometric_ratio, ratio_of_totals):
        assert ratio_of([0.0], [1.0]) == Ratio(0, None, None)
        one = ratio_of([2.0], [3.0])
        assert (one.n, one.interval) == (1, None) and one.ratio == pytest.approx(1.5)
