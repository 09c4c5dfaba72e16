"""What a task has gathered, and how much of it a prompt carries.

Text is cut from the front: the earliest, lowest-ranked documents go first and code is last and
safest. Cuts are counted in the called model's own tokens and never touch the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_app.config import ContextBudget
from ray_app.records import ExecutionResult, Hit
from ray_app.tokens import TokenCounter, count, tail

FENCE = "```"
DOCUMENTS_HEADING = "Documents:\n\n"
CODE_HEADING = "Python programs that were run, with their output:\n\n"
MAX_STDERR_CHARS = 2000


@dataclass(frozen=True, slots=True)
class CodeRun:
    """A program and what the next turn sees of its run: output, and failure where there was one."""

    code: str
    output: str

    @classmethod
    def of(cls, code: str, result: ExecutionResult) -> CodeRun:
        parts = [result.stdout.strip()]
        if result.is_timed_out:
            parts.append(f"[stopped after {result.duration_s:.0f} s: time limit]")
        elif result.exit_status != 0:
            parts.append(f"[exit status {result.exit_status}]")
            parts.append(result.stderr.strip()[-MAX_STDERR_CHARS:])
        return cls(code, "\n".join(part for part in parts if part) or "[no output]")


@dataclass
class Workspace:
    """Documents and program runs of one task, in the order they came."""

    documents: list[str] = field(default_factory=list)
    runs: list[CodeRun] = field(default_factory=list)
    tools_used: list[str] = field(default_factory=list)

    def add_hits(self, hits: Sequence[Hit]) -> int:
        """Add unseen texts, best hit last (nearest to the end that a cut keeps); returns how many."""
        known = set(self.documents)
        fresh = list(dict.fromkeys(hit.text for hit in hits if hit.text not in known))
        self.documents.extend(reversed(fresh))
        return len(fresh)

    def documents_text(self, document_chars: int | None) -> str:
        return "".join(
            f"Doc {n}: {_head(text, document_chars)}\n\n" for n, text in enumerate(self.documents, 1)
        )

    def code_text(self) -> str:
        return "".join(
            f"{FENCE}python\n{run.code}\n{FENCE}\n\n{FENCE}output\n{run.output}\n{FENCE}\n\n"
            for run in self.runs
        )


def _head(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[:limit] + " ..."


def orchestrator_context(space: Workspace, question: str, budget: ContextBudget, tokens: TokenCounter) -> str:
    """Documents then code inside `context_tokens` less the question; code alone where both cannot fit."""
    room = budget.context_tokens - count(question, tokens)
    code = space.code_text()
    kept = _cut_code(code, min(budget.code_tokens, room), tokens)
    if code and count(CODE_HEADING + code, tokens) >= room:
        return kept
    heading = CODE_HEADING if kept else ""
    return _with_documents(space, heading + kept, room, budget, tokens)


def expert_context(space: Workspace, question: str, budget: ContextBudget, tokens: TokenCounter) -> str:
    """Documents then code inside `context_tokens` less the question, code inside `code_tokens`."""
    room = budget.context_tokens - count(question, tokens)
    kept = _cut_code(space.code_text(), min(budget.code_tokens, room), tokens)
    return _with_documents(space, kept, room, budget, tokens)


def _with_documents(
    space: Workspace, code: str, room: int, budget: ContextBudget, tokens: TokenCounter
) -> str:
    left = room - count(code, tokens) - count(DOCUMENTS_HEADING, tokens)
    documents = tail(space.documents_text(budget.document_chars), left, tokens)
    return (DOCUMENTS_HEADING + documents if documents else "") + code


def _cut_code(text: str, limit: int, tokens: TokenCounter) -> str:
    """The end of the code section; a cut inside a block gets its opening fence back."""
    kept = tail(text, limit, tokens)
    if not kept or len(kept) == len(text) or kept.startswith(FENCE):
        return kept
    opening = f"{FENCE}\n"
    return opening + tail(text, limit - count(opening, tokens), tokens)
