"""A run's event log as whole columns: one snapshot, cut down to the part that is asked for.

Every command asks its questions here. Columns are numpy arrays over the same rows: words as codes, numbers
as doubles with NaN for "not said". A mask over the rows says which of them count:

- replayed rows (served from the record on resume) and second opinions of a judge-only pass never do;
- `tasks` and `calls` apply the selection: the last segment unless `all_runs`, and the filters.

What a task scored does not depend on the segment: `results` are the counted results of the whole run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.selection import EVERYTHING, Selection
from analysis.text import plain
from ray_app import events, object_store
from ray_app.columns import Raw, raw, take, whole

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rows = Mask | Ints  # which rows: a mask over all, or their positions (quicker where they are used again)

# What decides whether a row counts.
BASE = ("kind", "role", "alias", "tool", "model", "status", "exit_status", "is_replayed", "epoch")
FACTS = ("t_start", "detail")
WORK = ("prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd")
TOKENS = ("prompt_tokens", "completion_tokens")
STAGES = ("duration_s", "queue_s", "prefill_s", "decode_s", "search_backend")
SPANS = ("task_id", "trial", "attempt", "worker", "t_start")
RESULTS = (
    *(
        "event_id",
        "category",
        "trial",
        "rollout_key",
        "judge_key",
        "task_id",
        "t_start",
        "outcome",
        "is_correct",
    ),
    *("verdict_method", "confidence", "answer_type", "error_kind", "attempt", "turn", "detail"),
)
EVERY = tuple(
    dict.fromkeys(
        (
            *BASE,
            *FACTS,
            *WORK,
            *STAGES,
            *SPANS,
            *RESULTS,
            "call_seq",
            "retries",
            "web_calls",
            "context_cut",
            "endpoint",
            "is_estimated",
        )
    )
)
_FEW = 256  # words whose codes are bytes: a mask of a million rows then takes a third of the time
CALLS = ("model_call", "tool_call", "retrieval", "code")


@dataclass(frozen=True, slots=True)
class Words:
    """A column of words: for each row the position of its word in `names`, in a byte where they are few."""

    names: tuple[str, ...]
    codes: NDArray[np.uint8] | NDArray[np.int32]

    def is_in(self, *words: str) -> Mask:
        """The rows that have one of `words`, compared whole."""
        wanted = [place for place, name in enumerate(self.names) if name in words]
        if 0 < len(wanted) <= len(CALLS):  # quicker than to look each code up
            return np.asarray(reduce(np.logical_or, (self.codes == place for place in wanted)))
        is_wanted = np.zeros(len(self.names) + 1, bool)
        is_wanted[wanted] = True
        return np.asarray(is_wanted[self.codes])

    def used(self, mask: Mask) -> list[str]:
        """The words of the rows in `mask`, the most frequent first."""
        counts = np.bincount(self.codes[mask], minlength=len(self.names))
        order = sorted(range(len(self.names)), key=lambda place: (-counts[place], self.names[place]))
        return [self.names[place] for place in order if counts[place]]


class RunLog:
    """One snapshot of a run: every question is asked of the same rows, however long the run goes on."""

    def __init__(self, run_dir: Path, table: pa.Table, selection: Selection = EVERYTHING) -> None:
        self.run_dir = run_dir
        self.selection = selection
        self._table = table
        self._raws = dict[str, Raw]()
        self._words = dict[str, Words]()
        self._numbers = dict[str, Floats]()
        self._ints = dict[str, Ints]()

    def __len__(self) -> int:
        return len(self._table)

    def select(self, selection: Selection) -> RunLog:
        """The same snapshot under another selection."""
        return RunLog(self.run_dir, self._table, selection)

    @property
    def name(self) -> str:
        """Where the run is, as its user may type it."""
        return object_store.place(self.run_dir)

    def words(self, column: str) -> Words:
        """A column of words; "" where a row says nothing."""
        if column not in self._words:
            self._words[column] = _words(self._table[column])
        return self._words[column]

    def numbers(self, column: str) -> Floats:
        """A column of numbers; NaN where a row says nothing."""
        if column not in self._numbers:
            values, unsaid = self._raw(column)
            found = values.astype(np.float64, copy=unsaid is not None)
            if unsaid is not None:
                found[unsaid] = np.nan
            self._numbers[column] = found
        return self._numbers[column]

    def ints(self, column: str) -> Ints:
        """A column of whole numbers; 0 where a row says nothing."""
        if column not in self._ints:
            values, unsaid = self._raw(column)
            known = values if unsaid is None else np.where(unsaid, 0, values)
            self._ints[column] = known.astype(np.int64, copy=False)
        return self._ints[column]

    def is_true(self, column: str) -> Mask:
        """The rows in which a column of truth values says yes."""
        values, unsaid = self._raw(column)
        found = values.astype(bool)
        return found if unsaid is None else np.asarray(found & ~unsaid)

    def at(self, column: str, rows: Rows) -> Floats:
        """`numbers` of these rows; quicker, because `numbers` converts all of them."""
        values, unsaid = self._raw(column)
        found = values[rows].astype(np.float64, copy=False)
        if unsaid is not None:
            found[unsaid[rows]] = np.nan
        return found

    def pick(self, column: str, rows: Rows) -> Floats:
        """The numbers that these rows say in a column."""
        return said(self.at(column, rows))

    def _raw(self, column: str) -> Raw:
        if column not in self._raws:
            self._raws[column] = raw(whole(self._table[column]))
        return self._raws[column]

    def kind(self, *kinds: str) -> Mask:
        """Rows of these kinds."""
        return self.words("kind").is_in(*kinds)

    def role(self, role: str) -> Mask:
        """Model calls in this role."""
        return self.kind("model_call") & self.words("role").is_in(role)

    @cached_property
    def live(self) -> Mask:
        """All rows that are work of this run: no replays, no second opinions."""
        opinion = self.words("role").is_in("judge") & ~self.words("alias").is_in("")
        return ~(self.is_true("is_replayed") | opinion)

    @cached_property
    def epochs(self) -> Ints:
        """The segments of the run, oldest first."""
        live = self.live
        epochs = self.ints("epoch") if live.all() else self.ints("epoch")[live]
        if len(epochs) and epochs.min() == epochs.max():
            return epochs[:1]
        # Epochs are few and small: to count them is quicker than to sort a million rows.
        is_small = len(epochs) and epochs.min() >= 0 and epochs.max() < len(epochs) + 1000
        return np.flatnonzero(np.bincount(epochs)) if is_small else np.unique(epochs)

    @cached_property
    def tasks(self) -> Mask:
        """Live rows of the tasks and the segment that are asked for."""
        selection, mask = self.selection, self.live
        if not selection.all_runs and len(self.epochs) > 1:
            mask = mask & (self.ints("epoch") == self.epochs[-1])
        if selection.trials:
            mask = mask & np.isin(self.ints("trial"), selection.trials)
        if selection.categories:
            mask = mask & self.words("category").is_in(*selection.categories)
        return mask if self.is_of_benchmark else np.zeros(len(mask), bool)

    @cached_property
    def calls(self) -> Mask:
        """Of `tasks` the rows of calls that are asked for."""
        mask, selection = self.tasks & self.kind(*CALLS), self.selection
        for column, wanted in (
            ("tool", selection.tools),
            ("model", selection.models),
            ("status", selection.statuses),
        ):
            if wanted:
                mask = mask & self.words(column).is_in(*wanted)
        return mask

    @cached_property
    def is_error(self) -> Mask:
        """Calls that ended badly. A program's exit code counts: the sandbox did its part, the program not."""
        status, unsaid = self._raw("exit_status")
        is_bad = status != 0
        if unsaid is not None:
            is_bad &= ~unsaid
        return np.asarray(is_bad | ~self.words("status").is_in("ok"))

    @cached_property
    def timed(self) -> Mask:
        """Of `calls` those whose time counts: a fast failure is no fast call, unless it was asked for."""
        return self.calls if self.selection.statuses else self.calls & ~self.is_error

    @property
    def is_of_benchmark(self) -> bool:
        """Whether the run is of a benchmark that is asked for."""
        wanted = self.selection.benchmarks
        return not wanted or str(self.facts.get("benchmark", "")) in wanted

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the newest `run_start` says of the run; empty where there is none to read."""
        rows = np.flatnonzero(self.live & self.kind("run_start"))
        if not len(rows):
            return {}
        newest = max(rows.tolist(), key=lambda row: (self.ints("epoch")[row], self.ints("t_start")[row]))
        details = self.words("detail")
        try:
            facts = json.loads(details.names[details.codes[newest]])
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}

    @cached_property
    def results(self) -> RunLog:
        """The results that count, of the tasks that are asked for, over all segments: one row each."""
        rows = np.flatnonzero(self.kind("result"))
        table = take(self._table, rows)
        counted = take(table, np.array(events.last_committed(table), np.int64))
        log = RunLog(self.run_dir, counted, self.selection)
        mask = np.full(len(counted), self.is_of_benchmark)
        if self.selection.trials:
            mask &= np.isin(log.ints("trial"), self.selection.trials)
        if self.selection.categories:
            mask &= log.words("category").is_in(*self.selection.categories)
        if mask.all():
            return log
        return RunLog(self.run_dir, take(counted, np.flatnonzero(mask)), self.selection)

    @property
    def absence(self) -> str | None:
        """Why there is nothing to show, in a sentence; None where rows are left."""
        if not self.live.any():
            return f"{self.name}: the event log is empty, so there is nothing to analyse yet."
        if not self.is_of_benchmark:
            known = plain(self.facts.get("benchmark", "unknown"))
            return f"{self.name}: this run is of benchmark {known}, which --benchmark leaves out."
        return None

    def no(self, what: str) -> str:
        """That no `what` is in the part that is asked for, and how to see more."""
        reasons = [self.selection.line] if self.selection.line else []
        if not self.selection.all_runs and len(self.epochs) > 1:
            reasons.append(f"last segment, epoch {self.epochs[-1]}; --all-runs looks at all of them")
        limits = f" ({'; '.join(reasons)})" if reasons else ""
        return f"{self.name}: no {what} is in the log yet{limits}."


def open_run(run_dir: Path, selection: Selection = EVERYTHING, columns: Iterable[str] = EVERY) -> RunLog:
    """A snapshot of the run in `run_dir` with `columns`. Raises RunDirError where there is no run."""
    filters = {"trial": selection.trials, "category": selection.categories}
    needed = [column for column, wanted in filters.items() if wanted]
    facts = FACTS if selection.benchmarks else ()
    names = dict.fromkeys((*BASE, *needed, *facts, *columns))
    return RunLog(run_dir, events.columns(run_dir, list(names)), selection)


def _words(column: pa.ChunkedArray | pa.Array) -> Words:
    if isinstance(column, pa.ChunkedArray):
        column = whole(column.unify_dictionaries())
    if isinstance(column, pa.ChunkedArray):  # of no chunk
        return Words((), np.empty(0, np.int32))
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    names = [name or "" for name in column.dictionary.to_pylist()]
    codes, unsaid = raw(column.indices)
    if unsaid is not None:
        if "" not in names:
            names.append("")
        codes = np.where(unsaid, names.index(""), codes)
    if len(names) <= _FEW:
        return Words(tuple(names), codes.astype(np.uint8))
    return Words(tuple(names), codes.astype(np.int32, copy=False))


def sums(codes: NDArray[Any], values: Floats, size: int) -> Floats:
    """The sum of `values` for each code below `size`; what is not said adds nothing."""
    return np.bincount(codes, np.nan_to_num(values), minlength=size).astype(np.float64, copy=False)


def said(values: Floats) -> Floats:
    """The values that are no NaN."""
    unsaid = np.isnan(values)
    return values[~unsaid] if unsaid.any() else values


def split(words: Words, rows: Ints, values: Floats) -> dict[str, Floats]:
    """The `values` of these rows that are said, by the word of the row; the most frequent word first."""
    codes = words.codes[rows]
    order = np.argsort(codes, kind="stable")
    edges = np.searchsorted(codes[order], np.arange(len(words.names) + 1)).tolist()
    ordered = values[order]
    parts = (said(ordered[start:end]) for start, end in pairwise(edges))
    found = [(name, own) for name, own in zip(words.names, parts, strict=True) if len(own)]
    return dict(sorted(found, key=lambda item: (-len(item[1]), item[0])))


def counts(words: Words, mask: Mask) -> dict[str, int]:
    """How many rows in `mask` have each word."""
    found = np.bincount(words.codes[mask], minlength=len(words.names)).tolist()
    return {name: count for name, count in zip(words.names, found, strict=True) if count}
