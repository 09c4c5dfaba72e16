"""Several trials of each task: pass^k with its interval, and how much of a difference is chance alone.

Pure. A trial counts where it says something of the models (`settled.is_settled`); what failed for another
reason is no trial here, and the caller says how many those were. The task is the unit: trials of one task
are alike, so that they are no independent observations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pvariance, stdev

from analysis.numbers import Interval, pass_hat_k, wilson_interval
from analysis.paired import ALPHA, POWER


@dataclass(frozen=True, slots=True)
class Tried:
    """A task's trials that count, and how many of them succeeded."""

    trials: int
    successes: int


@dataclass(frozen=True, slots=True)
class PassHatK:
    """pass^k over the `tasks` that have at least k trials; None where there is no such task."""

    k: int
    tasks: int
    value: float | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Noise:
    """What chance alone does to the accuracy of a run of these tasks with these trials.

    `by_trial` is the accuracy of each trial, `spread` the standard deviation between them (ddof 1; None for
    one trial). `trial_sd` and `run_sd` are what the tasks' own variance lets expect: of one trial's accuracy,
    and of the mean over all. `detectable`: the smallest true difference to another such run that is found.
    With one trial a task nobody knows how alike trials are: then they are upper bounds (`is_bound`).
    """

    by_trial: tuple[float, ...]
    spread: float | None
    trial_sd: float
    run_sd: float
    detectable: float
    is_bound: bool


def pass_hat(groups: Sequence[Sequence[Tried]], k: int) -> PassHatK:
    """pass^k as the mean over tasks of C(c, k) / C(n, k); of several groups the mean of their means.

    None where a group has no task with k trials. Source: tau-bench, arXiv:2406.12045.
    """
    kept = [[each for each in group if each.trials >= k] for group in groups]
    tasks = sum(map(len, kept))
    if not kept or not all(kept):
        return PassHatK(k, tasks, None, None)
    shares = [[pass_hat_k(each.trials, each.successes, k) for each in group] for group in kept]
    most = sum(each.trials // k for group in kept for each in group)
    value = fmean(map(fmean, shares))
    return PassHatK(k, tasks, value, clustered_interval(shares, most))


def clustered_interval(groups: Sequence[Sequence[float]], most: float, confidence: float = 0.95) -> Interval:
    """Wilson's interval at the effective sample size, of the mean of the groups' means of shares in [0, 1].

    A share is that of one task, drawn at random from tasks of its group. The effective size is that of the
    independent yes-or-no observations with the variance observed: p (1 - p) / var; where tasks do not differ
    at all it is the number of tasks (p = 0 or 1) or `most`, which nothing exceeds. With one trial a task this
    is Wilson's interval itself. Sources: E. L. Korn, B. I. Graubard, "Confidence intervals for proportions
    with small expected number of positive counts estimated from survey data", Survey Methodology 24 (1998)
    193-201 (effective size); N. Dean, M. Pagano, "Evaluating confidence interval methods for binomial
    proportions in clustered surveys", J. Surv. Stat. Methodol. 3 (2015) 484-503 (with Wilson's interval).
    """
    p = fmean(map(fmean, groups))
    variance = sum(pvariance(group) / len(group) for group in groups) / len(groups) ** 2
    if p in (0.0, 1.0):
        size = float(sum(map(len, groups)))
    else:
        size = min(most, p * (1 - p) / variance) if variance else most
    return wilson_interval(p * size, size, confidence)


def noise(outcomes: Iterable[tuple[str, int, bool]]) -> Noise | None:
    """The noise floor of (task, trial, whether it succeeded) of the trials that count; None without any.

    The variance within a task is c (n - c) / (n (n - 1)), unbiased, averaged over the tasks with two trials
    or more; where there are none it is at most p (1 - p). `detectable` compares two runs of the same tasks,
    whose difference has twice the variance of one run: E. Miller, "Adding error bars to evals",
    arXiv:2411.00640, without variance of the tasks' true differences.
    """
    tasks, trials = defaultdict[str, list[bool]](list), defaultdict[int, list[bool]](list)
    for task, trial, is_right in outcomes:
        tasks[task].append(is_right)
        trials[trial].append(is_right)
    if not tasks:
        return None
    by_trial = tuple(fmean(trials[trial]) for trial in sorted(trials))
    within, is_bound = _within([Tried(len(each), sum(each)) for each in tasks.values()])
    run_sd = math.sqrt(within * sum(1 / len(each) for each in tasks.values())) / len(tasks)
    return Noise(
        by_trial,
        stdev(by_trial) if len(by_trial) > 1 else None,
        math.sqrt(within / len(tasks)),
        run_sd,
        detectable(run_sd, run_sd),
        is_bound,
    )


def _within(tasks: Sequence[Tried]) -> tuple[float, bool]:
    """The mean variance of one trial of a task, and whether that is only an upper bound."""
    several = [each for each in tasks if each.trials > 1]
    if not several:
        p = fmean(each.successes / each.trials for each in tasks)
        return p * (1 - p), True
    parts = ((each.trials, each.successes) for each in several)
    return fmean(c * (n - c) / (n * (n - 1)) for n, c in parts), False


def detectable(first_sd: float, second_sd: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true difference that two runs with these standard deviations show with `power`."""
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    return (z_alpha + z_power) * math.hypot(first_sd, second_sd)
