from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtri

from ray_app.foresight import Floats, Load, Place, Rest, Sample, forecast, makespan_s


def sample(durations_s: Floats, costs_usd: Floats | None = None, priors_s: Floats | None = None) -> Sample:
    n = len(durations_s)
    nothing = np.full(n, np.nan)
    costs = np.ones(n) if costs_usd is None else costs_usd
    return Sample(
        [f"s{i % 2}" for i in range(n)], durations_s, costs, nothing if priors_s is None else priors_s
    )


def rest(n: int, priors_s: Floats | None = None) -> Rest:
    return Rest([f"s{i % 2}" for i in range(n)], np.full(n, np.nan) if priors_s is None else priors_s)


def test_tasks_are_listed_on_the_slots_that_are_free_first() -> None:
    assert makespan_s([3, 1, 1, 4], 2) == 6
    assert makespan_s([4, 3, 1, 1], 2) == 5


def test_equal_tasks_leave_nothing_to_doubt() -> None:
    told = forecast(sample(np.full(20, 5.0)), rest(100), Place(10))
    assert told is not None
    assert tuple(told.wall_s) == pytest.approx((50, 50, 50)) and tuple(told.cost_usd) == (100, 100, 100)
    assert forecast(sample(np.full(7, 5.0)), rest(100), Place(10)) is None, "too few to tell from"


def test_the_longest_of_many_is_longer_than_any_of_a_small_sample_up_to_the_limit() -> None:
    durations = np.exp(0.7 * ndtri((np.arange(100) + 0.5) / 100))
    told = forecast(sample(durations), rest(3000), Place(3000))
    assert told is not None
    expected = np.exp(0.7 * 3.4)  # the quantile of one in 3,000
    assert told.wall_s.low < expected < told.wall_s.high < 5 * expected
    assert told.wall_s.middle > durations.max()
    bound = forecast(sample(durations), rest(3000), Place(3000, longest_s=4.0))
    assert bound is not None and bound.wall_s.high == pytest.approx(4.0)


def test_an_endpoint_that_admits_fewer_calls_than_tasks_want_bounds_the_wall_time() -> None:
    told = forecast(sample(np.full(20, 10.0)), rest(200), Place(100, loads=(Load(0.5, 10), Load(0.01, 1000))))
    assert told is not None and told.wall_s.middle == pytest.approx(0.5 * 200 * 10 / 10)


def test_a_prior_run_says_of_each_task_how_long_it_is() -> None:
    rng = np.random.default_rng(2)
    before = rng.lognormal(3.0, 1.0, 60)
    now = 2 * before * rng.lognormal(0.0, 0.05, 60)
    ahead = np.array([100.0] * 9 + [1000.0])
    told = forecast(sample(now, priors_s=before), rest(10, ahead), Place(10))
    assert told is not None and 1700 < told.wall_s.low < told.wall_s.high < 2400


def test_the_cost_is_by_strata_and_wider_above_than_below_where_costs_are_skewed() -> None:
    costs = np.where(np.arange(80) % 2, 1.0, np.random.default_rng(3).lognormal(0.0, 1.0, 80))
    told = forecast(
        sample(np.ones(80), costs), Rest(["s0"] * 10 + ["s1"] * 400, np.full(410, np.nan)), Place(9)
    )
    assert told is not None
    low, middle, high = told.cost_usd
    assert middle == pytest.approx(400 + 10 * costs[::2].mean())
    assert 400 < low < middle < high < 440
    alike = forecast(sample(np.ones(80), costs), Rest(["s0"] * 400, np.full(400, np.nan)), Place(9))
    assert alike is not None
    assert alike.cost_usd.high - alike.cost_usd.middle > alike.cost_usd.middle - alike.cost_usd.low
