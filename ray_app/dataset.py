"""Questions and scopes: any JSONL in the HLE format, the hub dataset, or the bundled sample.

Every fault of a file is one DatasetError that names line, value and remedy. Question text stays in
memory: nothing here writes it anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_app.config import Dataset
from ray_app.errors import DatasetError
from ray_app.records import Task, digest

HUB_NAME = "cais/hle"
HUB_FILE = "data/test-00000-of-00001.parquet"
REQUIRED = ("id", "question", "answer")
ANSWER_TYPES = ("exactMatch", "multipleChoice")
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class TaskSet:
    """The tasks of a run, and what the run record says of where they came from.

    `left_out` counts questions by the reason why the config leaves them out.
    """

    tasks: tuple[Task, ...]
    sha256: str
    source: str
    canary: str
    left_out: Mapping[str, int]

    @property
    def digest(self) -> str:
        """Equal for the same questions with the same scopes, whatever their order and answers."""
        return digest(sorted(task.rollout_key for task in self.tasks))


def load_tasks(
    dataset: Dataset, scopes_path: Path | None, environ: Mapping[str, str] = os.environ
) -> TaskSet:
    """Read, check and select the questions that `dataset` names.

    `scopes_path`: an `examples.json` (question id -> allowed document ids); None where the whole
    corpus is searched. Raises DatasetError.
    """
    rows, sha256 = _hub_rows(dataset, environ) if dataset.path == HUB_NAME else _file_rows(Path(dataset.path))
    _check(rows, dataset.path)
    scopes = read_scopes(scopes_path) if scopes_path and dataset.policy != "unscoped" else None
    left_out: Counter[str] = Counter()
    tasks = [task for row in rows for task in _select(row[1], scopes, dataset, left_out)]
    if not tasks:
        raise DatasetError(
            f"dataset {dataset.path}: no question is left to run ({dict(left_out) or 'empty file'})"
        )
    canary = next((str(row["canary"]) for _, row in rows if row.get("canary")), "")
    return TaskSet(tuple(tasks[: dataset.limit]), sha256, dataset.path, canary, dict(left_out))


def read_scopes(path: Path) -> dict[str, tuple[int, ...]]:
    """`examples.json` as question id -> allowed document ids, sorted and without doubles."""
    try:
        listed = json.loads(path.read_text())
        return {str(key): tuple(sorted({int(item) for item in ids})) for key, ids in listed.items()}
    except OSError as error:
        raise DatasetError(f"scopes {path}: {error.strerror}; expected an examples.json") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"scopes {path}: expected {{question id: [document ids]}} ({error})") from None


def _select(
    row: Mapping[str, Any],
    scopes: Mapping[str, tuple[int, ...]] | None,
    dataset: Dataset,
    left_out: Counter[str],
) -> Iterator[Task]:
    task_id, image = str(row["id"]), str(row.get("image") or "")
    if image and dataset.subset == "text":
        left_out["has an image (dataset.subset: text)"] += 1
        return
    if scopes is not None and task_id not in scopes:
        if dataset.policy == "scoped":
            raise DatasetError(
                f"question {task_id!r} has no entry in the scopes file; set dataset.policy to subset "
                "(leave such questions out) or unscoped (search the whole corpus)"
            )
        left_out["has no scope (dataset.policy: subset)"] += 1
        return
    yield Task(
        task_id=task_id,
        question=str(row["question"]),
        answer=str(row["answer"]),
        answer_type=row.get("answer_type") or "exactMatch",
        category=str(row.get("category") or ""),
        raw_subject=str(row.get("raw_subject") or ""),
        images=(image,) if image else (),
        scope=None if scopes is None else scopes[task_id],
    )


def _file_rows(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], str]:
    try:
        body = path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"dataset {path}: {error.strerror}; expected a JSONL file, `sample` or {HUB_NAME}"
        ) from None
    try:
        # Only a newline ends a line here: a JSON string may hold any other separator.
        lines = body.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        number = body.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{path} line {number}: not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    return list(_parse(lines, path)), hashlib.sha256(body).hexdigest()


def _parse(lines: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path} line {number}: not valid JSON ({error}); mend or remove it") from None
        if not isinstance(row, dict):
            raise DatasetError(f"{path} line {number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _check(rows: Sequence[tuple[int, Mapping[str, Any]]], source: str) -> None:
    problems = []
    seen: dict[str, int] = {}
    for number, row in rows:
        missing = [key for key in REQUIRED if row.get(key) in (None, "")]
        if missing:
            problems.append(f"line {number}: no {', '.join(missing)}")
        kind = row.get("answer_type") or "exactMatch"
        if kind not in ANSWER_TYPES:
            problems.append(f"line {number}: answer_type {kind!r}, expected {' or '.join(ANSWER_TYPES)}")
        identity = str(row.get("id"))
        if identity in seen and "id" not in missing:
            problems.append(f"line {number}: id {identity!r} stands on line {seen[identity]} too")
        seen.setdefault(identity, number)
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise DatasetError(f"{source}: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}")


def _hub_rows(dataset: Dataset, environ: Mapping[str, str]) -> tuple[list[tuple[int, dict[str, Any]]], str]:
    """The gated set with the user's own token, at the commit that the config pins."""
    import pyarrow.parquet as pq  # both are needed for the hub form alone
    from huggingface_hub import hf_hub_download

    if not dataset.revision:
        raise DatasetError(
            f"dataset {HUB_NAME}: expected dataset.revision, the commit to pin; a score needs it"
        )
    token = environ.get(dataset.token_env)
    if not token:
        raise DatasetError(
            f"dataset {HUB_NAME} is gated: variable {dataset.token_env} is empty; export your token"
        )
    try:
        path = hf_hub_download(
            HUB_NAME, HUB_FILE, repo_type="dataset", revision=dataset.revision, token=token
        )
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise DatasetError(f"dataset {HUB_NAME}@{dataset.revision}: {text}") from None
    rows = pq.read_table(path).to_pylist()
    return list(enumerate(rows, 1)), hashlib.sha256(Path(path).read_bytes()).hexdigest()
