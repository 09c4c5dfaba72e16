from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from analysis.numbers import Interval, wilson_interval
from analysis.trials import Tried, clustered_interval, noise, pass_hat

RATES = (2.0, 1.0)  # of the beta distribution that tasks' chances of success are drawn from


def drawn(rng: np.random.Generator, tasks: int, trials: int) -> list[Tried]:
    """A run: each task has its own chance of success."""
    return [Tried(trials, int(rng.binomial(trials, p))) for p in rng.beta(*RATES, size=tasks)]


def ends(found: Interval | None) -> tuple[float, float]:
    assert found is not None
    return found.low, found.high


def by_enumeration(group: Sequence[Tried], k: int) -> float:
    """pass^k of a group, by going through all draws of k trials of each task."""
    shares = []
    for each in group:
        outcomes = [True] * each.successes + [False] * (each.trials - each.successes)
        draws = list(itertools.combinations(outcomes, k))
        shares.append(sum(map(all, draws)) / len(draws))
    return statistics.fmean(shares)


def test_pass_hat_k_is_the_mean_over_tasks_and_of_groups_the_mean_of_their_means() -> None:
    first = [Tried(4, 3), Tried(4, 4), Tried(5, 2)]
    second = [Tried(4, 0), Tried(2, 2)]
    for k in (1, 2):
        assert pass_hat([first], k).value == pytest.approx(by_enumeration(first, k))
        both = (by_enumeration(first, k) + by_enumeration(second, k)) / 2
        found = pass_hat([first, second], k)
        assert found.value == pytest.approx(both) and found.tasks == 5
    assert pass_hat([second], 3).value == 0.0 and pass_hat([second], 3).tasks == 1, "too few trials: left out"
    assert pass_hat([first, second], 5).value is None, "a group without any is no zero"


def test_the_interval_is_wilsons_at_one_trial_and_narrows_with_trials_that_differ() -> None:
    once = [Tried(1, int(n < 30)) for n in range(50)]
    assert ends(pass_hat([once], 1).interval) == pytest.approx(ends(wilson_interval(30, 50)))
    always = [Tried(4, 4)] * 50
    assert ends(pass_hat([always], 4).interval) == pytest.approx(ends(wilson_interval(50, 50))), (
        "50 tasks, not 200"
    )
    alike = [Tried(4, 4 * each.successes) for each in once]
    assert ends(pass_hat([alike], 1).interval) == pytest.approx(ends(wilson_interval(30, 50))), (
        "trials that add nothing"
    )
    coins = [Tried(4, 2)] * 50
    assert ends(pass_hat([coins], 1).interval) == pytest.approx(ends(wilson_interval(100, 200))), (
        "never more than there is"
    )


def test_intervals_hold_the_truth_as_often_as_they_say_and_independence_would_not() -> None:
    rng = np.random.default_rng(7)
    truth = {k: math.prod((RATES[0] + i) / (sum(RATES) + i) for i in range(k)) for k in (1, 2, 4)}
    runs = [drawn(rng, tasks=40, trials=4) for _ in range(600)]
    for k, value in truth.items():
        found = [ends(pass_hat([run], k).interval) for run in runs]
        held = statistics.fmean(low <= value <= high for low, high in found)
        assert 0.93 <= held <= 0.985, (k, held)
    naive = [ends(wilson_interval(sum(each.successes for each in run), 160)) for run in runs]
    assert statistics.fmean(low <= truth[1] <= high for low, high in naive) < 0.9


def test_the_interval_is_that_of_a_bootstrap_over_tasks() -> None:
    rng = np.random.default_rng(3)
    groups = [drawn(rng, 60, 4), drawn(rng, 30, 4)]
    found = pass_hat(groups, 2)
    shares = [
        np.array([math.comb(each.successes, 2) / math.comb(4, 2) for each in group]) for group in groups
    ]
    again = [rng.choice(group, (20_000, len(group))).mean(axis=1) for group in shares]
    low, high = np.quantile((again[0] + again[1]) / 2, [0.025, 0.975])
    assert ends(found.interval) == pytest.approx((low, high), abs=0.01)
    assert ends(clustered_interval([[0.5]], 1)) == pytest.approx(ends(wilson_interval(0.5, 1)))


def test_the_noise_floor_is_what_repetitions_of_the_same_tasks_show() -> None:
    rng = np.random.default_rng(5)
    chances = rng.beta(*RATES, size=50)
    runs = [rng.random((4, 50)) < chances for _ in range(500)]
    found = [
        noise((str(task), trial, bool(run[trial, task])) for trial in range(4) for task in range(50))
        for run in runs
    ]
    noises = [each for each in found if each is not None]
    accuracies = [run.mean() for run in runs]
    assert statistics.fmean(n.run_sd**2 for n in noises) == pytest.approx(
        statistics.variance(accuracies), rel=0.15
    )
    trials = [run[0].mean() for run in runs]
    assert statistics.fmean(n.trial_sd**2 for n in noises) == pytest.approx(
        statistics.variance(trials), rel=0.15
    )
    spreads = [n.spread**2 for n in noises if n.spread is not None]
    assert statistics.fmean(spreads) == pytest.approx(
        statistics.fmean(n.trial_sd**2 for n in noises), rel=0.1
    )
    assert noises[0].by_trial == pytest.approx([row.mean() for row in runs[0]])
    assert not noises[0].is_bound


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(11)
    chances = rng.uniform(0.2, 0.6, size=80)
    sd = math.sqrt((chances * (1 - chances)).sum() / 4) / 80
    size = (1.959964 + 0.841621) * math.sqrt(2) * sd
    found = 0
    for _ in range(800):
        first, second = (rng.binomial(4, p).mean() / 4 for p in (chances, chances + size))
        found += abs(second - first) > 1.959964 * math.sqrt(2) * sd
    assert found / 800 == pytest.approx(0.8, abs=0.06)
    run = noise(
        (str(task), trial, bool(rng.random() < p)) for task, p in enumerate(chances) for trial in range(4)
    )
    assert run is not None and run.detectable == pytest.approx(size, rel=0.15)


def test_one_trial_gives_an_upper_bound_and_none_gives_nothing() -> None:
    outcomes = [(str(n), 0, n < 30) for n in range(50)]
    found = noise(outcomes)
    assert found is not None and found.is_bound and found.spread is None
    assert found.run_sd == found.trial_sd == pytest.approx(math.sqrt(0.6 * 0.4 / 50))
    again = noise([*outcomes, *((task, 1, is_right) for task, _, is_right in outcomes)])
    assert again is not None and again.run_sd == 0.0 and again.spread == 0.0
    assert noise([]) is None
    mixed = noise([("a", 0, True), ("a", 1, False), ("b", 0, True)])
    assert mixed is not None and mixed.run_sd == pytest.approx(math.sqrt(0.5 * 1.5) / 2)


def test_the_order_of_the_outcomes_changes_nothing() -> None:
    outcomes = [(str(task), trial, (task + trial) % 3 == 0) for task in range(9) for trial in range(3)]
    mixed = random.Random(1).sample(outcomes, len(outcomes))
    assert noise(mixed) == noise(outcomes)
