"""What a task has gathered, and how much of it a prompt carries.

Text is cut from the front: the earliest, lowest-ranked documents go first and code is last and
safest. Cuts are counted in the called model's own tokens and never touch the question. Documents and
program runs are counted one by one, so that what has not changed since the last turn is not counted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ray_app.config import ContextBudget
from ray_app.records import ExecutionResult, Hit
from ray_app.tokens import TokenCounter, tail

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

    def document_texts(self, document_chars: int | None) -> list[str]:
        return [f"Doc {n}: {_head(text, document_chars)}\n\n" for n, text in enumerate(self.documents, 1)]

    def run_texts(self) -> list[str]:
        return [
            f"{FENCE}python\n{run.code}\n{FENCE}\n\n{FENCE}output\n{run.output}\n{FENCE}\n\n"
            for run in self.runs
        ]


def _head(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[:limit] + " ..."


@dataclass(frozen=True, slots=True)
class Context:
    """What a prompt carries of a workspace: its text and tokens, and the tokens that had no room."""

    text: str = ""
    tokens: int = 0
    cut: int = 0


class _End(NamedTuple):
    text: str
    tokens: int


def orchestrator_context(space: Workspace, room: int, budget: ContextBudget, tokens: TokenCounter) -> Context:
    """Documents then code inside `room` tokens; code alone where both cannot fit."""
    runs = space.run_texts()
    code = _cut_code(runs, min(budget.code_tokens, room), tokens)
    documents = space.document_texts(budget.document_chars)
    heading = CODE_HEADING if code.text else ""
    if runs and tokens.count(CODE_HEADING) + _size(runs, tokens) >= room:
        return _context("", _End("", 0), code, [*documents, *runs], tokens)
    kept = _cut_documents(documents, room - tokens.count(heading) - code.tokens, tokens)
    return _context(heading, kept, code, [*documents, *runs], tokens)


def expert_context(space: Workspace, room: int, budget: ContextBudget, tokens: TokenCounter) -> Context:
    """Documents then code inside `room` tokens, code inside `code_tokens`."""
    runs = space.run_texts()
    code = _cut_code(runs, min(budget.code_tokens, room), tokens)
    documents = space.document_texts(budget.document_chars)
    return _context(
        "", _cut_documents(documents, room - code.tokens, tokens), code, [*documents, *runs], tokens
    )


def _context(heading: str, documents: _End, code: _End, gathered: list[str], tokens: TokenCounter) -> Context:
    used = documents.tokens + tokens.count(heading) + code.tokens
    kept = documents.tokens - (tokens.count(DOCUMENTS_HEADING) if documents.text else 0) + code.tokens
    return Context(documents.text + heading + code.text, used, max(0, _size(gathered, tokens) - kept))


def _size(pieces: list[str], tokens: TokenCounter) -> int:
    return sum(tokens.count(piece) for piece in pieces)


def _cut_documents(pieces: list[str], limit: int, tokens: TokenCounter) -> _End:
    """The end of the documents under their heading, both within `limit`."""
    heading = tokens.count(DOCUMENTS_HEADING)
    kept = _end(pieces, limit - heading, tokens)
    return _End(DOCUMENTS_HEADING + kept.text, heading + kept.tokens) if kept.text else kept


def _cut_code(pieces: list[str], limit: int, tokens: TokenCounter) -> _End:
    """The end of the program runs; a cut inside a block gets its opening fence back."""
    kept = _end(pieces, limit, tokens)
    if not kept.text or kept.text.startswith(FENCE):
        return kept
    opening = f"{FENCE}\n"
    kept = _end(pieces, limit - tokens.count(opening), tokens)
    return _End(opening + kept.text, tokens.count(opening) + kept.tokens) if kept.text else kept


def _end(pieces: list[str], limit: int, tokens: TokenCounter) -> _End:
    """The longest end of the joined pieces within `limit` tokens; the piece at the cut is cut inside."""
    kept, left = [], max(0, limit)
    for piece in reversed(pieces):
        size = tokens.count(piece)
        if size > left:
            part = tail(piece, left, tokens)
            kept.append(part)
            left -= tokens.count(part)
            break
        kept.append(piece)
        left -= size
    return _End("".join(reversed(kept)), max(0, limit) - left)
