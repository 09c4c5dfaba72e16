"""`--adopt DIR`: take over finished results of the `{id}.json` format of earlier systems.

A result is taken when its question and reference answer are the dataset's own and it did not end in an
error. What is taken becomes a committed result row, marked as adopted; nothing is run for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_app.errors import DatasetError
from ray_app.records import Task, TaskResult, Verdict

ADOPTED = "adopted"


@dataclass(frozen=True)
class Adoption:
    """The results that can be taken, and how many files cannot be, by reason."""

    results: tuple[TaskResult, ...]
    refused: Mapping[str, int]

    def line(self) -> str:
        reasons = "".join(f"; {count} refused: {reason}" for reason, count in self.refused.items())
        return f"{len(self.results)} results adopted{reasons}"


def read_results(folder: Path, tasks: Mapping[str, Task]) -> Adoption:
    """The adoptable results of `folder`, by question id. Raises DatasetError when it is no such folder."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DatasetError(
            f"--adopt {folder}: expected a folder with one {{id}}.json per question, found none"
        )
    results, refused = [], Counter[str]()
    for path in files:
        outcome = _adopt(path, tasks)
        if isinstance(outcome, str):
            refused[outcome] += 1
        else:
            results.append(outcome)
    return Adoption(tuple(results), dict(refused))


def _adopt(path: Path, tasks: Mapping[str, Task]) -> TaskResult | str:
    try:
        row = json.loads(path.read_text())
        task = tasks.get(str(row["id"]))
        is_correct, status = row["correct"], row.get("status", "done")
        responses = [item for turn in (row.get("all_tool_responses") or {}).values() for item in turn]
        failed_tools = [item for item in responses if "tool_error" in item]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "torn or not a result file"
    if task is None:
        return "question is not in the dataset"
    if status != "done" or "error_type" in row or failed_tools or not isinstance(is_correct, bool):
        return "ended in an error"
    if row.get("answer", task.answer) != task.answer or row.get("problem", task.question) != task.question:
        return "another question text or reference answer"
    prediction = _prediction(responses)
    turns = len(row.get("all_message_responses") or ())
    verdict = None if prediction is None else Verdict(is_correct, "judge", prediction, judge_model=ADOPTED)
    return TaskResult(
        task.task_id,
        task.rollout_key,
        task.judge_key,
        trial=0,
        attempt=0,
        outcome="limited" if prediction is None else "ok",
        error_kind="limit" if prediction is None else None,
        error="no answer within the turns of the adopted run" if prediction is None else "",
        prediction=prediction or "",
        verdict=verdict,
        turns=turns,
        category=task.category,
        answer_type=task.answer_type,
    )


def _prediction(responses: Sequence[Mapping[str, Any]]) -> str | None:
    """What the `answer` tool predicted, or None if the rollout never answered."""
    answers = [item for item in responses if item.get("tool") == "answer"]
    return str(answers[-1].get("pred", "")) if answers else None
