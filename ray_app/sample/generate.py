"""Makes questions of the sample set's kinds from docstrings, by templates and a seed.

Owns a second, larger question set, which nobody has tuned rules on: it tells whether a score on the
sixty questions is more than luck. It refuses to judge quality: templates (`templates.py`) make stiff
questions, and some ask for what a reader cannot know how to look for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ray_app.sample.corpus import MIN_CHARS, question_id
from ray_app.sample.passages import Draft, Passage, passage_of
from ray_app.sample.templates import TEMPLATES

# Category and its share, in sixtieths: the mix of the sixty questions.
MIX = (("Lookup", 20), ("Two passages", 10), ("Computation", 12), ("Multiple choice", 10), ("Absent", 8))

Row = Mapping[str, Any]


def generate(corpus_rows: Sequence[Row], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` different questions in the schema of `questions.jsonl`; equal arguments give equal questions."""
    rng = random.Random(seed)
    passages = [passage_of(row) for row in corpus_rows if len(row["content"]) > MIN_CHARS]
    made: dict[str, dict[str, Any]] = {}
    for category in _plan(n):
        row = _make(rng, passages, category, made)
        made[row["id"]] = row
    return list(made.values())


def _plan(n: int) -> list[str]:
    """The category of each question: shares rounded down, the rest dealt from the first on."""
    whole = sum(share for _, share in MIX)
    plan = [category for category, share in MIX for _ in range(n * share // whole)]
    return plan + [MIX[index % len(MIX)][0] for index in range(n - len(plan))]


def _make(
    rng: random.Random, passages: Sequence[Passage], category: str, made: Mapping[str, Any]
) -> dict[str, Any]:
    while True:  # templates decline passages that do not suit them, and most passages suit some template
        draft = rng.choice(TEMPLATES[category])(rng, passages)
        if draft and question_id(draft.question) not in made:
            return _row(draft, category)


def _row(draft: Draft, category: str) -> dict[str, Any]:
    kind = "multipleChoice" if category == "Multiple choice" else "exactMatch"
    names = draft.sources or draft.withheld
    row = {
        "id": question_id(draft.question),
        "question": draft.question,
        "answer": draft.answer,
        "answer_type": kind,
        "category": category,
        "raw_subject": names[0].split(".")[0] if names else "",
        "rationale": "",
        "image": "",
        "sources": list(draft.sources),
    }
    return row | ({"withheld": list(draft.withheld)} if draft.withheld else {})
