"""The page about a run: accounting, groups, work and notes, over small logs with known answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.log import open_run
from analysis.numbers import wald_interval, wilson_interval
from analysis.selection import Selection
from analysis.summary import RunSummary, summarise
from ray_app.records import Event
from tests.analysis.runs import event, model_call, result, run_start, write_run


def summary_of(tmp_path: Path, *rows: Event) -> RunSummary:
    return summarise(open_run(write_run(tmp_path / "run", rows)))


def test_every_planned_task_is_somewhere_and_accuracy_is_over_all(tmp_path: Path) -> None:
    run = summary_of(
        tmp_path,
        run_start(6, judge_model="j"),
        result("a", "ok", True, category="Math", answer_type="exactMatch"),
        result("b", "ok", False, category="Math", answer_type="multipleChoice"),
        result("c", "limited", category="Physics", answer_type="exactMatch"),
        result("d", "failed", category="Math", answer_type="exactMatch", error_kind="model"),
        result("e", "owed", answer_type="exactMatch"),
    )
    account = run.accounting
    assert (account.planned, account.ok, account.pending, account.correct) == (6, 2, 1, 1)
    assert account.accuracy == pytest.approx(1 / 6)
    assert [(row.name, row.n, row.correct) for row in run.by_category] == [
        ("Math", 3, 1),
        ("(none)", 1, 0),
        ("Physics", 1, 0),
    ]
    exact = run.by_answer_type[0]
    assert (exact.name, exact.n, exact.limited, exact.failed, exact.owed) == ("exactMatch", 4, 1, 1, 1)
    assert (exact.accuracy, exact.interval) == (0.25, wilson_interval(1, 4))
    assert run.failures == {"model": 1}
    assert run.facts == {"planned": 6, "protocol": "own", "judge_model": "j"}
    assert run.notes == []


def test_a_verdict_given_later_replaces_the_owed_one(tmp_path: Path) -> None:
    later = replace(result("a", "ok", True), epoch=2)
    run = summary_of(tmp_path, run_start(1), result("a", "owed"), later)
    assert (run.accounting.ok, run.accounting.owed, run.accounting.accuracy) == (1, 0, 1.0)


def test_the_pause_before_a_resume_is_no_work(tmp_path: Path) -> None:
    run = summary_of(
        tmp_path,
        event("attempt", at_s=0),
        model_call("orchestrator", at_s=10, duration_s=5.0),
        event("attempt", at_s=7200, epoch=2),
        model_call("judge", at_s=7203, duration_s=4.0, epoch=2),
        # Committed at 7208 with the duration of its whole task, most of it before the pause.
        event("result", at_s=7208, epoch=2, outcome="ok", duration_s=22.0),
    )
    assert run.totals.epochs == 2
    assert run.totals.wall_s == pytest.approx(15.0 + 8.0)


def test_repeats_are_counted_and_paid_but_a_retry_after_an_error_is_no_repeat(tmp_path: Path) -> None:
    paid: dict[str, Any] = {"cost_usd": 0.5, "prompt_tokens": 100, "cached_tokens": 40}
    run = summary_of(
        tmp_path,
        model_call("orchestrator", call_seq=0, **paid),
        model_call("orchestrator", call_seq=0, epoch=2, **paid),
        model_call("expert", call_seq=1, status="error", completion_tokens=7),
        model_call("expert", call_seq=1, epoch=2, retries=2, **paid),
        model_call("orchestrator", call_seq=0, trial=1, **paid),
        model_call("orchestrator", call_seq=0, is_replayed=True, epoch=2, **paid),
        event("turn", task="a", status="invalid"),
        event("turn", task="a"),
        result("a", "ok", True, cost_usd=1.0),
    )
    totals = run.totals
    assert (totals.model_calls, totals.repeated_calls, totals.retries) == (5, 1, 2)
    assert (totals.turns, totals.invalid_turns) == (2, 1)
    assert (totals.prompt_tokens, totals.completion_tokens, totals.cached_tokens) == (400, 7, 160)
    assert (totals.cost_usd, totals.counted_cost_usd) == (2.0, 1.0)


def test_the_newest_run_start_speaks_and_the_newest_epoch_decides_the_state(tmp_path: Path) -> None:
    ended = [run_start(3), event("run_end", at_s=9)]
    first = summary_of(tmp_path / "ended", *ended)
    resumed = summary_of(tmp_path / "resumed", replace(run_start(5), epoch=2), *ended)
    assert (first.state, first.accounting.planned) == ("ended", 3)
    assert (resumed.state, resumed.accounting.planned) == ("not ended", 5)


@pytest.mark.parametrize("detail", ["", "no json", "[1]", '{"planned": "many"}'])
def test_a_log_that_does_not_say_what_was_planned_gets_a_note(tmp_path: Path, detail: str) -> None:
    run = summary_of(tmp_path, event("run_start", detail=detail), result("a", "ok", True))
    assert run.accounting.planned == 1
    assert "not in the log" in run.notes[0]


def test_more_results_than_planned_gets_a_note(tmp_path: Path) -> None:
    run = summary_of(tmp_path, run_start(1), result("a", "ok", True), result("b", "ok", False))
    assert (run.accounting.planned, run.accounting.accuracy) == (2, 0.5)
    assert run.notes == ["The log holds 2 results for 1 planned tasks: accuracy is over the results."]


def test_an_empty_log_is_a_state_of_its_own(tmp_path: Path) -> None:
    run = summary_of(tmp_path)
    assert (run.state, run.accounting.accuracy, run.totals.wall_s) == ("empty", None, 0.0)


def test_the_score_says_how_it_was_judged_and_how_sure_it_was(tmp_path: Path) -> None:
    sure: dict[str, Any] = {"confidence": 0.75, "verdict_method": "judge"}
    run = summary_of(
        tmp_path,
        run_start(5),
        result("a", "ok", True, **sure),
        result("b", "ok", False, **sure),
        result("c", "ok", True, verdict_method="exact"),
        result("d", "limited", error_kind="limit"),
        result("e", "owed"),
    )
    found = run.coverage
    assert (found.judged, found.by_judge, found.exact, found.empty, found.share) == (3, 2, 1, 0, 0.6)
    assert (run.calibration.n, run.calibration.all_bins, run.calibration.official) == (2, 0.25, None)
    assert "needs 200" in run.calibration.note
    assert run.limits == {"limit": 1}
    assert run.accounting.wald == wald_interval(2, 5)


def test_each_segment_has_its_row_and_the_score_is_of_all(tmp_path: Path) -> None:
    later: dict[str, Any] = {"epoch": 2, "at_s": 100.0}
    rows = [
        run_start(2, trials=1),
        model_call("orchestrator", prompt_tokens=5, cost_usd=1.0),
        result("a", "ok", True),
        event("run_start", detail='{"planned": 2}', **later),
        model_call("orchestrator", prompt_tokens=7, cost_usd=2.0, **later),
        result("b", "ok", True, **later),
        event("run_end", epoch=2, at_s=103.0),
    ]
    run = summary_of(tmp_path, *rows)
    assert [(row.epoch, row.is_ended, row.results, row.tokens, row.cost_usd) for row in run.segments] == [
        (1, False, 1, 5, 1.0),
        (2, True, 1, 7, 2.0),
    ]
    assert [row.wall_s for row in run.segments] == pytest.approx([1.0, 3.0])
    # The last segment is what other commands look at; a score is the run's.
    log = open_run(tmp_path / "run", Selection())
    assert summarise(log).accounting.correct == 2


def test_a_trial_or_a_category_alone_is_scored_over_its_own_tasks(tmp_path: Path) -> None:
    rows = [
        run_start(4, trials=2),
        result("a", "ok", True, category="Math"),
        result("a", "ok", False, category="Math", trial=1),
        result("b", "ok", True, category="Law"),
    ]
    run = write_run(tmp_path / "run", rows)
    one = summarise(open_run(run, Selection(trials=(1,))))
    assert (one.accounting.planned, one.accounting.correct, one.accounting.pending) == (2, 0, 1)
    math = summarise(open_run(run, Selection(categories=("Math",))))
    assert (math.accounting.planned, math.accounting.correct) == (2, 1)
    assert "trials of a task as independent" in summarise(open_run(run)).notes[0]


def test_spending_is_told_by_kind_and_model_and_prompts_that_were_cut_are_counted(tmp_path: Path) -> None:
    run = summary_of(
        tmp_path,
        model_call("expert", tool="search", model="big", cost_usd=0.5, prompt_tokens=90, context_cut=30),
        model_call("judge", model="big", status="error", cost_usd=0.25, completion_tokens=10, context_cut=0),
        model_call("orchestrator", model="small", cost_usd=0.001),
        event("overflow", task="a", status="error", model="big", context_cut=30),
        event("retrieval", task="a", web_calls=3, cost_usd=0.03),
        event("retrieval", task="a", web_calls=0, cost_usd=0.0),
        event("code", task="a", cost_usd=0.002),
        result("a", "ok", True, cost_usd=0.7),
        result("b", "ok", True, cost_usd=0.083),
    )
    assert [(row.kind, row.model, row.calls, row.tokens) for row in run.spending] == [
        ("models", "big", 2, 100),
        ("web", "", 3, 0),
        ("code", "", 1, 0),
        ("models", "small", 1, 0),
    ]
    assert sum(row.cost_usd for row in run.spending) == pytest.approx(run.totals.cost_usd)
    assert (run.totals.cut_prompts, run.totals.overflows) == (1, 1)
    assert (run.task_cost.most_usd, run.task_cost.most_task) == (0.7, "a")
    assert (run.task_cost.mean_usd, run.task_cost.p50_usd) == pytest.approx((0.3915, 0.3915))
