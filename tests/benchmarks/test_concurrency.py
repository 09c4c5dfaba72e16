"""The short form of the measurement: a real server in a process of its own, and what its figures rest on."""

from __future__ import annotations

from benchmarks import concurrency
from benchmarks.concurrency import QUICK, fixed_over_http, over_http
from benchmarks.thrash import CURVES, best
from ray_app.concurrency import Bounds


def test_the_server_is_as_fast_as_its_curve_and_slower_beyond_its_peak() -> None:
    curve = "sharp, peak 12"
    rate = best(CURVES[curve]).rate
    measured = fixed_over_http(curve, QUICK)
    assert 0.4 * rate < measured < 1.3 * rate
    crowded = over_http(curve, Bounds(96, 96, 96), 10**9, 1.5)
    spent_s = crowded.ended_s[-1]
    assert sum(crowded.works) / spent_s < 0.7 * measured


def test_calls_refused_at_once_cost_one_decrease_an_episode() -> None:
    figures = {figure.name: figure for figure in concurrency._episode_figures(QUICK)}
    assert all(figure.is_reached for figure in figures.values()), figures
