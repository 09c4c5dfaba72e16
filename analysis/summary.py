"""The run on one page: where every planned task is, how right, how sure, how long, how dear.

A summary is of the whole run, whatever its segments: a task's result counts wherever it was committed, and
what an earlier segment spent was spent for it. Each segment has its own row beside that. Every score travels
with the facts of the run (protocol, judge model, prompt digest) from its `run_start` event; what the log does
not say, or says oddly, becomes a note and never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from analysis.calibration import Calibration, calibration
from analysis.foretold import Foretold, foretold
from analysis.log import RESULTS, TOKENS, WORK, Mask, RunLog, counts
from analysis.numbers import Accounting, Counted, Interval, accounting, wald_interval, wilson_interval
from analysis.spending import COLUMNS as SPENDING
from analysis.spending import SpendRow, TaskCost, spending, task_cost

State = Literal["empty", "not ended", "ended"]
COLUMNS = (*WORK, *RESULTS, *SPENDING, "duration_s", "call_seq", "retries", "context_cut", "is_estimated")
_MARKS = ("result", "run_start", "run_end")


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Counted results of one category or answer type; accuracy is over all `n` of them."""

    name: str
    n: int
    ok: int
    failed: int
    limited: int
    owed: int
    correct: int
    accuracy: float
    interval: Interval
    wald: Interval


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the counted results were judged: `judged` have a verdict, by the judge, as exact, or as empty.

    `share` is of all planned tasks, None where nothing is planned.
    """

    judged: int
    by_judge: int
    exact: int
    empty: int
    share: float | None


@dataclass(frozen=True, slots=True)
class Segment:
    """One command's work on the run: `wall_s` from its first event to its last; `results` it committed."""

    epoch: int
    began: float
    wall_s: float
    is_ended: bool
    results: int
    model_calls: int
    tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Totals:
    """Work done by the whole run, repeats included.

    `invalid_turns` are those in which the orchestrator called no tool that it was offered.
    `repeated_calls` are model calls that succeeded before and were made again, as after a crash.
    `counted_cost_usd` is the part of `cost_usd` that the tasks with a counted result took, in all their
    attempts. `estimated_tokens` are those, prompt and completion, that no endpoint told.
    `cut_prompts` had no room for all that was gathered; `overflows` were prompts that an endpoint
    called too long although they had been counted. `wall_s` adds up the time that each epoch was at work, so
    that the pause before a resume is no part of it.
    """

    epochs: int = 0
    attempts: int = 0
    turns: int = 0
    invalid_turns: int = 0
    model_calls: int = 0
    repeated_calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    estimated_tokens: int = 0
    cost_usd: float = 0.0
    counted_cost_usd: float = 0.0
    cut_prompts: int = 0
    overflows: int = 0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `python -m analysis summary` prints."""

    run_dir: str
    state: State
    facts: dict[str, Any]
    filters: str
    accounting: Accounting
    coverage: Coverage
    calibration: Calibration
    by_category: list[GroupRow]
    by_answer_type: list[GroupRow]
    failures: dict[str, int]
    limits: dict[str, int]
    totals: Totals
    segments: list[Segment]
    spending: list[SpendRow]
    task_cost: TaskCost
    foretold: list[Foretold]
    notes: list[str]


def summarise(log: RunLog) -> RunSummary:
    """Outcomes, accuracy, work, cost and time of the run."""
    results = log.results
    account, notes = _account(log, results)
    segments = _segments(log)
    return RunSummary(
        run_dir=log.name,
        state=_state(log),
        facts=log.facts,
        filters=log.selection.line,
        accounting=account,
        coverage=_coverage(results, account.planned),
        calibration=_calibration(results),
        by_category=_groups(results, "category"),
        by_answer_type=_groups(results, "answer_type"),
        failures=_kinds(results, "failed"),
        limits=_kinds(results, "limited"),
        totals=_totals(log, results, segments),
        segments=segments,
        spending=spending(log),
        task_cost=task_cost(results),
        foretold=foretold(log),
        notes=notes,
    )


def _account(log: RunLog, results: RunLog) -> tuple[Accounting, list[str]]:
    outcomes, right = results.words("outcome"), results.numbers("is_correct")
    rows = [
        Counted(outcomes.names[code], None if np.isnan(is_right) else bool(is_right))
        for code, is_right in zip(outcomes.codes.tolist(), right.tolist(), strict=True)
    ]
    notes = _notes(log)
    planned = _planned(log)
    if isinstance(planned, int) and planned >= len(rows):
        return accounting(rows, planned), notes
    if not isinstance(planned, int):
        notes.append("How many tasks were planned is not in the log: accuracy is over the results.")
    else:
        notes.append(
            f"The log holds {len(rows)} results for {planned} planned tasks: accuracy is over the results."
        )
    return accounting(rows, len(rows)), notes


def _planned(log: RunLog) -> Any:
    """Tasks that were planned, of those that are asked for; no number where the log cannot tell."""
    planned, trials = log.facts.get("planned"), log.facts.get("trials")
    if log.selection.categories or not log.is_of_benchmark:
        return None
    if log.selection.trials and isinstance(planned, int):
        share = len(set(log.selection.trials))
        return planned // trials * share if isinstance(trials, int) and trials > 0 else None
    return planned


def _notes(log: RunLog) -> list[str]:
    notes = []
    if log.selection.tools or log.selection.models or log.selection.statuses:
        notes.append("--tool, --model and --status pick calls: they cut the work down, not the score.")
    trials = log.facts.get("trials")
    if isinstance(trials, int) and trials > 1 and not log.selection.trials:
        notes.append(
            f"The intervals treat the {trials} trials of a task as independent; --trial 0 takes one, "
            "`python -m analysis tau2` takes the task as the unit."
        )
    return notes


def _coverage(results: RunLog, planned: int) -> Coverage:
    judged = ~np.isnan(results.numbers("is_correct")) & ~results.words("outcome").is_in("owed", "failed")
    methods = counts(results.words("verdict_method"), judged)
    n = int(judged.sum())
    by_judge, exact, empty = (methods.get(name, 0) for name in ("judge", "exact", "empty"))
    return Coverage(n, by_judge, exact, empty, n / planned if planned else None)


def _calibration(results: RunLog) -> Calibration:
    sure, right = results.numbers("confidence"), results.numbers("is_correct")
    judged = ~np.isnan(sure) & ~np.isnan(right)
    return calibration(sure[judged], right[judged])


def _groups(results: RunLog, column: Literal["category", "answer_type"]) -> list[GroupRow]:
    words, outcomes = results.words(column), results.words("outcome")
    right = outcomes.is_in("ok") & (results.numbers("is_correct") == 1)
    rows = []
    for code, name in enumerate(words.names):
        mask = words.codes == code
        if n := int(mask.sum()):
            of = {key: int((mask & outcomes.is_in(key)).sum()) for key in ("ok", "failed", "limited", "owed")}
            correct = int((mask & right).sum())
            rows.append(
                GroupRow(
                    name=name or "(none)",
                    n=n,
                    **of,
                    correct=correct,
                    accuracy=correct / n,
                    interval=wilson_interval(correct, n),
                    wald=wald_interval(correct, n),
                )
            )
    return sorted(rows, key=lambda row: (-row.n, row.name if row.name != "(none)" else ""))


def _kinds(results: RunLog, outcome: str) -> dict[str, int]:
    found = counts(results.words("error_kind"), results.words("outcome").is_in(outcome))
    named = {name or "unknown": count for name, count in found.items()}
    return dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))


def _segments(log: RunLog) -> list[Segment]:
    """One row an epoch. A result's duration is that of its task and says nothing of when it was committed."""
    epochs = log.epochs
    rows = np.flatnonzero(log.live)
    place = np.searchsorted(epochs, log.ints("epoch")[rows])
    began_us = log.ints("t_start")[rows]
    spans = np.where(log.kind(*_MARKS)[rows], 0.0, np.nan_to_num(log.numbers("duration_s")[rows]))
    first = np.full(len(epochs), np.iinfo(np.int64).max)
    np.minimum.at(first, place, began_us)
    last = np.full(len(epochs), -np.inf)
    np.maximum.at(last, place, began_us / 1e6 + spans)
    numbers = {name: log.numbers(name)[rows] for name in WORK}

    def count(mask: Mask) -> Any:
        return np.bincount(place[mask[rows]], minlength=len(epochs))

    def total(name: str, mask: Mask) -> Any:
        chosen = mask[rows]
        return np.bincount(place[chosen], np.nan_to_num(numbers[name][chosen]), minlength=len(epochs))

    is_call = log.kind("model_call")
    ended, results, calls = count(log.kind("run_end")), count(log.kind("result")), count(is_call)
    tokens = total("prompt_tokens", is_call) + total("completion_tokens", is_call)
    cost = total("cost_usd", log.kind("model_call", "retrieval", "code"))
    return [
        Segment(
            int(epoch),
            float(first[i] / 1e6),
            float(max(0.0, last[i] - first[i] / 1e6)),
            bool(ended[i]),
            int(results[i]),
            int(calls[i]),
            int(tokens[i]),
            float(cost[i]),
        )
        for i, epoch in enumerate(epochs)
    ]


def _totals(log: RunLog, results: RunLog, segments: list[Segment]) -> Totals:
    calls = log.calls & log.kind("model_call")
    turns = log.tasks & log.kind("turn")
    paid = log.calls & log.kind("model_call", "retrieval", "code")

    def total(name: str, mask: Mask) -> float:
        return float(log.pick(name, mask).sum())

    return Totals(
        epochs=len(segments),
        attempts=int((log.tasks & log.kind("attempt")).sum()),
        turns=int(turns.sum()),
        invalid_turns=int((turns & log.words("status").is_in("invalid")).sum()),
        model_calls=int(calls.sum()),
        repeated_calls=_repeated(log, calls),
        retries=int(total("retries", calls)),
        **{name: int(total(name, calls)) for name in WORK[:3]},
        estimated_tokens=int(sum(total(name, calls & log.is_true("is_estimated")) for name in TOKENS)),
        cost_usd=total("cost_usd", paid),
        counted_cost_usd=float(np.nansum(results.numbers("cost_usd"))),
        cut_prompts=int((np.nan_to_num(log.numbers("context_cut")[calls]) > 0).sum()),
        overflows=int((log.tasks & log.kind("overflow")).sum()),
        wall_s=sum(segment.wall_s for segment in segments),
    )


def _repeated(log: RunLog, calls: Mask) -> int:
    """Successful model calls beyond the first for the same place of the same task."""
    rows = np.flatnonzero(calls & ~log.is_error & (log.ints("call_seq") >= 0))
    if not len(rows):
        return 0
    tasks = [log.words(name) for name in ("rollout_key", "judge_key")]
    key = log.ints("call_seq")[rows]
    for codes, size in [
        *((words.codes[rows].astype(np.int64), len(words.names)) for words in tasks),
        (log.ints("trial")[rows], int(log.ints("trial").max()) + 1),
    ]:
        key = key * size + codes
    ordered = np.sort(key)
    return int((ordered[1:] == ordered[:-1]).sum())


def _state(log: RunLog) -> State:
    if not log.live.any():
        return "empty"
    ended = log.live & log.kind("run_end")
    last = int(log.ints("epoch")[log.live].max())
    return "ended" if (log.ints("epoch")[ended] == last).any() else "not ended"
