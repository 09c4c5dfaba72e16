"""The short form of the measurement: order and forecast in virtual time."""

from __future__ import annotations

from statistics import median

from benchmarks import scheduling
from benchmarks.scheduling import JUDGED, QUICK, ratio, told
from benchmarks.scheduling_world import Shape


def test_longest_first_by_a_prior_run_ends_earlier_and_a_prior_of_other_tasks_is_worth_nothing() -> None:
    seeds = range(7)
    assert median(ratio(QUICK, JUDGED, seed) for seed in seeds) <= 0.92
    assert median(ratio(QUICK, Shape(correlation=0.0), seed) for seed in seeds) > 0.92


def test_most_runs_end_within_what_their_pilot_foretold() -> None:
    found = [told(scheduling.Sizes(1000, 200, 0, 0, 0, 0, 0, 0.0), JUDGED, False, seed) for seed in range(10)]
    assert sum(one.holds_wall for one in found) >= 7
    assert sum(one.holds_cost for one in found) >= 7
    assert all(one.wall_s.high < 4 * one.actual_s for one in found), "not by being too wide to be wrong"
