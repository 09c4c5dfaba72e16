"""The sample corpus of the Python that runs the tests, and the scopes over it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from ray_app.errors import DatasetError
from ray_app.sample.corpus import (
    corpus_rows,
    ids_by_name,
    load_questions,
    scope_of,
    write_corpus,
    write_scopes,
)

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return corpus_rows()


def test_has_about_four_thousand_documents_most_of_them_long_enough_to_be_found(rows: Rows) -> None:
    assert 3500 < len(rows) < 4800
    assert 2200 < sum(len(row["content"]) > 100 for row in rows) < 3500


def test_two_walks_give_the_same_rows_with_ids_in_name_order(rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "corpus.jsonl"
    assert write_corpus(path) == len(rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert [row["name"] for row in rows] == sorted({row["name"] for row in rows})


def test_a_document_starts_with_its_name_and_holds_no_address_of_this_process(rows: Rows) -> None:
    assert all(row["content"].startswith(row["name"]) for row in rows)
    assert not any(" at 0x" in row["content"] for row in rows)


def test_private_names_are_left_out(rows: Rows) -> None:
    parts = {part for row in rows for part in row["name"].split(".")}
    assert not [part for part in parts if part.startswith("_")]


def test_every_question_has_a_scope_of_real_size_with_its_sources_and_without_what_it_withholds(
    rows: Rows, tmp_path: Path
) -> None:
    questions, ids = load_questions(), ids_by_name(rows)
    path = tmp_path / "examples.json"
    write_scopes(questions, ids, path)
    scopes = json.loads(path.read_text())
    assert set(scopes) == {question["id"] for question in questions}
    for question in questions:
        scope = scopes[question["id"]]
        assert scope == sorted(set(scope))
        assert 30 <= len(scope) <= 300
        assert {ids[name] for name in question["sources"]} <= set(scope)
        assert not {ids[name] for name in question.get("withheld", ())} & set(scope)
    assert 70 < median(len(scope) for scope in scopes.values()) < 130


def test_a_scope_depends_on_the_question_and_not_on_its_id(rows: Rows) -> None:
    ids, question = ids_by_name(rows), load_questions()[0]
    again = scope_of({**question, "id": "0" * 24}, ids)
    other = scope_of({**question, "question": question["question"] + " Why?"}, ids)
    assert scope_of(question, ids) == again
    assert again != other


def test_a_source_that_this_python_lacks_is_an_error_that_names_it(rows: Rows) -> None:
    question = {"id": "q", "question": "?", "sources": ["json.no_such_thing"]}
    with pytest.raises(DatasetError, match=r"json\.no_such_thing"):
        scope_of(question, ids_by_name(rows))
