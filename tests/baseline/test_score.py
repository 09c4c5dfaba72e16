"""What the baseline scores, through the real agent, judge and sandbox: a floor, and honestly so.

As `benchmarks.baseline`, with documents found by shared words, so that no encoder is needed; scopes are
small enough for both to find nearly the same documents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.baseline import Score, scopes_of, score
from ray_app.records import Hit, Retrieval
from ray_app.sample.corpus import corpus_rows, load_questions
from ray_app.sample.generate import generate

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class SharedWords:
    """Finds the documents of a scope that share most words with the query."""

    contents: Sequence[str]
    scopes: Mapping[str, Sequence[int]]

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        wanted = words(query)
        found = [self._hit(number, wanted) for number in self.scopes[scope_id or ""]]
        best = sorted(
            (hit for hit in found if hit.score > 0 and len(hit.text) > 100), key=lambda hit: -hit.score
        )
        return Retrieval(tuple(best[:top_k]))

    def _hit(self, number: int, wanted: set[str]) -> Hit:
        text = self.contents[number]
        return Hit(number, text, len(wanted & words(text)) / max(1, len(wanted)))


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", text.lower()))


@pytest.fixture(scope="module")
def rows() -> Rows:
    return corpus_rows()


async def scored(rows: Rows, questions: Rows, *changes: str) -> Score:
    scopes = scopes_of(rows, questions)
    source = SharedWords([row["content"] for row in rows], scopes)
    return await score(questions, scopes, source, *changes)


async def test_score_is_a_floor_that_leaves_room_and_depends_on_search_and_code(rows: Rows) -> None:
    questions = load_questions()
    whole = await scored(rows, questions)
    assert 0.35 <= whole.of() <= 0.75
    blind = await scored(rows, questions, "retriever.enabled=false")
    assert blind.of() <= whole.of() - 0.15
    idle = await scored(rows, questions, "code.enabled=false")
    assert idle.of("Computation") < 0.2 < whole.of("Computation")


async def test_score_under_the_other_protocol_is_the_same(rows: Rows) -> None:
    questions = load_questions()
    assert await scored(rows, questions, "protocol=hle-style") == await scored(rows, questions)


async def test_score_holds_on_questions_that_the_rules_were_not_written_for(rows: Rows) -> None:
    known, fresh = await scored(rows, load_questions()), await scored(rows, generate(rows, 200, seed=7))
    assert abs(fresh.of() - known.of()) <= 0.15
