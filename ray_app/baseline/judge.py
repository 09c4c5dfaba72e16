"""The judge: whether two short answers say the same, by their normal forms."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from ray_app import extract
from ray_app.baseline.language import normal

MAX_EXTRA_WORDS = 4
RELATIVE_TOLERANCE = 1e-6
CHOICE = re.compile(r"\(?([A-Z])\)?(?:[.:)]|$)")


class Judged(NamedTuple):
    """`extracted` is the final answer that the response states, empty for none."""

    is_correct: bool
    extracted: str
    reason: str
    confidence: int


def reply(prompt: str) -> str:
    """The verdict in the form that the prompt asks for: a tag, or a JSON object."""
    judged = judge(prompt)
    if "<correct>" in prompt.rpartition("\n\n")[2]:
        return f"<correct>{judged.is_correct}</correct>"
    return json.dumps(
        {
            "extracted_final_answer": judged.extracted or "None",
            "reasoning": judged.reason,
            "correct": "yes" if judged.is_correct else "no",
            "confidence": judged.confidence,
        }
    )


def judge(prompt: str) -> Judged:
    reference = _field(prompt, "Reference answer")
    response = _field(prompt, "Candidate answer") or _field(prompt, "Response")
    extracted = extract.answer(response) or response.strip().splitlines()[-1] if response.strip() else ""
    is_same, reason = same(extracted, reference)
    stated = re.search(r"<confidence>\D*(\d+)", response)
    return Judged(is_same, extracted, reason, int(stated[1]) if stated else 100)


def same(candidate: str, reference: str) -> tuple[bool, str]:
    """Whether the answers agree, and the rule that decided.

    Equal normal forms agree, and numbers within a millionth, a choice by its letter, a name without its
    module. A candidate may hold a few words more than the reference; a claim more is too many.
    """
    if re.fullmatch(r"[A-Z]", reference.strip()):
        chosen = CHOICE.match(candidate.strip())
        return bool(chosen and chosen[1] == reference.strip()), "the letters were compared"
    ours, theirs = normal(candidate), normal(reference)
    if ours == theirs:
        return bool(ours), "the answers are equal but for form"
    if _number(ours) is not None and _number(theirs) is not None:
        return _are_close(_number(ours) or 0.0, _number(theirs) or 0.0), "the numbers were compared"
    if len(ours) == len(theirs) == 1 and _is_tail(ours[0], theirs[0]):
        return True, "one is the other's name without its module"
    is_inside = bool(theirs) and f" {' '.join(theirs)} " in f" {' '.join(ours)} "
    return is_inside and len(ours) - len(
        theirs
    ) <= MAX_EXTRA_WORDS, "the reference was looked for in the answer"


def _is_tail(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return long.endswith("." + short)


def _number(words: list[str]) -> float | None:
    try:
        return float("".join(words)) if len(words) <= 2 else None
    except ValueError:
        return None


def _are_close(one: float, other: float) -> bool:
    return abs(one - other) <= RELATIVE_TOLERANCE * max(abs(one), abs(other), 1e-9)


def _field(prompt: str, label: str) -> str:
    """The text after the last `label: ` at a line's start, up to the next label or the instruction."""
    found = re.split(rf"(?:^|\n\n){label}: ?", prompt)
    if len(found) < 2:
        return ""
    text = found[-1]
    end = text.rfind("\n\nReference answer:")
    return (text[:end] if end >= 0 else text.rpartition("\n\n")[0]).strip()
