"""What the baseline scores, through the real agent, judge and sandbox: a floor, and honestly so.

The model is called in-process and documents are found by shared words, so that no server and no encoder
is needed; scopes are small enough for both to find nearly the same documents.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ray_app.baseline.rules import reply
from ray_app.chat import ChatRequest, as_openai
from ray_app.config import RunConfig, load
from ray_app.hle import make_solver, sandbox_of
from ray_app.prompting import load_prompts
from ray_app.records import ChatReply, Hit, Task
from ray_app.sample.corpus import corpus_rows, ids_by_name, load_questions, scope_of
from ray_app.sample.generate import generate
from ray_app.sandbox import available_isolation
from tests.stand_ins import MemoryLog, journal

CONFIG = Path(__file__).parents[2] / "configs" / "hle_sample.yaml"
Rows = list[dict[str, Any]]


class InProcessBaseline:
    """The baseline as a chat client, without a server."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        messages = [as_openai(message) for message in request.messages]
        made = reply({"messages": messages, "tools": list(request.tools)})
        return ChatReply(made.content, made.tool_calls, made.finish_reason, made.usage, request.model)


@dataclass(frozen=True)
class SharedWords:
    """Finds the documents of a scope that share most words with the query."""

    contents: Sequence[str]
    scopes: Mapping[str, Sequence[int]]

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> list[Hit]:
        wanted = words(query)
        found = [self._hit(number, wanted) for number in self.scopes[scope_id or ""]]
        best = sorted(
            (hit for hit in found if hit.score > 0 and len(hit.text) > 100), key=lambda hit: -hit.score
        )
        return best[:top_k]

    def _hit(self, number: int, wanted: set[str]) -> Hit:
        text = self.contents[number]
        return Hit(number, text, len(wanted & words(text)) / max(1, len(wanted)))


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", text.lower()))


@dataclass(frozen=True)
class Score:
    """Shares of right verdicts: over all, and of one category."""

    verdicts: Sequence[tuple[str, bool]]

    def of(self, category: str = "") -> float:
        chosen = [is_right for name, is_right in self.verdicts if category in ("", name)]
        return sum(chosen) / len(chosen)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return corpus_rows()


async def score(rows: Rows, questions: Rows, *overrides: str) -> Score:
    config = load(CONFIG, overrides, environ={})
    scopes = {row["id"]: scope_of(row, ids_by_name(rows)) for row in questions}
    source = SharedWords([row["content"] for row in rows], scopes)
    turnstile = asyncio.Semaphore(2)  # the sandbox starts a process each
    found = await asyncio.gather(*(_verdict(config, source, row, turnstile) for row in questions))
    return Score(list(zip((row["category"] for row in questions), found, strict=True)))


async def _verdict(
    config: RunConfig, source: SharedWords, row: Mapping[str, Any], turn: asyncio.Semaphore
) -> bool:
    task = Task(
        row["id"], row["question"], row["answer"], row["answer_type"], scope=tuple(source.scopes[row["id"]])
    )
    solver = make_solver(
        config, load_prompts(), InProcessBaseline(), source, sandbox_of(config, available_isolation())
    )
    async with turn:
        solved = await solver.solve(task, journal(task, MemoryLog()))
    assert solved.verdict is not None
    return solved.verdict.is_correct


async def test_score_is_a_floor_that_leaves_room_and_depends_on_search_and_code(rows: Rows) -> None:
    questions = load_questions()
    whole = await score(rows, questions)
    assert 0.35 <= whole.of() <= 0.75
    blind = await score(rows, questions, "retriever.enabled=false")
    assert blind.of() <= whole.of() - 0.15
    idle = await score(rows, questions, "code.enabled=false")
    assert idle.of("Computation") < 0.2 < whole.of("Computation")


async def test_score_under_the_other_protocol_is_the_same(rows: Rows) -> None:
    questions = load_questions()
    assert await score(rows, questions, "protocol=hle-style") == await score(rows, questions)


async def test_score_holds_on_questions_that_the_rules_were_not_written_for(rows: Rows) -> None:
    known, fresh = await score(rows, load_questions()), await score(rows, generate(rows, 200, seed=7))
    assert abs(fresh.of() - known.of()) <= 0.15
