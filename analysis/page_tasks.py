"""The tasks of a run as a page wants them: an index with a row for each trial, and their rows, part by part.

All is columns of small whole numbers and codes into one table of words, because that packs best. A number
that a row does not say is UNSAID. A part holds some tasks: `figures` (all their rows) and `texts` (one line a
task). The documents that retrievals found are shared by all parts, each text once (`Shelves`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from analysis.log import Floats, Ints, RunLog, Words
from analysis.page_texts import CUT_BYTES, NOTHING, Cut, Texts, cut, shorter
from analysis.questions import Questions
from analysis.story import ORDER, FoundText

PART_ROWS, PART_TASKS = 3000, 50
SHELF_CHARS = 850_000  # of documents, packed together: what one block of bzip2 takes
# What the file of questions says of a task.
ASKED = ("question", "reference answer", "rationale")
WITHHELD, LOST, LEFT_OUT = -1, -2, -3  # in place of a document's text
WORDS = (
    *("kind", "role", "tool", "alias", "model", "endpoint", "status", "error_kind", "search_backend"),
    *("outcome", "verdict_method", "worker"),
)
_SPANS = ("duration_s", "queue_s", "prefill_s", "decode_s")
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "local_hits", "web_hits")
COLUMNS = (*ORDER, *WORDS, *_SPANS, *_COUNTS, "cost_usd", "turn", "retries", "exit_status", "is_replayed")
MORE_COLUMNS = ("task_id", "rollout_key", "category", "answer_type", "payload_hash", "error", "detail")
_TOLD = ("kind", "role", "tool", "payload_hash", "error", "detail")
_INTS = ("trial", "epoch", "attempt", "turn", "retries")
_TICK_S, _TICK_USD = 1e-4, 1e-7
UNSAID, EXIT_ZERO = -1, 1000  # a signal is below zero


class Most(NamedTuple):
    """How many bytes a page holds of each text and of each document; 0: none of it."""

    text: int = CUT_BYTES
    document: int = CUT_BYTES


class Part(NamedTuple):
    """Some tasks, each as JSON of its own; `tasks` counts them. `shelves` are those that are full by now."""

    tasks: int
    figures: str
    texts: str
    shelves: list[Shelf]


class Shelf(NamedTuple):
    """Some documents: how many, and the text of each with how much of it is left out."""

    documents: int
    texts: str


class Shelves:
    """Each text that a retrieval found, once, in the order in which they were found first."""

    def __init__(self, texts: Texts, most: Most) -> None:
        self._texts, self._most = texts, most
        self._known: dict[str, int] = {}
        self._cuts: list[Cut] = []
        self._before = self._chars = 0
        self._full: list[Shelf] = []

    def place(self, name: str) -> int:
        """Which document of the page the text `name` is, or why it is none."""
        if not self._most.document:
            return LEFT_OUT if self._most.text else WITHHELD
        if name not in self._known:
            found = self._texts.document(name)
            self._known[name] = LOST if found is None else self._before + len(self._cuts)
            if found is not None:
                self._put(shorter(found, self._most.document))
        return self._known[name]

    def taken(self, *, is_last: bool) -> list[Shelf]:
        """The shelves that became full since the last time; at the end the one that did not, too."""
        if is_last:
            self._close()
        full, self._full = self._full, []
        return full

    def _put(self, text: Cut) -> None:
        self._cuts.append(text)
        self._chars += len(text.shown)
        if self._chars >= SHELF_CHARS:
            self._close()

    def _close(self) -> None:
        if self._cuts:
            flat = [value for text in self._cuts for value in text]
            self._full.append(Shelf(len(self._cuts), _json(flat)))
        self._before += len(self._cuts)
        self._cuts, self._chars = [], 0


@dataclass(frozen=True)
class Tasks:
    """Which rows are of which task: `rows` in the order of telling, task i's are `bounds[i]:bounds[i+1]`."""

    log: RunLog
    rows: Ints
    bounds: Ints

    def __len__(self) -> int:
        return len(self.bounds) - 1


class Vocabulary:
    """Codes for words, the same in all parts; `pieces` name texts, so that no search finds a name."""

    def __init__(self, log: RunLog) -> None:
        self.names, self.pieces = [""], list[str]()
        self._codes = {"": 0}
        self._columns = {name: self._coded(log.words(name)) for name in WORDS}

    def code(self, word: str) -> int:
        if word not in self._codes:
            self._codes[word] = len(self.names)
            self.names.append(word)
        return self._codes[word]

    def piece(self, name: str) -> int:
        if name not in self.pieces:
            self.pieces.append(name)
        return self.pieces.index(name)

    def column(self, name: str, rows: Ints) -> Ints:
        return np.asarray(self._columns[name][rows])

    def _coded(self, words: Words) -> Ints:
        # Only words that stand in a row: a dictionary may name more.
        used = np.zeros(len(words.names), np.int64)
        for code in np.unique(words.codes).tolist():
            used[code] = self.code(words.names[code])
        return used[words.codes]


def tasks_of(log: RunLog) -> Tasks:
    """The tasks and trials that are asked for, in the order in which they began."""
    selection = log.selection
    mask = ~log.words("rollout_key").is_in("") & log.is_of_benchmark
    if selection.trials:
        mask &= np.isin(log.ints("trial"), selection.trials)
    if selection.categories:
        mask &= log.words("category").is_in(*selection.categories)
    rows = np.flatnonzero(mask)
    if not len(rows):
        return Tasks(log, rows, np.zeros(1, np.int64))
    key = log.words("rollout_key").codes[rows].astype(np.int64)
    key = key * (int(log.ints("trial").max()) + 1) + log.ints("trial")[rows]
    _, group = np.unique(key, return_inverse=True)
    began = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(began, group, log.ints("t_start")[rows])
    rank = np.empty(len(began), np.int64)
    rank[np.argsort(began, kind="stable")] = np.arange(len(began))
    group = rank[group]
    order = np.lexsort((*(log.ints(name)[rows] for name in reversed(ORDER)), group))
    bounds = np.searchsorted(group[order], np.arange(len(began) + 1))
    return Tasks(log, rows[order], bounds)


def index_of(tasks: Tasks, words: Vocabulary) -> dict[str, Any]:
    """A column for each thing that the list of tasks shows, sorts and filters by."""
    log, first = tasks.log, tasks.rows[tasks.bounds[:-1]]
    ids, categories, kinds = (log.words(name) for name in ("task_id", "category", "answer_type"))
    found: dict[str, Any] = {
        "id": [ids.names[code] for code in ids.codes[first].tolist()],
        "trial": log.ints("trial")[first].tolist(),
        "category": [words.code(categories.names[code]) for code in categories.codes[first].tolist()],
        "type": [words.code(kinds.names[code]) for code in kinds.codes[first].tolist()],
        "start": _ticks(log.ints("t_start")[first] / 1e6 - _zero(log), _TICK_S),
    }
    found |= _results(tasks, words)
    group = np.repeat(np.arange(len(tasks)), np.diff(tasks.bounds))
    is_call = (log.kind("model_call") & log.live)[tasks.rows]
    for name, kind in (("turns", "turn"), ("attempts", "attempt")):
        rows = (log.kind(kind) & ~log.is_true("is_replayed"))[tasks.rows]
        found[name] = np.bincount(group[rows], minlength=len(tasks)).tolist()
    found["calls"] = np.bincount(group[is_call], minlength=len(tasks)).tolist()
    for name in ("tool", "model"):
        found[f"{name}s"] = _used(words.column(name, tasks.rows), group, len(tasks))
    return found


def _zero(log: RunLog) -> float:
    return float(log.ints("t_start").min()) / 1e6 if len(log) else 0.0


def _results(tasks: Tasks, words: Vocabulary) -> dict[str, Any]:
    """What the counted result of each task says; nothing where it has none yet."""
    results, log = tasks.log.results, tasks.log
    keys, own = results.words("rollout_key"), log.words("rollout_key")
    of = {
        (keys.names[code], trial): row
        for row, (code, trial) in enumerate(
            zip(keys.codes.tolist(), results.ints("trial").tolist(), strict=True)
        )
    }
    first = tasks.rows[tasks.bounds[:-1]]
    names = [own.names[code] for code in own.codes[first].tolist()]
    place = np.array(
        [of.get(key, -1) for key in zip(names, log.ints("trial")[first].tolist(), strict=True)], np.int64
    )
    has = place >= 0

    def number(column: str, tick: float = 1.0) -> list[int]:
        values = np.full(len(place), np.nan)
        values[has] = results.numbers(column)[place[has]]
        return _ticks(values, tick)

    def word(column: str) -> list[int]:
        own = results.words(column)
        return [words.code(own.names[own.codes[row]]) if row >= 0 else 0 for row in place.tolist()]

    return {
        "outcome": word("outcome"),
        "error": word("error_kind"),
        "method": word("verdict_method"),
        "right": number("is_correct"),
        "confidence": number("confidence", 1e-3),
        "took": number("duration_s", _TICK_S),
        "cost": number("cost_usd", _TICK_USD),
        "prompt": number("prompt_tokens"),
        "completion": number("completion_tokens"),
    }


def _used(codes: Ints, group: Ints, size: int) -> list[list[int]]:
    pairs = np.unique(group * (int(codes.max(initial=0)) + 1) + codes)
    owner, code = np.divmod(pairs, int(codes.max(initial=0)) + 1)
    said = code > 0
    places = np.searchsorted(owner[said], np.arange(size + 1))
    listed = code[said].tolist()
    return [listed[low:high] for low, high in zip(places[:-1].tolist(), places[1:].tolist(), strict=True)]


def parts_of(
    tasks: Tasks, words: Vocabulary, texts: Texts, questions: Questions, most: Most
) -> Iterator[Part]:
    """All tasks, in parts of at most PART_TASKS tasks and about PART_ROWS rows.

    Where `most` is of no text at all, texts are withheld: their names stand there, and nothing of them.
    """
    first, bounds, shelves = 0, tasks.bounds, Shelves(texts, most)
    while first < len(tasks):
        within = int(np.searchsorted(bounds, bounds[first] + PART_ROWS, side="right")) - 1
        last = min(len(tasks), first + PART_TASKS, max(first + 1, within))
        teller = _Teller(tasks, words, texts, most, shelves)
        yield teller.part(first, last, questions)
        first = last


class _Teller:
    """Makes one part."""

    def __init__(self, tasks: Tasks, words: Vocabulary, texts: Texts, most: Most, shelves: Shelves) -> None:
        self._tasks, self._log, self._vocabulary = tasks, tasks.log, words
        self._texts, self._most, self._shelves = texts, most, shelves
        # Of each document that was found: the row of the part, and what the retrieval says of it.
        self._hits: list[tuple[int, int, int, int, int]] = []

    def part(self, first: int, last: int, questions: Questions) -> Part:
        bounds, every = self._tasks.bounds, self._tasks.rows
        start = int(bounds[first])
        lines = [
            _json(self._told(every[bounds[one] : bounds[one + 1]], int(bounds[one]) - start, questions))
            for one in range(first, last)
        ]
        figures = {
            "count": np.diff(bounds[first : last + 1]).tolist(),
            **self._columns(every[start : bounds[last]]),
            "hits": [list(column) for column in zip(*self._hits, strict=True)] or [[]] * 5,
        }
        shelves = self._shelves.taken(is_last=last == len(self._tasks))
        return Part(last - first, _json(figures), "\n".join(lines), shelves)

    def _columns(self, rows: Ints) -> dict[str, list[int]]:
        log = self._log
        found = {name: self._vocabulary.column(name, rows).tolist() for name in WORDS}
        # Microseconds since the row before: small numbers pack well.
        found["since"] = np.diff(log.ints("t_start")[rows], prepend=0).tolist()
        found |= {name: _ticks(log.numbers(name)[rows], _TICK_S) for name in _SPANS}
        found |= {name: _ticks(log.numbers(name)[rows], 1.0) for name in (*_COUNTS, "is_correct")}
        found["cost_usd"] = _ticks(log.numbers("cost_usd")[rows], _TICK_USD)
        found["confidence"] = _ticks(log.numbers("confidence")[rows], 1e-3)
        found["exit_status"] = _ticks(log.numbers("exit_status")[rows] + EXIT_ZERO, 1.0)
        found |= {name: log.ints(name)[rows].tolist() for name in _INTS}
        found["is_replayed"] = log.is_true("is_replayed")[rows].astype(int).tolist()
        return found

    def _told(self, rows: Ints, before: int, questions: Questions) -> list[Any]:
        """The texts of a task, flat: its row (-1: the question's), name, text, characters left out.

        `before` counts the rows of the part before the task's.
        """
        flat = list[Any]()
        ids = self._log.words("task_id")
        if asked := questions.by_id.get(ids.names[ids.codes[rows[0]]]):
            given = zip(ASKED, (asked.question, asked.answer, asked.rationale), strict=True)
            flat += [value for name, text in given for value in self._free(-1, name, text)]
        own = [
            [words.names[code] for code in words.codes[rows].tolist()]
            for words in map(self._log.words, _TOLD)
        ]
        for place, (kind, role, tool, body, error, detail) in enumerate(zip(*own, strict=True)):
            flat += self._free(place, "error", error)
            flat += self._free(place, "web", detail if kind == "retrieval" else "")
            told = self._texts.of_row(body, kind, role, tool) if body else NOTHING
            for name, text in told.pieces:
                flat += [place, self._vocabulary.piece(name), *self._held(text)]
            self._hits += [self._hit(before + place, hit) for hit in told.hits]
        return flat

    def _free(self, place: int, name: str, text: str) -> list[Any]:
        if not text:
            return []
        return [place, self._vocabulary.piece(name), *self._held(cut(text, CUT_BYTES))]

    def _held(self, text: Cut) -> Cut:
        return shorter(text, self._most.text) if self._most.text else Cut("", 0)

    def _hit(self, row: int, hit: FoundText) -> tuple[int, int, int, int, int]:
        score = round(1000 * hit.score)
        return (
            row,
            self._vocabulary.code(hit.source),
            int(hit.document_id),
            score,
            self._shelves.place(hit.text_hash),
        )


def _ticks(values: Floats, tick: float) -> list[int]:
    """Whole multiples of `tick`; UNSAID for NaN."""
    found: list[int] = np.where(np.isnan(values), UNSAID, np.rint(values / tick)).astype(np.int64).tolist()
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
