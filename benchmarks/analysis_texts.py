"""Texts for a generated run (`analysis_run.py`): a payload for each of its calls, in the form of real ones.

Their words follow each other as in the docstrings of the Python that runs, but no text is told twice: after
half of the words the next is taken from another place where the same word stands, after a third from any
place. So they mean nothing, and pack as prose that repeats nothing does: to 0.28 of their size by bzip2, to
0.25 by LZMA over 8 MB, which is what the docstrings of a large installation do (57 MB, each once: 0.28 and
0.25).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.analysis_run import Run
from ray_app.events import PAYLOAD_SCHEMA, payload_files
from ray_app.parquet_file import write
from ray_app.table_files import PARQUET

# Median characters of what each kind of call gives, and the spread of their logarithm.
ORCHESTRATOR, EXPERT, STDOUT, REASONING, DOCUMENT = 250, 1100, 120, 400, 1200
SIGMA = 0.7
DOCUMENTS, FOUND, SCOPE = 30_000, 15, 100
_BATCH = 2000
# After a word: the chance that the next stands after the same word elsewhere, and after any word.
_SAME_WORD, _ANY_WORD = 0.5, 0.3
_LANES, _STEPS = 256, 1000


def write_texts(run: Run, run_dir: Path, *, documents: int = DOCUMENTS, seed: int = 1) -> int:
    """Payloads of all calls and results of `run`, over a corpus of `documents`; returns their characters."""
    maker = _Maker(np.random.default_rng(seed), documents)
    size = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal size
        rows = list[tuple[str, str, str]]()
        for row in maker.rows(run):
            rows.append(row)
            size += len(row[2])
            if len(rows) == _BATCH:
                yield _batch(rows)
                rows.clear()
        yield _batch(rows)

    write(payload_files(run_dir).folder / f"e0001-texts-000000{PARQUET}", PAYLOAD_SCHEMA, batches())
    return size


def _batch(rows: list[tuple[str, str, str]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.RecordBatch.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, PAYLOAD_SCHEMA, strict=True)],
        schema=PAYLOAD_SCHEMA,
    )


class _Maker:
    def __init__(self, chance: np.random.Generator, documents: int) -> None:
        self._chance, self._prose, self._corpus = chance, Prose(chance), documents

    def rows(self, run: Run) -> Iterator[tuple[str, str, str]]:
        """(hash, media, body) of the documents, then of each row that has a payload."""
        documents = list[str]()
        for number in range(self._corpus):
            text = f"[{number}] {self._text(DOCUMENT)}"
            documents.append(hashlib.sha256(text.encode()).hexdigest()[:32])
            yield documents[-1], "text", text
        names = ("kind", "role", "tool", "task_id", "payload_hash")
        for kind, role, tool, task, name in zip(*(run.table[one].to_pylist() for one in names), strict=True):
            body = self._body(kind, role, tool, int(task, 16), documents)
            if body is not None:
                yield name, "json", json.dumps(body)

    def _body(self, kind: str, role: str, tool: str, task: int, documents: list[str]) -> Any:
        if kind == "model_call":
            return self._reply(role, tool)
        if kind == "retrieval":
            places = (task * SCOPE + self._chance.integers(0, SCOPE, FOUND)) % self._corpus
            hits = [
                {
                    "document_id": place,
                    "text": documents[place],
                    "score": 0.9 - 0.01 * rank,
                    "source": "local",
                }
                for rank, place in enumerate(places.tolist())
            ]
            return {"hits": hits, "cost_usd": 0.0, "web_calls": 0, "web_error": ""}
        if kind == "code":
            return {"stdout": self._text(STDOUT), "stderr": "", "exit_status": 0, "is_timed_out": False}
        if kind == "result":
            verdict = {"extracted": self._text(20), "reasoning": self._text(REASONING)}
            return {"prediction": self._text(40), "verdict": verdict}
        return None

    def _reply(self, role: str, tool: str) -> dict[str, Any]:
        if role == "orchestrator":
            call = {"call_id": "c", "name": tool or "search", "arguments": '{"model": "search-1"}'}
            return {"content": self._text(ORCHESTRATOR), "tool_calls": [call]}
        text = self._text(EXPERT)
        told = {
            "search": f"{text} <query>{self._text(60)}</query>",
            "answer": f"{text} <answer>{self._text(20)}</answer>",
        }
        return {"content": told.get(tool, text), "tool_calls": []}

    def _text(self, median: int) -> str:
        return self._prose.text(int(median * self._chance.lognormal(0.0, SIGMA)))


class Prose:
    """Text without end, of which no part is told twice."""

    def __init__(self, chance: np.random.Generator) -> None:
        self._chance = chance
        self._tokens = re.findall(r"\s*\S+", prose())
        _, self._words = np.unique([token.strip() for token in self._tokens], return_inverse=True)
        self._order = np.argsort(self._words, kind="stable")
        self._first = np.searchsorted(self._words[self._order], np.arange(self._words.max() + 2))
        self._places = chance.integers(0, len(self._words), _LANES)
        self._made, self._at = "", 0

    def text(self, length: int) -> str:
        """The next `length` characters."""
        while self._at + length > len(self._made):
            self._made, self._at = self._made[self._at :] + self._more(), 0
        self._at += length
        return self._made[self._at - length : self._at]

    def _more(self) -> str:
        steps = np.empty((_STEPS, _LANES), np.int64)
        for step in range(_STEPS):
            steps[step] = self._places
            self._places = (self._jump(self._places) + 1) % len(self._words)
        return "".join([self._tokens[place] for place in steps.T.ravel().tolist()])

    def _jump(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        word = self._words[places]
        first, last = self._first[word], self._first[word + 1]
        same = self._order[first + (self._chance.random(_LANES) * (last - first)).astype(np.int64)]
        die = self._chance.random(_LANES)
        found = np.where(die < _SAME_WORD, same, places)
        anywhere = self._chance.integers(0, len(self._words), _LANES)
        return np.where(die > 1 - _ANY_WORD, anywhere, found)


def prose() -> str:
    """The docstrings of the standard library, one after the other."""
    found = list[str]()
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [ast.get_docstring(part) or "" for part in ast.walk(tree) if isinstance(part, documented)]
    return "\n".join(filter(None, found))
