"""The simulations of a tau2 run: pass^k by domain and overall, what counts, how they ended, how noisy it is.

What failed for a reason that is not the models' (an endpoint, a full disk) is no trial of anything: it is
left out of every figure, counted as `infrastructure`, and shown as missing coverage. A limit (steps, time,
cost) and a model's own failure count as not solved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.log import RESULTS, SPANS, RunLog
from analysis.settled import is_settled
from analysis.trials import Noise, PassHatK, Tried, noise, pass_hat

COLUMNS = (*RESULTS, *SPANS)
ALL, MEAN = "all tasks", "mean of domains"
INFRASTRUCTURE = "infrastructure_error"  # tau2's name of that reason


@dataclass(frozen=True, slots=True)
class Coverage:
    """Planned simulations: those that count, and why others do not; `pending` None where nobody knows."""

    planned: int | None
    counted: int
    infrastructure: int
    owed: int
    pending: int | None

    @property
    def share(self) -> float | None:
        return self.counted / self.planned if self.planned else None


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One domain, or all of them. `reasons`: how many simulations ended for each, those left out too."""

    name: str
    tasks: int
    coverage: Coverage
    pass_hat: list[PassHatK]
    reasons: dict[str, int]
    noise: Noise | None


@dataclass(frozen=True, slots=True)
class Simulations:
    """What `python -m analysis tau2` prints; `note` is why there is nothing, where there is nothing.

    `mean_of_domains` weighs every domain alike, however many tasks it has; empty for a single one.
    """

    run: str
    note: str
    trials: int
    domains: list[DomainRow]
    overall: DomainRow | None
    mean_of_domains: list[PassHatK]


class _Result(NamedTuple):
    """A counted result of the engine."""

    task: str
    domain: str
    trial: int
    is_right: bool
    is_settled: bool
    is_owed: bool
    reason: str


def simulations(log: RunLog) -> Simulations:
    """The figures of the counted results of the whole run, whatever its segments."""
    results = _results(log)
    if log.absence or not results:
        return Simulations(log.name, log.absence or log.no("result"), 0, [], None, [])
    by_domain = defaultdict[str, list[_Result]](list)
    for each in results:
        by_domain[each.domain].append(each)
    planned, most = _planned(log), max(_counts(results).values(), default=0)
    rows = [_row(name or "(none)", by_domain[name], planned.get(name), most) for name in sorted(by_domain)]
    groups = [list(_tried(by_domain[name])) for name in sorted(by_domain)]
    means = [pass_hat(groups, k) for k in range(1, most + 1)] if len(rows) > 1 else []
    overall = _row(ALL, results, planned.get(""), most)
    return Simulations(log.name, "", _trials(log), rows, overall, means)


def _results(log: RunLog) -> list[_Result]:
    found, reasons = log.results, _reasons(log)
    words = {
        name: found.words(name) for name in ("task_id", "rollout_key", "category", "outcome", "error_kind")
    }
    columns = [[each.names[code] for code in each.codes.tolist()] for each in words.values()]
    trials, right = found.ints("trial").tolist(), (found.numbers("is_correct") == 1).tolist()
    return [
        _result(task, category, trial, outcome, kind, is_right, reasons.get((rollout, trial), ""))
        for task, rollout, category, outcome, kind, trial, is_right in zip(
            *columns, trials, right, strict=True
        )
    ]


def _result(
    task: str, category: str, trial: int, outcome: str, kind: str, is_right: bool, reason: str
) -> _Result:
    counts = is_settled({"outcome": outcome, "error_kind": kind})
    if outcome == "failed":
        reason = f"{kind or 'unknown'}_error" if counts else INFRASTRUCTURE
    is_ok = outcome == "ok" and is_right
    return _Result(task, category, trial, is_ok, counts, outcome == "owed", reason or "unknown")


def _reasons(log: RunLog) -> dict[tuple[str, int], str]:
    """Why each simulation ended: the word of its newest attempt, also where that only replayed it."""
    rows = np.flatnonzero(log.kind("simulation"))
    keys, details = log.words("rollout_key"), log.words("detail")
    trials, epochs, attempts = (log.ints(name)[rows] for name in ("trial", "epoch", "attempt"))
    order = np.lexsort((attempts, epochs))
    return {
        (keys.names[keys.codes[rows[at]]], int(trials[at])): details.names[details.codes[rows[at]]]
        for at in order.tolist()
    }


def _row(name: str, results: Sequence[_Result], planned: int | None, most: int) -> DomainRow:
    tried = list(_tried(results))
    return DomainRow(
        name,
        len({each.task for each in results}),
        _coverage(results, planned),
        [pass_hat([tried], k) for k in range(1, most + 1)],
        dict(Counter(each.reason for each in results if not each.is_owed).most_common()),
        noise((each.task, each.trial, each.is_right) for each in results if each.is_settled),
    )


def _coverage(results: Sequence[_Result], planned: int | None) -> Coverage:
    counted, owed = (sum(getattr(each, name) for each in results) for name in ("is_settled", "is_owed"))
    pending = None if planned is None else max(0, planned - len(results))
    return Coverage(planned, counted, len(results) - counted - owed, owed, pending)


def _tried(results: Iterable[_Result]) -> Iterable[Tried]:
    outcomes = defaultdict[str, list[bool]](list)
    for each in results:
        if each.is_settled:
            outcomes[each.task].append(each.is_right)
    return [Tried(len(each), sum(each)) for each in outcomes.values()]


def _counts(results: Iterable[_Result]) -> Counter[str]:
    return Counter(each.task for each in results if each.is_settled)


def _trials(log: RunLog) -> int:
    trials = log.facts.get("trials")
    return trials if isinstance(trials, int) else 1


def _planned(log: RunLog) -> dict[str, int]:
    """How many simulations were planned, by domain and, under "", in all; as far as the log says so."""
    if log.selection.line:
        return {}
    tasks, planned = log.facts.get("tasks_by_domain"), log.facts.get("planned")
    of_domains = tasks if isinstance(tasks, dict) else {}
    known = {str(name): n * _trials(log) for name, n in of_domains.items() if isinstance(n, int)}
    return {**known, **({"": planned} if isinstance(planned, int) else {})}
