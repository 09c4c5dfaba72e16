import json
from pathlib import Path
from typing import Any

import pytest

from ray_app.adopt import read_results
from ray_app.errors import DatasetError
from ray_app.records import Task

TASKS = {f"q{n}": Task(f"q{n}", f"Question {n}?", str(n)) for n in range(6)}


def old_result(number: int, **changes: Any) -> dict[str, Any]:
    answered = {"tool": "answer", "pred": f"prediction {number}", "correctness": True}
    return {
        "id": f"q{number}",
        "problem": f"Question {number}?",
        "answer": str(number),
        "correct": True,
        "status": "done",
        "all_message_responses": {"turn_0_message": {}, "turn_1_message": {}},
        "all_tool_responses": {"turn_0_response": [{"tool": "search"}], "turn_1_response": [answered]},
    } | changes


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    for number, row in enumerate(rows):
        (folder / f"{number}.json").write_text(json.dumps(row))
    return folder


def test_a_finished_result_is_taken_with_its_prediction_and_verdict(tmp_path: Path) -> None:
    taken = read_results(written(tmp_path, old_result(1, correct=False)), TASKS)
    (result,) = taken.results
    assert (result.task_id, result.outcome, result.prediction, result.turns) == (
        "q1",
        "ok",
        "prediction 1",
        2,
    )
    assert result.verdict is not None and not result.verdict.is_correct
    assert result.verdict.judge_model == "adopted"
    assert result.rollout_key == TASKS["q1"].rollout_key


def test_a_rollout_that_never_answered_is_limited_and_not_judged(tmp_path: Path) -> None:
    row = old_result(2, correct=False, all_tool_responses={"turn_0_response": [{"tool": "search"}]})
    (result,) = read_results(written(tmp_path, row), TASKS).results
    assert (result.outcome, result.verdict) == ("limited", None)


def test_errors_strangers_and_torn_files_are_refused_and_counted(tmp_path: Path) -> None:
    rows = [
        old_result(1, status="error", error_type="APIError"),
        old_result(2, error_type="X"),
        old_result(9),
        old_result(5, all_tool_responses={"turn_0_response": [{"tool": "search", "tool_error": "boom"}]}),
        old_result(3, answer="another"),
        old_result(4, problem="another question"),
    ]
    written(tmp_path, *rows)
    (tmp_path / "torn.json").write_text('{"id": "q5", "corr')
    (tmp_path / "odd.json").write_text('{"id": "q5", "correct": true, "all_tool_responses": [1]}')
    taken = read_results(tmp_path, TASKS)
    assert taken.results == ()
    assert dict(taken.refused) == {
        "ended in an error": 3,
        "question is not in the dataset": 1,
        "another question text or reference answer": 2,
        "torn or not a result file": 2,
    }


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="found none"):
        read_results(tmp_path, TASKS)
