"""What set the end of a run: a small schedule worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.critical_path import SegmentPath, critical_path
from analysis.log import open_run
from analysis.selection import EVERYTHING, LAST_SEGMENT
from ray_app.records import Event
from tests.analysis.runs import event, model_call, result, write_run

START = event("run_start")


def attempt(task: str, at_s: float, end_s: float, *calls: Event, worker: str = "w1") -> list[Event]:
    """A task on `worker`, with calls whose times count from the attempt's start, and its result."""
    base = {"task": task, "worker": worker}
    first = event("attempt", at_s=at_s, **base)
    inner = [
        replace(call, task_id=task, t_start=call.t_start + at_s, worker=worker, rollout_key=f"rollout-{task}")
        for call in calls
    ]
    # A result says how long its task took; that is no time after its commit.
    return [first, *inner, result(task, "ok", True, at_s=end_s, duration_s=end_s - at_s)]


def two_slots() -> list[Event]:
    return [
        START,
        *attempt("a", 1, 5, model_call("orchestrator", 3.0, queue_s=1.0)),
        *attempt(
            "b",
            1,
            7,
            model_call("expert", 2.0, tool="search"),
            event("retrieval", at_s=2, duration_s=1.0, search_backend="local_only"),
            event("retrieval", at_s=3, duration_s=2.0, search_backend="tavily_fallback"),
            event("code", at_s=5, duration_s=0.5),
            worker="w2",
        ),
        *attempt("c", 5, 8, model_call("judge", 3.0)),
        *attempt("d", 7, 15, event("turn", duration_s=8.0), event("turn", at_s=1), worker="w2"),
        event("run_end", at_s=16),
    ]


def segment_of(tmp_path: Path, rows: list[Event]) -> SegmentPath:
    (segment,) = critical_path(open_run(write_run(tmp_path / "run", rows), LAST_SEGMENT)).segments
    return segment


def test_the_clock_the_slots_and_the_chain(tmp_path: Path) -> None:
    found = segment_of(tmp_path, two_slots())
    phases = found.phases
    assert (phases.before, phases.filling, phases.tail, phases.after) == pytest.approx((1, 6, 8, 1))
    assert (found.attempts, found.slots, found.wall_s) == pytest.approx((4, 2, 16))
    assert found.work_s == pytest.approx(4 + 6 + 3 + 8)
    assert found.ideal_s == pytest.approx(10.5)
    assert found.busy_share == pytest.approx(21 / 28)
    assert (found.idle_filling_s, found.idle_tail_s) == pytest.approx((0, 7))
    assert found.straggler_s == pytest.approx(7)
    assert [task.task_id for task in found.chain] == ["b", "d"]
    assert found.chain_gaps_s == pytest.approx(0)
    assert found.done_at_s["100%"] == pytest.approx(14)
    assert [task.task_id for task in found.slowest] == ["d", "b", "a", "c"]


def test_what_the_last_twentieth_of_the_clock_waited_for(tmp_path: Path) -> None:
    at = {"at_s": 17.0, "model": "m", "endpoint": "http://e"}
    rows = [
        START,
        *attempt("a", 1, 5),
        *attempt("b", 1, 21, model_call("expert", 3.0, queue_s=2.5, **at), worker="w2"),
        *attempt("c", 5, 20.4, event("code", at_s=14.0, duration_s=1.2)),
    ]
    end = segment_of(tmp_path, rows).end
    assert (end.seconds, end.attempts) == pytest.approx((1.0, 2))
    assert [task.task_id for task in end.tasks] == ["b", "c"]
    used = {stage: seconds for stage, seconds in end.stages.items() if seconds > 1e-6}
    assert used == pytest.approx({"queue": 0.5, "expert": 0.5, "code": 0.2, "other": 0.2}, abs=1e-5)
    assert end.routes == pytest.approx({"m at http://e": 1.0, "code": 0.2}, abs=1e-5)


def test_a_tasks_stages_are_disjoint_and_add_up(tmp_path: Path) -> None:
    tasks = {task.task_id: task for task in segment_of(tmp_path, two_slots()).slowest}
    expected = {
        "a": {"queue": 1.0, "orchestrator": 2.0, "other": 1.0},
        "b": {"expert": 2.0, "retrieval": 1.0, "web": 2.0, "code": 0.5, "other": 0.5},
        "c": {"judge": 3.0},
        "d": {"other": 8.0},
    }
    for name, stages in expected.items():
        used = {stage: seconds for stage, seconds in tasks[name].stages.items() if seconds > 1e-6}
        assert used == pytest.approx(stages, abs=1e-5)
        assert sum(tasks[name].stages.values()) == pytest.approx(tasks[name].total_s)
    assert (tasks["d"].turns, tasks["d"].worker, tasks["d"].outcome) == (2, "w2", "ok")


def test_each_segment_has_a_clock_of_its_own(tmp_path: Path) -> None:
    later = [replace(row, epoch=2, t_start=row.t_start + 7200) for row in [START, *attempt("e", 2, 5)]]
    run = write_run(tmp_path / "run", [*two_slots(), *later])
    first, second = critical_path(open_run(run, EVERYTHING)).segments
    assert (first.epoch, first.attempts, second.epoch, second.attempts) == (1, 4, 2, 1)
    assert (second.phases.before, second.wall_s) == pytest.approx((2, 5))
    (last,) = critical_path(open_run(run, LAST_SEGMENT)).segments
    assert last == second


def test_an_attempt_that_has_no_result_yet_lasts_to_its_last_event(tmp_path: Path) -> None:
    rows = [START, event("attempt", at_s=1, task="a"), model_call("expert", 4.0, at_s=2, tool="search")]
    found = segment_of(tmp_path, rows)
    assert found.slowest[0].total_s == pytest.approx(5)
    assert found.slowest[0].outcome == ""


def test_a_run_without_tasks_says_so(tmp_path: Path) -> None:
    found = critical_path(open_run(write_run(tmp_path / "run", [START]), LAST_SEGMENT))
    assert (found.segments, found.note.partition(": ")[2]) == ([], "no task is in the log yet.")
