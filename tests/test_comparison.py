"""Which calls led to a counted result, and where two runs of a task part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_app.comparison import NOTHING, Decision, Trace, compare, first_difference, traces
from ray_app.event_writer import EventWriter
from ray_app.records import Event
from tests.event_logs import make_writer, result

KEY = ("r", 0)


def call(log: EventWriter, attempt: int, seq: int, request: str, epoch: int = 1, **fields: Any) -> None:
    place = {"rollout_key": "r", "task_id": "t", "epoch": epoch, "attempt": attempt, "turn": seq}
    row = Event("model_call", 100.0 * epoch + 10 * attempt + seq, call_seq=seq, request_hash=request, **place)  # type: ignore[arg-type]
    log.append(replace(row, role="orchestrator", payload_hash=f"out of {request}", **fields))


def test_the_way_to_a_result_has_what_it_was_served_and_what_it_asked_and_no_call_beside_it(
    tmp_path: Path,
) -> None:
    log = make_writer(tmp_path)
    for seq, request in enumerate(("a", "b", "left", "left too", "left behind")):
        call(log, 1, seq, request)
    # After a change of the agent: two calls served, one asked otherwise, one failed and asked again.
    call(log, 2, 2, "c", epoch=2)
    call(log, 2, 3, "d", epoch=2, status="error", error_kind="model")
    call(log, 2, 3, "d2", epoch=2)
    # Of a pass by another judge, and of a driver that came later and was stopped.
    call(log, 2, 0, "opinion", epoch=3, alias="second", status="ok")
    call(log, 3, 4, "later", epoch=3)
    call(log, 3, 2, "later", epoch=3)
    detail = json.dumps({"model_calls": 2, "replayed_calls": 2})
    log.append(result("ok", epoch=2, attempt=2, detail=detail, payload_hash="answer"))
    log.close()
    trace = traces(tmp_path)[KEY]
    assert [(one.request, one.status) for one in trace.decisions] == [
        ("a", "ok"),
        ("b", "ok"),
        ("c", "ok"),
        ("d", "failed (model)"),
        ("d2", "ok"),
    ]
    assert (trace.outcome, trace.answer) == ("ok", "answer")


ONE = Decision(0, 0, "orchestrator model_call", "a" * 32, "b" * 32, "ok")
TWO = Decision(1, 1, "search/search-1 model_call", "c" * 32, "d" * 32, "ok")
TRACE = Trace("t", (ONE, TWO), "ok", "", "e" * 32)


@pytest.mark.parametrize(
    ("changed", "place", "recorded", "now"),
    [
        ({"label": "answer/answer-1 model_call"}, (1, 1), TWO.label, "answer/answer-1 model_call"),
        ({"request": "f" * 32}, (1, 1), f"{TWO.label}, request cccccccc", "the same, request ffffffff"),
        ({"output": "f" * 32}, (1, 1), f"{TWO.label}, output dddddddd", "the same, output ffffffff"),
        ({"status": "failed (model)"}, (1, 1), f"{TWO.label}, ok", "the same, failed (model)"),
        ({"turn": 2}, (2, 1), f"{TWO.label}, turn 1", "the same, turn 2"),
    ],
)
def test_the_first_other_decision_is_told_old_beside_new(
    changed: dict[str, Any], place: tuple[int, int], recorded: str, now: str
) -> None:
    found = first_difference(TRACE, replace(TRACE, decisions=(ONE, replace(TWO, **changed))))
    assert found is not None
    assert ((found.turn, found.call), found.recorded, found.now) == (place, recorded, now)


def test_a_task_that_ends_sooner_or_later_or_otherwise_diverges() -> None:
    shorter = replace(TRACE, decisions=(ONE,))
    sooner, later = first_difference(TRACE, shorter), first_difference(shorter, TRACE)
    assert sooner and (sooner.recorded, sooner.now) == (TWO.label, NOTHING)
    assert later and (later.recorded, later.now) == (NOTHING, TWO.label)
    for other, words in (
        ({"outcome": "owed"}, ("ok", "owed")),
        ({"error_kind": "judge"}, ("no error", "judge")),
        ({"answer": "f" * 32}, ("answer eeeeeeee", "answer ffffffff")),
    ):
        found = first_difference(TRACE, replace(TRACE, **other))  # type: ignore[arg-type]
        assert found and (found.recorded, found.now, found.call) == (*words, -1)
    assert first_difference(TRACE, TRACE) is None


def test_what_could_not_be_compared_is_counted_and_nothing_replayed_is_no_success() -> None:
    found = compare({KEY: TRACE}, {KEY: TRACE, ("other", 0): TRACE}, planned=3)
    assert (found.equal, found.missing, found.exit_code) == (1, 2, 0)
    assert "1 tasks, 1 equal, 0 diverged; 2 of the plan have nothing to compare" in found.line()
    assert compare({KEY: TRACE}, {}, planned=1).exit_code == 1
    # What is recorded has to come again.
    found = compare({KEY: TRACE, ("other", 0): TRACE}, {KEY: TRACE}, planned=3)
    assert (found.equal, found.lost, found.missing, found.exit_code) == (1, 1, 2, 1)
    assert "0 diverged; 1 recorded have no result here; 1 of the plan have nothing" in found.line()
