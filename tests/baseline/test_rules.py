"""Each role of the baseline, asked with the prompts that the agent really sends."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from ray_app import extract
from ray_app.baseline import rules
from ray_app.baseline.language import count_tokens
from ray_app.baseline.rules import reply
from ray_app.sample.corpus import load_questions
from tests.baseline.prompts import (
    DOCUMENTS,
    answer_request,
    boxed_request,
    context,
    expert_request,
    tool,
    turn_request,
    user,
)

IF_NOT = " If the documents do not say, answer `not stated`."
NOTHING_FOUND = "search found no new document for 'x'"


@pytest.mark.parametrize(
    ("question", "gathered", "feedback", "expected"),
    [
        ("What is a heap?", "", "", "search"),
        ("What is a heap?", context(), "", "answer"),
        ("What is a heap?", "", NOTHING_FOUND, "answer"),
        ("What is a heap?", "", "search with s-1 wrote no usable query ('x')", "answer"),
        ("Evaluate `sum([1, 2])`.", context(), "", "enhance_reasoning"),
        ("What is the sum of 3 and 4?", context(), "", "enhance_reasoning"),
        ("What is the sum of 3 and 4?", "", NOTHING_FOUND, "enhance_reasoning"),
        ("What is the sum of 3 and 4?", context(output="value: 7"), "", "answer"),
        ("What is the sum of 3 and 4?", context(output="[not run: off]"), "", "answer"),
        ("What is the sum of 3 and 4?", context(), "enhance_reasoning with r-1 wrote no program", "answer"),
    ],
)
def test_orchestrator_looks_first_then_computes_then_answers(
    question: str, gathered: str, feedback: str, expected: str
) -> None:
    made = reply(turn_request(question, gathered, feedback))
    assert [call.name for call in made.tool_calls] == [expected]
    assert json.loads(made.tool_calls[0].arguments) == {"model": f"{expected}-1"}
    assert made.finish_reason == "tool_calls"


@pytest.mark.parametrize("question", ["What is a heap?", "What is the sum of 3 and 4?"])
def test_orchestrator_without_search_and_reasoning_answers(question: str) -> None:
    made = reply(turn_request(question, tools=[tool("answer", "only")]))
    assert [(call.name, call.arguments) for call in made.tool_calls] == [("answer", '{"model": "only"}')]


@pytest.mark.parametrize(
    ("question", "alias"),
    [("What is a heap?", "small"), (f"What is a heap{' and a tree' * 20}?", "large")],
)
def test_orchestrator_takes_the_cheap_alias_for_a_short_question(question: str, alias: str) -> None:
    prices = "large: $1.25 in, $10 out per million. small: $0.2 in, $0.2 out per million."
    tools = [tool("answer", "large", "small", description=prices)]
    made = reply(turn_request(question, context(), tools=tools))
    assert json.loads(made.tool_calls[0].arguments) == {"model": alias}


def test_query_keeps_names_and_rare_words() -> None:
    made = reply(expert_request("search", "Which exception does `heapq.heappop` raise on an empty heap?"))
    assert extract.tagged(made.content, "query") == "exception heapq.heappop raise empty heap"


def test_query_is_the_whole_question_where_key_words_are_too_few() -> None:
    made = reply(expert_request("search", "Which of these is said of `map`?"))
    assert extract.tagged(made.content, "query") == "Which of these is said of `map`?"


def program_output(question: str, gathered: str = "") -> str:
    """What the coder's program prints when it runs on its own."""
    code = extract.program(reply(expert_request("reasoning", question, gathered)).content)
    ast.parse(code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "program", "exec"), {})
    return printed.getvalue().strip()


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Evaluate `sum(divmod(17, 5))`.", "value: 5"),
        ("What does `textwrap.shorten('a b', width=9)` return?", "value: a b"),
        ("What is the remainder when 7 to the power of 3 is divided by 10?", "value: 3"),
        ("What is the remainder when 17 is divided by 5?", "value: 2"),
        ("What is the harmonic mean of 40 and 60?", "value: 48.0"),
        ("Find the median of 9, 1 and 5.", "value: 5"),
        ("In how many ways can 2 books be chosen from 5?", "value: 10"),
        ("How many ways are there to choose 2 books from 5 with order?", "value: 20"),
        ("What is the greatest common divisor of 12 and 18?", "value: 6"),
        ("How many ones has 13 in binary?", "value: 3"),
        ("How many days lie in the days between 2024-02-28 and 2024-03-01?", "value: 2"),
        ("How many of the 17 elements are left?", "numbers of the question: [17]"),
    ],
)
def test_program_prints_what_the_question_asks_to_compute(question: str, expected: str) -> None:
    assert program_output(question) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (
            "Add the default `width` of `textwrap.wrap` and the default `width` of `pprint.pprint`.",
            "value: 150",
        ),
        ("Multiply the default `width` of `textwrap.wrap` by 3.", "value: 210"),
    ],
)
def test_program_takes_defaults_from_the_documents(question: str, expected: str) -> None:
    assert program_output(question, context()) == expected
    assert "value:" not in program_output(question)


READINGS = [
    ("Which exception does `heapq.heappop` raise when the heap is empty?", "IndexError"),
    ("What is the default `width` of `textwrap.wrap`?", "70"),
    ("Which default width is larger, of the two: `textwrap.wrap` or `pprint.pprint`?", "80"),
    ("Which of `textwrap.wrap` and `pprint.pprint` gives a list of lines?", "textwrap.wrap"),
    ("Which function pops the smallest item off a heap?", "heapq.heappop"),
    ("How many bits has the hardware address of `uuid.getnode`?", "48"),
    ("Which king ruled Norway before the war?" + IF_NOT, "not stated"),
    ("What is the default size of `shutil.copy`?" + IF_NOT, "not stated"),
    ("What does `heapq.heappop` do?\nA. Adds an item\nB. Pops the smallest item\nC. Sorts\nD. Nothing", "B"),
    ("Which default `width` has `textwrap.wrap`?\nA. 60\nB. 80\nC. 70\nD. 7", "C"),
]


@pytest.mark.parametrize(("question", "expected"), READINGS)
def test_reader_extracts_the_answer_from_the_documents(question: str, expected: str) -> None:
    tagged = reply(answer_request(question, context())).content
    boxed = reply(boxed_request(question, context())).content
    assert extract.answer(tagged) == extract.answer(boxed) == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [("value: 5\nvalue: 12", "12"), ("[exit status 1]\nvalue: 12", "unknown"), ("[no output]", "unknown")],
)
def test_reader_takes_the_last_value_of_a_program_that_succeeded(output: str, expected: str) -> None:
    made = reply(answer_request("What is the product of 3 and 4?", context((), output)))
    assert extract.answer(made.content) == expected


def test_reader_does_without_documents_and_invents_nothing() -> None:
    assert extract.answer(reply(answer_request("Which class is it?", "")).content) == "unknown"


@pytest.mark.parametrize("ask", [answer_request, boxed_request])
def test_confidence_is_given_when_asked_and_follows_the_support(ask: Any) -> None:
    def stated(question: str) -> int:
        made = reply(ask(question, context(), confidence=True)).content
        return int(extract.tagged(made, "confidence") or "-1")

    assert 5 <= stated("How warm is the deep sea at noon?") < stated(READINGS[0][0]) <= 95
    assert "<confidence>" not in reply(ask(READINGS[0][0], context())).content


def test_options_are_read_without_what_the_instruction_adds() -> None:
    question = "Which default `width` has `textwrap.wrap`?\nA. 60\nB. 70"
    assert extract.answer(reply(boxed_request(question, context(), confidence=True)).content) == "B"


def test_usage_counts_words_and_signs_of_every_message_and_of_the_reply() -> None:
    assert count_tokens("Doc 1: json.dumps(x)") == 9
    request = user("How are you?", "Be kind.")
    made = reply(request)
    assert made.usage.prompt_tokens == 7
    assert made.usage.completion_tokens == count_tokens(made.content) > 0
    assert reply(turn_request("Why?")).usage.completion_tokens > 0


def test_replies_do_not_depend_on_anything_but_the_prompt() -> None:
    request = answer_request(READINGS[0][0], context())
    renamed = {**request, "model": "other", "user": "q-17", "temperature": 1.0}
    assert reply(request) == reply(renamed)


def test_rules_hold_none_of_the_bundled_questions() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(rules.__file__).parent.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = " ".join(node.value for node in nodes if isinstance(node.value, str))
    assert "not stated" in texts
    for row in load_questions():
        named = [name for name in row["sources"] if "." in name]
        assert not [text for text in (row["id"], row["question"], *named) if text in texts]


def test_text_that_is_not_python_documentation_is_read_too() -> None:
    texts = ("The river Ule rises on Mount Or. It is 48 km long.", "The town of Wen has a bridge.")
    made = reply(answer_request("How many km long is the river Ule?", context(texts)))
    assert extract.answer(made.content) == "48"
    assert DOCUMENTS[0] not in made.content
