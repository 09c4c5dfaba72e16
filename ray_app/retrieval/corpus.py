"""The documents: JSONL rows turned once into a memory-mapped Arrow file, read by row afterwards.

Owns the ids, the texts and their lengths. Refuses rows that could not be found again: an id that is no
integer, an id used twice, a row without text. Keys other than the id and the text are dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_app.errors import DatasetError

BATCH_ROWS = 10_000
TEXT_KEYS = ("content", "contents")
SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string()), ("chars", pa.int32())])
INT64 = np.iinfo(np.int64)

IntArray = npt.NDArray[np.int64]


class Document(NamedTuple):
    document_id: int
    text: str


def build_corpus(jsonl: Path, out: Path) -> int:
    """Writes the rows of `jsonl` as an uncompressed Arrow file at `out` and returns their number.

    Each line is an object with `id` (an integer, or its decimal text) and `content` or `contents`; blank
    lines are skipped. `out` appears whole or not at all. Raises DatasetError with the line number.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        count = _write(jsonl, temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return count


class _Texts(NamedTuple):
    """The texts of one record batch: offsets into their UTF-8. Ten times faster than by Arrow's scalars."""

    offsets: npt.NDArray[np.int32]
    data: memoryview

    @classmethod
    def of(cls, column: Any) -> _Texts:
        _, offsets, data = column.buffers()
        return cls(np.frombuffer(offsets, np.int32)[column.offset :], memoryview(data))

    def at(self, place: int) -> str:
        return str(self.data[self.offsets[place] : self.offsets[place + 1]], "utf-8")


class Corpus:
    """Documents by row number. Ids and lengths are in memory; a text is read when it is asked for."""

    def __init__(self, path: Path, batches: list[Any], source: Any) -> None:
        self.path = path
        self._texts = [_Texts.of(batch.column("text")) for batch in batches]
        self._source = source  # the batches point into this mapping
        self.ids: IntArray = _column(batches, "id").astype(np.int64)
        self.chars: IntArray = _column(batches, "chars").astype(np.int64)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches[:-1])])
        self._order = np.argsort(self.ids, kind="stable")
        self._sorted_ids = self.ids[self._order]

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Maps the file that `build_corpus` wrote. Raises DatasetError when it is missing or cut short."""
        try:
            source = pa.memory_map(str(path))
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except FileNotFoundError:
            raise DatasetError(f"corpus file {str(path)!r} does not exist; build it first") from None
        except (OSError, pa.ArrowInvalid) as error:
            raise DatasetError(f"corpus file {str(path)!r} is unreadable ({error}); build it again") from None
        if not batches or not reader.schema.equals(SCHEMA):
            raise DatasetError(f"corpus file {str(path)!r} holds no documents of this format; build it again")
        return cls(path, batches, source)

    def __len__(self) -> int:
        return len(self.ids)

    def text(self, row: int) -> str:
        """The text of one row. Raises IndexError outside 0 .. len - 1."""
        return self.texts(np.array([row]))[0]

    def texts(self, rows: IntArray) -> list[str]:
        """The texts of `rows`, in their order. Raises IndexError for one outside 0 .. len - 1."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a corpus of {len(self)}")
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        places = zip(batches.tolist(), (rows - self._starts[batches]).tolist(), strict=True)
        return [self._texts[batch].at(place) for batch, place in places]

    def row_of(self, ids: IntArray) -> IntArray:
        """Rows of document `ids`, in their order; -1 where the corpus has no such id."""
        at = np.minimum(np.searchsorted(self._sorted_ids, ids), len(self) - 1)
        return np.where(self._sorted_ids[at] == ids, self._order[at], -1)


def parse_id(value: object) -> int | None:
    """The 64-bit integer that `value` is or spells in decimal; None for anything else."""
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        # int() also takes underscores and foreign digits, which no other reader of the file would.
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            return None
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if INT64.min <= value <= INT64.max else None


def _write(jsonl: Path, out: Path) -> int:
    lines: dict[int, int] = {}
    batch: list[Document] = []
    with pa.OSFile(str(out), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for number, document in _documents(jsonl):
            first = lines.setdefault(document.document_id, number)
            if first != number:
                raise _line_error(jsonl, number, f"id {document.document_id} is also on line {first}")
            batch.append(document)
            if len(batch) == BATCH_ROWS:
                writer.write_batch(_batch(batch))
                batch.clear()
        if batch:
            writer.write_batch(_batch(batch))
    if not lines:
        raise DatasetError(f"{str(jsonl)!r} holds no documents; expected one JSON object per line")
    return len(lines)


def _documents(jsonl: Path) -> Iterator[tuple[int, Document]]:
    try:
        with jsonl.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _document(jsonl, number, line)
    except OSError as error:
        raise DatasetError(f"cannot read corpus {str(jsonl)!r}: {error.strerror}") from None


def _document(jsonl: Path, number: int, line: bytes) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:  # broken JSON, or bytes that are not UTF-8
        raise _line_error(jsonl, number, f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise _line_error(jsonl, number, f"expected a JSON object, found {type(row).__name__}")
    document_id = parse_id(row.get("id"))
    if document_id is None:
        raise _line_error(jsonl, number, f"id {row.get('id')!r} is not an integer")
    text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
    if text is None:
        raise _line_error(jsonl, number, f"no text under {' or '.join(TEXT_KEYS)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _line_error(jsonl, number, "half a surrogate pair in the text, no character") from None
    return Document(document_id, text)


def _batch(documents: list[Document]) -> Any:
    ids = [document.document_id for document in documents]
    texts = [document.text for document in documents]
    return pa.record_batch([ids, texts, [len(text) for text in texts]], schema=SCHEMA)


def _column(batches: list[Any], name: str) -> npt.NDArray[Any]:
    return np.concatenate([batch.column(name).to_numpy() for batch in batches])


def _line_error(jsonl: Path, number: int, what: str) -> DatasetError:
    return DatasetError(f"{jsonl}:{number}: {what}; mend or remove the line")
