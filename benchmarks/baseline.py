"""What the baseline scores: `python -m benchmarks.baseline`. A floor, and honestly so.

Through the real agent, judge, sandbox, encoder and exact scoped search, in one process: the model is
called without a server. 60 bundled questions, and 200 that the generator makes (seeded); each with
everything on, without search, and without code execution.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.figures import Figure, report
from ray_app.baseline.rules import reply
from ray_app.chat import ChatRequest, as_openai
from ray_app.config import RunConfig, load
from ray_app.hle import make_solver, sandbox_of
from ray_app.journal import Journal
from ray_app.prompting import load_prompts
from ray_app.records import ChatReply, Event, Retrieval, Task
from ray_app.sample.corpus import corpus_rows, ids_by_name, load_questions, scope_of
from ray_app.sample.generate import generate
from ray_app.sandbox import available_isolation
from ray_app.tools.search import DocumentSource

if TYPE_CHECKING:
    from ray_app.retrieval.search import LocalRetriever

CONFIG = Path(__file__).parent.parent / "configs" / "hle_sample.yaml"
IN_FLIGHT = 8
Rows = list[dict[str, Any]]


class InProcessBaseline:
    """The baseline as a chat client, without a server."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        messages = [as_openai(message) for message in request.messages]
        made = reply({"messages": messages, "tools": list(request.tools)})
        return ChatReply(made.content, made.tool_calls, made.finish_reason, made.usage, request.model)


class NoLog:
    """An event sink for a run that is only scored."""

    def append(self, event: Event) -> str:
        return ""

    def payload(self, body: str, media: str = "json") -> str:
        return ""


@dataclass(frozen=True)
class Score:
    """Shares of right verdicts: over all, and of one category."""

    verdicts: Sequence[tuple[str, bool]]

    def of(self, category: str = "") -> float:
        chosen = [is_right for name, is_right in self.verdicts if category in ("", name)]
        return sum(chosen) / len(chosen)


async def score(
    questions: Rows, scopes: Mapping[str, Sequence[int]], source: DocumentSource, *changes: str
) -> Score:
    """The baseline's score under `configs/hle_sample.yaml` with `changes` (`key=value`)."""
    config, turn = load(CONFIG, changes, environ={}), asyncio.Semaphore(IN_FLIGHT)
    solving = (_is_right(config, source, row, tuple(scopes[row["id"]]), turn) for row in questions)
    found = await asyncio.gather(*solving)
    return Score(list(zip((row["category"] for row in questions), found, strict=True)))


async def _is_right(
    config: RunConfig,
    source: DocumentSource,
    row: Mapping[str, Any],
    scope: tuple[int, ...],
    turn: asyncio.Semaphore,
) -> bool:
    task = Task(row["id"], row["question"], row["answer"], row["answer_type"], scope=scope)
    sandbox = sandbox_of(config, available_isolation())
    solver = make_solver(config, load_prompts(), InProcessBaseline(), source, sandbox)
    async with turn:
        solved = await solver.solve(task, Journal(task, NoLog(), Event("attempt", 0.0)))
    return solved.verdict is not None and solved.verdict.is_correct


def scopes_of(rows: Rows, questions: Rows) -> dict[str, list[int]]:
    """Question id -> allowed document ids."""
    ids = ids_by_name(rows)
    return {row["id"]: scope_of(row, ids) for row in questions}


def encoded(rows: Rows, scopes: Mapping[str, Sequence[int]], folder: Path) -> DocumentSource:
    """The real retriever over the corpus, its index built in `folder` once."""
    import json

    from ray_app.retrieval.build import ensure_index
    from ray_app.retrieval.encoder import load_encoder
    from ray_app.retrieval.search import Filters, LocalRetriever, open_searcher

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "examples.json").write_text(json.dumps(scopes))
    encoder = load_encoder(threads=os.cpu_count())
    index = ensure_index(folder / "corpus.jsonl", encoder, folder / "indexes", _say)
    searcher = open_searcher(index, folder / "examples.json", encoder, Filters())
    return WithoutWeb(LocalRetriever(searcher, encoder))


@dataclass(frozen=True)
class WithoutWeb:
    """The retriever of this process, which has nothing to fall back on."""

    local: LocalRetriever

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        return Retrieval(tuple(await self.local.retrieve(query, scope_id, top_k)))


def _say(done: int, total: int) -> None:
    if done % 1024 < 32 or done == total:
        print(f"index: {done} of {total} documents embedded", file=sys.stderr, flush=True)


async def measure(folder: Path) -> list[Figure]:
    """The figures, in the order in which they are read."""
    rows = corpus_rows()
    known, fresh = load_questions(), generate(rows, 200, seed=7)
    scopes = scopes_of(rows, known + fresh)
    source = encoded(rows, scopes, folder)
    whole = await score(known, scopes, source)
    blind = await score(known, scopes, source, "retriever.enabled=false")
    idle = await score(known, scopes, source, "code.enabled=false")
    other = await score(fresh, scopes, source)
    return [
        Figure("score on the 60 questions", whole.of(), ">=", 0.35),
        Figure("score on the 60 questions, at most", whole.of(), "<=", 0.75),
        Figure("distance to 200 generated questions", abs(other.of() - whole.of()), "<=", 0.15),
        Figure("fall without search", whole.of() - blind.of(), ">=", 0.15),
        Figure("computational questions without code execution", idle.of("Computation"), "<", 0.2),
    ]


def main(json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None) -> None:
    """Score the baseline on the sample and on generated questions."""
    from ray_app.rundir import home

    raise typer.Exit(report(asyncio.run(measure(home() / "benchmarks" / "baseline")), json))


if __name__ == "__main__":
    typer.run(main)
