"""`{id}.json` result files of earlier systems, as values. They say what was right, and nothing of time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_app.errors import RunDirError
from ray_app.records import Outcome


@dataclass(frozen=True, slots=True)
class SeedResult:
    """How a task ended. `written` is the file's time (Unix seconds); `prediction` None without an answer."""

    task_id: str
    question: str
    reference: str
    outcome: Outcome
    is_correct: bool | None
    prediction: str | None
    method: str
    error: str
    turns: int
    written: float
    responses: Mapping[int, Mapping[str, Any]]


@dataclass
class Results:
    """Results by task id, the newest of each; what of the folder could not be used; ids by `eid`."""

    by_id: dict[str, SeedResult] = field(default_factory=dict)
    id_of_eid: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    doubles: int = 0


def read_results(folder: Path) -> Results:
    """Every result of the folder. The name of a file says nothing: its `id` does. Raises RunDirError."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise RunDirError(
            f"--results {folder}: expected a folder with one {{id}}.json per question, found none"
        )
    found = Results()
    for path in files:
        try:
            result, eids = _read(json.loads(path.read_bytes()), path.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found.unreadable.append(path.name)
            continue
        known = found.by_id.get(result.task_id)
        found.doubles += known is not None
        if known is None or known.written <= result.written:
            found.by_id[result.task_id] = result
        found.id_of_eid.update(dict.fromkeys(eids, result.task_id))
    return found


def _read(row: Mapping[str, Any], written: float) -> tuple[SeedResult, list[str]]:
    responses = _responses(row.get("all_tool_responses") or {})
    answers = [item for item in responses.values() if item.get("tool") == "answer"]
    prediction = str(answers[-1].get("pred") or "") if answers else None
    is_correct, reference = row["correct"], str(row.get("answer", ""))
    if not isinstance(is_correct, bool):
        raise ValueError(f"correct is {is_correct!r}, expected true or false")
    error = _error(row, responses.values())
    outcome: Outcome = "failed" if error else "limited" if prediction is None else "ok"
    result = SeedResult(
        str(row["id"]),
        str(row.get("problem", "")),
        reference,
        outcome,
        is_correct if outcome == "ok" else None,
        prediction,
        _method(prediction, reference, "_judge_ms" in answers[-1]) if outcome == "ok" else "",
        error,
        len(row.get("all_message_responses") or responses),
        written,
        responses,
    )
    return result, [str(item["eid"]) for item in responses.values() if item.get("eid") is not None]


def _responses(turns: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """What the tool gave, by turn (`turn_<k>_response` -> a list with one dict)."""
    found = {}
    for name, items in turns.items():
        number = name.removeprefix("turn_").removesuffix("_response")
        if items and number.isdigit():
            found[int(number)] = dict(items[0])
    return dict(sorted(found.items()))


def _error(row: Mapping[str, Any], responses: Any) -> str:
    """What ended the task, "" where nothing did: the tool's own words, if there are any."""
    failed: Sequence[Mapping[str, Any]] = [item for item in responses if item.get("tool_error")]
    if row.get("status", "done") == "done" and "error_type" not in row and not failed:
        return ""
    words = str(failed[-1]["tool_error"]) if failed else ""
    return ": ".join(part for part in (str(row.get("error_type") or ""), words) if part) or "status error"


def _method(prediction: str | None, reference: str, was_judged: bool) -> str:
    """How such systems come to a verdict: no answer, or too long a one, is wrong unasked.

    "" where nobody can tell: the reference answer is not there, and no judge's time either.
    """
    text = (prediction or "").strip()
    if not text or len(text.split(" ")) > 500:
        return "empty"
    if was_judged:
        return "judge"
    if not reference:
        return ""
    return "exact" if text.lower() == reference.strip().lower() else "judge"
