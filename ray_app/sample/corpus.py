"""The sample corpus: the running Python's own docstrings, and which of them each question may see.

Owns the rows that the sample index is built from and the sample's scopes file (`examples.json`). The
texts differ a little from one Python version to the next; for one version, rows, order and ids are
always the same. It refuses to import what it describes: `walk.py` does that in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_app.errors import DatasetError

WALK = Path(__file__).with_name("walk.py")
QUESTIONS = Path(__file__).with_name("questions.jsonl")
WALK_TIMEOUT_S = 120
MIN_CHARS = 100  # the retriever drops documents that are not longer
MIN_SCOPE, MEDIAN_SCOPE, MAX_SCOPE, SPREAD = 30, 100, 300, 0.45
NEIGHBOUR_SHARE = 0.25  # of a scope: documents of the sources' own modules, which look like answers

Row = dict[str, Any]


def write_corpus(out_jsonl: Path) -> int:
    """Writes one row {"id", "name", "content"} per documented object, sorted by name; returns their number.

    Raises DatasetError when the standard library cannot be walked.
    """
    rows = corpus_rows()
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    _write(out_jsonl, "".join(lines))
    return len(rows)


def corpus_rows() -> list[Row]:
    """The rows that `write_corpus` writes; ids are their positions."""
    done = subprocess.run(
        [sys.executable, "-S", "-s", "-P", "-B", "-W", "ignore", "-X", "utf8", str(WALK)],
        capture_output=True,
        encoding="utf-8",
        timeout=WALK_TIMEOUT_S,
        check=False,
        # a fixed hash seed: sets appear in signatures
        env={"PYTHONHASHSEED": "0", "PATH": os.environ.get("PATH", "")},
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DatasetError(f"sample corpus: {sys.executable} could not walk its standard library: {last}")
    return [{"id": number, **json.loads(line)} for number, line in enumerate(done.stdout.splitlines())]


def ids_by_name(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Qualified name -> document id."""
    return {row["name"]: row["id"] for row in rows}


def load_questions(path: Path = QUESTIONS) -> list[Row]:
    """The sample questions: HLE's columns, and `sources` and `withheld` (qualified names)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def question_id(question: str) -> str:
    """24 hexadecimal digits, as HLE's ids have, made from the text."""
    return hashlib.sha256(question.encode()).hexdigest()[:24]


def write_scopes(questions: Sequence[Mapping[str, Any]], ids: Mapping[str, int], out_json: Path) -> None:
    """Writes {question id: [document ids]}: each question's sources, and distractors.

    Distractors depend on the question's text and the corpus only. Documents that a question withholds
    are never in its scope. Raises DatasetError for a source that the corpus lacks.
    """
    scopes = {row["id"]: scope_of(row, ids) for row in questions}
    _write(out_json, json.dumps(scopes) + "\n")


def scope_of(question: Mapping[str, Any], ids: Mapping[str, int]) -> list[int]:
    """The question's allowed document ids, sorted, without repeats."""
    sources, withheld = question["sources"], set(question.get("withheld", ()))
    for name in sources:
        if name not in ids:
            raise DatasetError(f"question {question['id']}: {name!r} is not in the corpus of this Python")
    rng = random.Random(hashlib.sha256(question["question"].encode()).digest())
    size = min(MAX_SCOPE, max(MIN_SCOPE, round(rng.lognormvariate(0, SPREAD) * MEDIAN_SCOPE)))
    modules = {name.split(".")[0] for name in [*sources, *sorted(withheld)]}
    allowed = [name for name in sorted(ids) if name not in withheld]
    near = [name for name in allowed if name.split(".")[0] in modules]
    chosen = {*sources, *rng.sample(near, min(len(near), round(size * NEIGHBOUR_SHARE)))}
    chosen |= set(rng.sample(allowed, min(len(allowed), size)))
    extra = sorted(chosen.difference(sources))
    rng.shuffle(extra)
    return sorted(ids[name] for name in {*sources, *extra[: max(0, size - len(sources))]})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
