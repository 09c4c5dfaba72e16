import pytest

from ray_app import extract


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}. Here the set is {1,2}.", "5"),
        (r"\boxed{\frac{1}{2}} and \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{never closed", ""),
        ("no box", ""),
    ],
)
def test_a_box_is_read_with_its_braces_balanced(text: str, found: str) -> None:
    assert extract.boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think><answer>draft</answer></think><answer> final </answer>", "final"),
        ("<ANSWER>x</ANSWER> then <answer>y", "y"),
        ("thoughts</think>42", "42"),
        (r"therefore \boxed{7}", "7"),
        ("Paris", "Paris"),
        ("word " * 21, ""),
        ("<think>cut by the token limit", ""),
    ],
)
def test_the_answer_is_what_the_model_ends_with_and_never_its_whole_reasoning(text: str, found: str) -> None:
    assert extract.answer(text) == found


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("prose\n```Python\nprint(1)\n```\nmore\n```python\nprint(2)\n```", "print(2)"),
        ("first prose\n```\nx = 1\n```", "x = 1"),
        ("```py\r\nprint(3)", "print(3)"),
        ("```python\nprint(1)\n```\n```text\noutput\n```", "print(1)"),
        ("no program at all", ""),
    ],
)
def test_a_program_is_the_last_python_block_and_prose_never_runs(text: str, code: str) -> None:
    assert extract.program(text) == code


def test_the_last_json_object_is_found_in_prose() -> None:
    text = 'First {"correct": "no"} but {broken then {"correct": "yes", "deep": {"a": [1]}} done'
    assert extract.json_object(text) == {"correct": "yes", "deep": {"a": [1]}}
    assert extract.json_object("{nothing") is None
