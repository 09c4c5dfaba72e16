"""Generated questions: repeatable, of the bundled set's mix, and answerable from what they name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from ray_app.sample.corpus import corpus_rows, ids_by_name, load_questions, scope_of
from ray_app.sample.generate import generate

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return corpus_rows()


@pytest.fixture(scope="module")
def made(rows: Rows) -> Rows:
    return generate(rows, 200, seed=7)


def test_a_seed_gives_the_same_questions_and_another_seed_others(rows: Rows, made: Rows) -> None:
    assert generate(rows, 200, seed=7) == made
    shared = {row["id"] for row in made} & {row["id"] for row in generate(rows, 200, seed=8)}
    assert len(shared) < 40


def test_ids_differ_and_the_mix_is_the_bundled_one(made: Rows) -> None:
    assert len({row["id"] for row in made}) == 200
    bundled = Counter(row["category"] for row in load_questions())
    counts = Counter(row["category"] for row in made)
    assert all(abs(counts[name] / 200 - number / 60) < 0.02 for name, number in bundled.items())


def test_rows_have_the_bundled_columns_and_usable_scopes(rows: Rows, made: Rows) -> None:
    ids, columns = ids_by_name(rows), set(load_questions()[0]) | {"withheld"}
    for row in made:
        assert set(row) | {"withheld"} == columns
        scope = set(scope_of(row, ids))
        assert {ids[name] for name in row["sources"]} <= scope
        assert not {ids[name] for name in row.get("withheld", ())} & scope


def test_a_lookup_answer_stands_in_its_passage(rows: Rows, made: Rows) -> None:
    contents = {row["name"]: " ".join(row["content"].split()) for row in rows}
    lookups = [row for row in made if row["category"] == "Lookup"]
    assert [row["question"] for row in lookups if row["answer"] not in contents[row["sources"][0]]] == []


def test_absent_answers_come_with_the_permission_and_withheld_passages(made: Rows) -> None:
    absent = [row for row in made if row["category"] == "Absent"]
    assert absent
    assert all(row["answer"] == "not stated" and row["withheld"] for row in absent)
    assert all(row["question"].endswith("answer `not stated`.") for row in absent)
