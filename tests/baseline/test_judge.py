"""The baseline judge: which answers agree, and replies that both protocols can read."""

from __future__ import annotations

import pytest

from ray_app import judge as protocols
from ray_app.baseline.judge import same
from ray_app.baseline.rules import reply
from ray_app.records import Task
from tests.baseline.prompts import PROMPTS, user


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        ("KeyError", "KeyError"),
        ("the `KeyError`", "keyerror"),
        ("heappop", "heapq.heappop"),
        ("heapq.heappop()", "heapq.heappop"),
        ("1,000,000", "1000000"),
        ("45.0", "45"),
        ("three", "3"),
        ("returned in LIFO order", "LIFO"),
        ("B. The smaller one", "B"),
        ("(B)", "B"),
    ],
)
def test_answers_agree(candidate: str, reference: str) -> None:
    assert same(candidate, reference)[0]


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        ("", "KeyError"),
        ("KeyError", "IndexError"),
        ("KeyErrors", "KeyError"),
        ("push", "heapq.heappush"),
        ("45.1", "45"),
        ("4", "48"),
        ("LIFO or, if last is false, the order in which they came", "LIFO"),
        ("A", "B"),
        ("Because", "B"),
        ("not stated", "stated by the author"),
    ],
)
def test_answers_differ(candidate: str, reference: str) -> None:
    assert not same(candidate, reference)[0]


@pytest.mark.parametrize("protocol", ["toolorchestra", "hle-style"])
@pytest.mark.parametrize(("prediction", "is_correct"), [("48 bits", True), ("64", False)])
def test_verdicts_are_readable_under_both_protocols(
    protocol: protocols.Protocol, prediction: str, is_correct: bool
) -> None:
    task = Task("t", "How long?\n\nReference answer: none of your business.", "48")
    response = f"I looked.\n\nIt says so.\n<answer>{prediction}</answer>\n<confidence>70</confidence>"
    asked = protocols.prompt(PROMPTS, task, prediction, response, protocol)
    verdict = protocols.read(reply(user(asked)).content, prediction, "baseline", protocol)
    assert verdict.is_correct is is_correct
    assert verdict.extracted == prediction
    assert verdict.confidence == (0.7 if protocol == "hle-style" else None)


def test_a_response_without_tags_is_judged_by_its_last_line() -> None:
    asked = protocols.prompt(
        PROMPTS, Task("t", "How long?", "48"), "", "Let me see.\n" * 30 + "48", "hle-style"
    )
    assert protocols.read(reply(user(asked)).content, "", "baseline", "hle-style").is_correct
