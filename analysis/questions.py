"""The questions of a run, read again from where its config says they are: the log does not hold them.

Only from a file that is still what it was, by the hash that the run recorded. The hub's gated set is never
fetched for this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_app.dataset import HUB_NAME
from ray_app.sample.corpus import QUESTIONS


@dataclass(frozen=True, slots=True)
class Question:
    """What a task asked, its reference answer, and why that is right, as far as the file says it."""

    question: str
    answer: str
    rationale: str


@dataclass(frozen=True, slots=True)
class Questions:
    """By task id; `note` says why there are none, where that is so."""

    by_id: Mapping[str, Question] = field(default_factory=dict)
    note: str = ""


def questions_of(run_dir: Path, facts: Mapping[str, Any]) -> Questions:
    """The questions of the run at `run_dir`; none, and the reason, where they cannot be had."""
    dataset = str(facts.get("dataset") or "")
    if not dataset or dataset == HUB_NAME:
        return Questions(note="Questions are not in the log, and their set is not a file on this machine.")
    path = QUESTIONS if dataset == "sample" else Path(dataset)
    try:
        body = path.read_bytes()
        recorded = json.loads((run_dir / "provenance.json").read_bytes())["dataset_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return Questions(
            note=f"Questions are not in the log, and {dataset} or its recorded hash is not here."
        )
    if hashlib.sha256(body).hexdigest() != recorded:
        return Questions(note=f"Questions are left out: {dataset} is not the file that this run asked.")
    try:
        return Questions(dict(map(_question, filter(bytes.strip, body.split(b"\n")))))
    except (ValueError, KeyError, AttributeError):
        return Questions(
            note=f"Questions are not in the log, and {dataset} is no file of questions, one a line."
        )


def _question(line: bytes) -> tuple[str, Question]:
    row = json.loads(line)
    return str(row["id"]), Question(
        *(str(row.get(name) or "") for name in ("question", "answer", "rationale"))
    )
