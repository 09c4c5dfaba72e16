"""Two runs over the same tasks: who is better, by how much, how sure that is, and at what price.

Tasks pair by their ids, and by what was asked and the reference answer (`rollout_key`, `judge_key`); a run
that was imported from elsewhere does not know the latter two, and pairs by ids alone. What is not settled in
both runs (`settled.py`) is left out, and counted. Trials of a task are averaged first, so that the task is
the unit of every figure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from analysis.paired import ALPHA, Difference, Ratio, difference, geometric_ratio, ratio_of_totals
from analysis.settled import Side, Tasks
from analysis.trials import Noise, detectable, noise

Verdict = Literal["better", "worse", "cannot tell"]
# Where these differ, scores mean different things.
LABELS = ("benchmark", "protocol", "judge_model", "dataset", "scope_policy")
# What else a run says of itself; where it differs, that may be what is compared.
OTHER_FACTS = ("prompt_digest", "orchestrator", "trials", "sandbox", "commit", "imported", "left_out")


@dataclass(frozen=True, slots=True)
class Pairing:
    """How many tasks pair, and why others do not: in one run only, settled in one only, another question or
    another reference answer under the same id. `by_id_alone`: nobody looked at the latter two."""

    pairs: int
    only_first: int
    only_second: int
    unsettled: int
    asked_otherwise: int
    judged_otherwise: int
    by_id_alone: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Paired tasks of one category; accuracies are means over tasks."""

    name: str
    first: float | None
    second: float | None
    difference: Difference


@dataclass(frozen=True, slots=True)
class Flip:
    """A task that one run answers more often than the other: right trials of all, in each."""

    task_id: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class RatioRow:
    """One quantity, second over first: the mean of the tasks' ratios, and the ratio of the totals."""

    name: str
    first: float
    second: float
    typical: Ratio
    total: Ratio


@dataclass(frozen=True, slots=True)
class Label:
    """A fact of both runs; `agrees` None where one of them does not say."""

    name: str
    first: str
    second: str
    agrees: bool | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `python -m analysis compare` prints. `verdict` is about the second run, `reason` says why.

    `noise` are the noise floors of both runs over the pairs, `repeatable` the smallest true difference that
    two such runs of these very tasks would show; None where nothing pairs.
    """

    first: str
    second: str
    verdict: Verdict
    reason: str
    labels: list[Label]
    other_facts: list[Label]
    pairing: Pairing
    overall: Group
    noise: tuple[Noise | None, Noise | None]
    repeatable: float | None
    by_category: list[Group]
    to_right: list[Flip]
    to_wrong: list[Flip]
    ratios: list[RatioRow]


Pairs = Mapping[str, tuple[Side, Side]]


def compare(first: Tasks, second: Tasks, *, ignore_labels: bool = False) -> Comparison:
    """The second run against the first.

    `ignore_labels` pairs by id alone, whatever was asked, and lets no label stand in the way of a verdict.
    """
    is_imported = "imported" in first.facts or "imported" in second.facts
    pairs, pairing = pair(first, second, by_id_alone=ignore_labels or is_imported)
    facts = first.facts, second.facts
    labels = [
        _label_of_data(*facts, pairing) if name == "dataset" else label(name, *facts) for name in LABELS
    ]
    overall = _group("all", pairs.values())
    floors = _noise(pairs, 0), _noise(pairs, 1)
    verdict, reason = judge(overall.difference, labels, ignore_labels=ignore_labels)
    return Comparison(
        first.run_dir,
        second.run_dir,
        verdict,
        reason,
        labels,
        [found for name in OTHER_FACTS if (found := label(name, *facts)).agrees is not True],
        pairing,
        overall,
        floors,
        detectable(*(floor.run_sd for floor in floors if floor)) if all(floors) else None,
        _categories(pairs.values()),
        _flips(pairs, 1),
        _flips(pairs, -1),
        _ratios(pairs.values()),
    )


def label(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Label:
    """One fact of both runs."""
    one, two = (str(facts.get(name) or "") for facts in (first, second))
    return Label(name, one, two, one == two if one and two else True if one == two else None)


def judge(found: Difference, labels: Iterable[Label], *, ignore_labels: bool) -> tuple[Verdict, str]:
    """Better or worse where the exact test and the interval both say so, and the scores mean the same."""
    differing = [item.name.replace("_", " ") for item in labels if item.agrees is False]
    if differing and not ignore_labels:
        return "cannot tell", f"the scores mean different things: another {', another '.join(differing)}"
    if found.p_value is None or found.mean is None or found.interval is None:
        return "cannot tell", "no task has a settled result in both runs"
    is_sure = found.p_value < ALPHA and (found.interval.low > 0 or found.interval.high < 0)
    if is_sure:
        return ("better" if found.mean > 0 else "worse"), f"p = {found.p_value:.2g}"
    return "cannot tell", f"p = {found.p_value:.2g}: such a difference comes of chance too"


def pair(first: Tasks, second: Tasks, *, by_id_alone: bool) -> tuple[dict[str, tuple[Side, Side]], Pairing]:
    """The tasks that can be compared, by id, and what became of the others."""
    found = {key: (side, second.settled[key]) for key, side in first.settled.items() if key in second.settled}
    both = first.ids & second.ids
    asked = {key for key, (a, b) in found.items() if not by_id_alone and a.rollout_key != b.rollout_key}
    judged = {key for key, (a, b) in found.items() if not by_id_alone and a.judge_key != b.judge_key} - asked
    pairs = {key: sides for key, sides in found.items() if key not in asked | judged}
    return pairs, Pairing(
        pairs=len(pairs),
        only_first=len(first.ids) - len(both),
        only_second=len(second.ids) - len(both),
        unsettled=len(both) - len(found),
        asked_otherwise=len(asked),
        judged_otherwise=len(judged),
        by_id_alone=by_id_alone,
    )


def _label_of_data(first: Mapping[str, Any], second: Mapping[str, Any], pairing: Pairing) -> Label:
    """Another name is no other data where every question and reference answer is the same."""
    found = label("dataset", first, second)
    is_same = pairing.pairs and not pairing.by_id_alone
    is_same = is_same and not pairing.asked_otherwise and not pairing.judged_otherwise
    return replace(found, agrees=True) if is_same and found.agrees is False else found


def _noise(pairs: Pairs, side: int) -> Noise | None:
    return noise((key, *outcome) for key, sides in pairs.items() for outcome in sides[side].outcomes)


def _categories(pairs: Collection[tuple[Side, Side]]) -> list[Group]:
    names = sorted({side.category for side, _ in pairs})
    if len(names) < 2:
        return []
    return [_group(name or "(none)", [pair for pair in pairs if pair[0].category == name]) for name in names]


def _group(name: str, pairs: Iterable[tuple[Side, Side]]) -> Group:
    rows = list(pairs)
    n = len(rows)
    first, second = (float(sum(row[side].share for row in rows) / n) if n else None for side in (0, 1))
    return Group(name, first, second, difference([b.share - a.share for a, b in rows]))


def _flips(pairs: Pairs, sign: int) -> list[Flip]:
    """Tasks whose share moved in the direction of `sign`, those that moved most first."""
    moved = {key: sign * (b.share - a.share) for key, (a, b) in pairs.items()}
    keys = sorted((key for key, by in moved.items() if by > 0), key=lambda key: (-moved[key], key))
    return [Flip(key, *(f"{side.right}/{side.trials}" for side in pairs[key])) for key in keys]


def _ratios(pairs: Iterable[tuple[Side, Side]]) -> list[RatioRow]:
    rows = list(pairs)
    timed = [(a.seconds, b.seconds) for a, b in rows if a.seconds is not None and b.seconds is not None]
    columns: dict[str, list[tuple[float, float]]] = {
        "cost, $ a task": [(a.cost_usd, b.cost_usd) for a, b in rows],
        "latency, s a task": timed,
        "tokens a task": [(a.tokens, b.tokens) for a, b in rows],
        "turns a task": [(a.turns, b.turns) for a, b in rows],
    }
    return [_ratio_row(name, values) for name, values in columns.items()]


def _ratio_row(name: str, values: Sequence[tuple[float, float]]) -> RatioRow:
    first, second = [a for a, _ in values], [b for _, b in values]
    n = max(1, len(values))
    return RatioRow(
        name, sum(first) / n, sum(second) / n, geometric_ratio(first, second), ratio_of_totals(first, second)
    )
