import json
from pathlib import Path

import pytest

from ray_app.config import Dataset
from ray_app.dataset import load_tasks, read_scopes
from ray_app.errors import DatasetError


def row(number: int, **changes: object) -> dict[str, object]:
    return {
        "id": f"q{number}",
        "question": f"Question {number}?",
        "answer": str(number),
        "image": "",
    } | changes


def written(path: Path, *rows: dict[str, object] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def dataset(path: Path, **changes: object) -> Dataset:
    return Dataset.model_validate({"path": str(path), "policy": "unscoped"} | changes)


def test_blank_lines_and_odd_separators_are_no_trouble(tmp_path: Path) -> None:
    text = row(1, question="one\u2028two\u0085three")
    path = tmp_path / "q.jsonl"
    path.write_text("\n" + json.dumps(text, ensure_ascii=False) + "\n   \n" + json.dumps(row(2)))
    tasks = load_tasks(dataset(path), None).tasks
    assert [task.task_id for task in tasks] == ["q1", "q2"]
    assert tasks[0].question == "one\u2028two\u0085three"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1), "{broken"], "line 2: not valid JSON"),
        ([row(1), '["list"]'], "line 2: expected a JSON object, got list"),
        ([row(1), row(2, answer="")], "line 2: no answer"),
        ([row(1), "", row(1)], "line 3: id 'q1' stands on line 1 too"),
        ([row(1, answer_type="essay")], "line 1: answer_type 'essay', expected exactMatch or multipleChoice"),
        ([{"question": "x"}], "line 1: no id, answer"),
        ([""], "no question is left to run"),
    ],
)
def test_a_bad_file_is_one_line_with_the_line_number(
    tmp_path: Path, rows: list[dict[str, object] | str], message: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        load_tasks(dataset(written(tmp_path / "q.jsonl", *rows)), None)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'{"id": 1}\n{"id": "\xff"}\n')
    with pytest.raises(DatasetError, match="line 2: not UTF-8"):
        load_tasks(dataset(tmp_path / "q.jsonl"), None)
    with pytest.raises(DatasetError, match="No such file"):
        load_tasks(dataset(tmp_path / "none.jsonl"), None)


def test_scope_policies_say_what_happens_to_a_question_without_a_scope(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", row(1), row(2))
    scopes = tmp_path / "examples.json"
    scopes.write_text('{"q1": [5, 3, 3]}')
    with pytest.raises(DatasetError, match=r"'q2' has no entry.*subset"):
        load_tasks(dataset(path, policy="scoped"), scopes)
    subset = load_tasks(dataset(path, policy="subset"), scopes)
    assert [task.scope for task in subset.tasks] == [(3, 5)]
    assert sum(subset.left_out.values()) == 1
    assert [task.scope for task in load_tasks(dataset(path), scopes).tasks] == [None, None]
    scopes.write_text('{"q1": ["x"]}')
    with pytest.raises(DatasetError, match="expected"):
        read_scopes(scopes)


def test_questions_with_images_are_kept_or_left_out_by_the_subset(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", row(1, image="data:image/png;base64,AAAA"), row(2))
    assert load_tasks(dataset(path), None).tasks[0].images == ("data:image/png;base64,AAAA",)
    text = load_tasks(dataset(path, subset="text"), None)
    assert [task.task_id for task in text.tasks] == ["q2"] and sum(text.left_out.values()) == 1


def test_the_key_of_a_task_is_its_content_and_not_its_place(tmp_path: Path) -> None:
    first = load_tasks(dataset(written(tmp_path / "a.jsonl", row(1), row(2))), None).tasks
    second = load_tasks(
        dataset(written(tmp_path / "b.jsonl", row(2), row(1, answer="corrected"))), None
    ).tasks
    assert first[0].rollout_key == second[1].rollout_key != first[1].rollout_key
    assert first[0].judge_key != second[1].judge_key


def test_the_hub_dataset_needs_a_pinned_revision_and_the_users_token() -> None:
    with pytest.raises(DatasetError, match=r"dataset\.revision"):
        load_tasks(Dataset(path="cais/hle"), None, {"HF_TOKEN": "x"})
    with pytest.raises(DatasetError, match="HF_TOKEN is empty"):
        load_tasks(Dataset(path="cais/hle", revision="abc"), None, {})
