"""Statistics against independent computations: scipy, the standard library, numpy's own, and by hand."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from analysis.numbers import (
    PERCENTILES,
    Counted,
    accounting,
    describe,
    linear_histogram,
    log_histogram,
    pass_hat_k,
    quantiles,
    wald_interval,
    wilson_interval,
)

_random = random.Random(7)
SAMPLE = [_random.lognormvariate(1.5, 1.0) for _ in range(501)]


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 1900), (812, 2500)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_interval_agrees_with_scipy(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    interval = wilson_interval(successes, n, confidence)
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_interval_is_exact_at_the_ends_and_says_nothing_without_data() -> None:
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(10, 10).high == 1.0
    assert (wilson_interval(0, 0).low, wilson_interval(0, 0).high) == (0.0, 1.0)


def test_wald_interval_is_the_papers_plus_minus() -> None:
    interval = wald_interval(30, 100)
    half = stats.norm.ppf(0.975) * math.sqrt(0.3 * 0.7 / 100)
    assert interval.low == pytest.approx(0.3 - half)
    assert interval.high == pytest.approx(0.3 + half)
    assert wald_interval(1, 20).low < 0  # the known flaw that keeps it out of summaries


@pytest.mark.parametrize(("successes", "n", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95.0)])
def test_intervals_refuse_impossible_counts(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(successes, n, confidence)


def test_describe_agrees_with_the_standard_library() -> None:
    summary = describe(SAMPLE)
    cuts = statistics.quantiles(SAMPLE, n=100, method="inclusive")
    assert summary.n == len(SAMPLE)
    assert summary.mean == pytest.approx(statistics.fmean(SAMPLE))
    assert summary.std == pytest.approx(statistics.stdev(SAMPLE))
    assert (summary.min, summary.max) == (min(SAMPLE), max(SAMPLE))
    for percent in PERCENTILES:
        assert getattr(summary, f"p{percent}") == pytest.approx(cuts[percent - 1])
    assert summary.share_under_5s == pytest.approx(sum(value < 5 for value in SAMPLE) / len(SAMPLE))


@pytest.mark.parametrize("n", [2, 3, 10, 1000, 4001])
def test_figures_agree_with_numpy_and_scipy_to_nine_digits(n: int) -> None:
    values = np.random.default_rng(n).lognormal(1.0, 2.0, n)
    summary, expected = describe(values), stats.describe(values)
    assert (summary.min, summary.max) == expected.minmax
    assert summary.mean == pytest.approx(expected.mean, rel=1e-12)
    assert summary.std == pytest.approx(math.sqrt(expected.variance), rel=1e-9)
    grid = np.linspace(0, 1, 201)
    assert quantiles(values, grid) == pytest.approx(np.quantile(values, grid), rel=1e-9)
    for percent in PERCENTILES:
        value = stats.mstats.mquantiles(values, [percent / 100], alphap=1, betap=1)[0]
        assert getattr(summary, f"p{percent}") == pytest.approx(value, rel=1e-9)


def test_describe_of_none_and_of_one_value() -> None:
    assert describe([]).n == 0
    assert describe([]).mean is None
    one = describe([8.0])
    assert (one.n, one.std, one.p1, one.p99) == (1, 0.0, 8.0, 8.0)


def test_five_seconds_follow_the_unit() -> None:
    assert describe([4999.0, 5000.0], five_seconds=5000.0).share_under_5s == 0.5
    assert describe([1.0], five_seconds=None).share_under_5s is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        describe([1.0, bad])


def test_linear_histogram_by_hand() -> None:
    histogram = linear_histogram([0, 1, 2, 2.5, 10], bins=5)
    assert histogram is not None
    assert histogram.edges == (0, 2, 4, 6, 8, 10)
    assert histogram.counts == (2, 2, 0, 0, 1)
    assert histogram.percent == (40, 40, 0, 0, 20)


def test_linear_histogram_agrees_with_numpy() -> None:
    histogram = linear_histogram(SAMPLE)
    counts, edges = np.histogram(SAMPLE, bins=10)
    assert histogram is not None
    assert histogram.counts == tuple(counts)
    assert histogram.edges == pytest.approx(tuple(edges))


@pytest.mark.parametrize("value", [0.0, 3.0, 4e9, -1e300])
def test_equal_values_fall_into_the_first_linear_bin(value: float) -> None:
    histogram = linear_histogram([value] * 4)
    assert histogram is not None
    assert histogram.counts == (4, *[0] * 9)
    assert all(low < high for low, high in zip(histogram.edges, histogram.edges[1:], strict=False))


def test_equal_values_of_ordinary_size_span_a_billionth() -> None:
    histogram = linear_histogram([3.0, 3.0])
    assert histogram is not None
    assert histogram.edges[-1] - histogram.edges[0] == pytest.approx(1e-9, rel=1e-6)


def test_log_histogram_by_hand_with_non_positive_values_in_the_first_bin() -> None:
    histogram = log_histogram([-5, 0, 1, 5, 10, 99, 1000], bins=3)
    assert histogram is not None
    assert histogram.edges == pytest.approx((1, 10, 100, 1000))
    assert histogram.counts == (4, 2, 1)
    assert sum(histogram.percent) == pytest.approx(100)


def test_log_histogram_agrees_with_numpy_on_its_edges() -> None:
    histogram = log_histogram(SAMPLE)
    assert histogram is not None
    edges = [min(SAMPLE) * (max(SAMPLE) / min(SAMPLE)) ** (place / 10) for place in range(11)]
    assert histogram.edges == pytest.approx(edges)
    assert histogram.counts == tuple(np.histogram(SAMPLE, bins=histogram.edges)[0])


def test_log_histogram_degenerate_cases() -> None:
    equal = log_histogram([2.0, 2.0, 0.0])
    assert equal is not None
    assert [equal.edges[0], equal.edges[-1]] == pytest.approx([2, 20])
    assert equal.counts == (3, *[0] * 9)
    assert log_histogram([0.0, -1.0]) is None
    assert log_histogram([]) is None
    assert linear_histogram([]) is None


def test_accounting_balances_and_counts_only_right_answers_that_are_ok() -> None:
    rows = [
        Counted("ok", True),
        Counted("ok", False),
        Counted("limited", True),
        Counted("failed", None),
        Counted("owed", None),
    ]
    account = accounting(rows, planned=8)
    parts = (account.ok, account.failed, account.limited, account.owed, account.pending)
    assert parts == (2, 1, 1, 1, 3)
    assert sum(parts) == account.planned
    assert (account.correct, account.accuracy) == (1, 1 / 8)
    assert (account.interval, account.wald) == (wilson_interval(1, 8), wald_interval(1, 8))


def test_accounting_of_nothing_has_no_accuracy_and_too_many_results_are_refused() -> None:
    assert accounting([], planned=0).accuracy is None
    with pytest.raises(ValueError, match="2 results for 1 planned"):
        accounting([Counted("ok", True)] * 2, planned=1)


def test_pass_hat_k_is_the_share_of_draws_in_which_all_succeed() -> None:
    for trials, successes in ((1, 1), (4, 3), (5, 2), (6, 0)):
        outcomes = [True] * successes + [False] * (trials - successes)
        for k in range(1, trials + 1):
            draws = list(itertools.combinations(outcomes, k))
            assert pass_hat_k(trials, successes, k) == pytest.approx(sum(map(all, draws)) / len(draws))
    for trials, successes, k in ((3, 1, 0), (3, 1, 4), (3, 4, 1)):
        with pytest.raises(ValueError, match=r"pass\^"):
            pass_hat_k(trials, successes, k)
