"""The sixty bundled questions: schema, mix, and that the corpus holds what they ask for."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from ray_app.sample.corpus import corpus_rows, load_questions, question_id
from ray_app.sample.generate import MIX

QUESTIONS = load_questions()
KEYS = {
    *("id", "question", "answer", "answer_type", "category", "raw_subject", "rationale", "image"),
    "sources",
}


@pytest.fixture(scope="module")
def contents() -> dict[str, str]:
    return {row["name"]: row["content"] for row in corpus_rows()}


def test_there_are_sixty_in_the_stated_mix() -> None:
    assert Counter(row["category"] for row in QUESTIONS) == dict(MIX)


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["id"])
def test_row_has_the_hle_columns(row: dict[str, Any]) -> None:
    assert set(row) - {"withheld"} == KEYS
    assert row["id"] == question_id(row["question"])
    assert re.fullmatch(r"[0-9a-f]{24}", row["id"])
    assert row["answer"] and row["rationale"] and row["image"] == ""


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["id"])
def test_sources_exist_and_are_long_enough_to_be_retrieved(
    row: dict[str, Any], contents: dict[str, str]
) -> None:
    names = [*row["sources"], *row.get("withheld", ())]
    assert names
    assert all(len(contents[name]) > 100 for name in names)


def test_a_one_passage_answer_stands_in_its_passage(contents: dict[str, str]) -> None:
    lookups = [row for row in QUESTIONS if row["category"] == "Lookup"]
    missing = [
        row["question"]
        for row in lookups
        if row["answer"].lower() not in " ".join(contents[row["sources"][0]].split()).lower()
    ]
    assert missing == []


def test_a_choice_has_four_options_and_a_letter_for_an_answer() -> None:
    for row in QUESTIONS:
        letters = re.findall(r"^([A-Z])\. ", row["question"], re.MULTILINE)
        is_choice = row["answer_type"] == "multipleChoice"
        assert letters == (list("ABCD") if is_choice else [])
        assert not is_choice or row["answer"] in letters


def test_permission_to_say_not_stated_does_not_give_absence_away() -> None:
    permitted = [row for row in QUESTIONS if "answer `not stated`" in row["question"]]
    answered = [row for row in permitted if row["answer"] != "not stated"]
    assert len(permitted) - len(answered) == 8
    assert len(answered) >= 4
