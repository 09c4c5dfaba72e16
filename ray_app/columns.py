"""A snapshot of a table as whole columns: every row once, words that repeat as codes.

For readers that look at a few columns of very many rows, where `table_files.snapshot` streams: the same
files, the same promise (each key once, whatever is published or merged meanwhile), in a fraction of the time
and for as much memory as the columns take. Nothing here writes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ray_app.errors import StorageError
from ray_app.table_files import (
    COMPACTED,
    GONE,
    PARQUET,
    RELIST_PAUSE_S,
    RELIST_S,
    STREAM,
    TableFiles,
    log_files,
    relaxed,
    stream_batches,
)

WORD = pa.dictionary(pa.int32(), pa.string())


def read_columns(files: TableFiles, names: Sequence[str], plain: Collection[str] = ()) -> pa.Table:
    """The columns `names` of all rows, each key once, in no order of time.

    Strings come as dictionaries of one chunk, but for those in `plain` (ids, which hardly repeat). A file of
    an older schema has nulls where it lacks a column. Raises StorageError where a file cannot be read.
    """
    schema = coded(pa.schema([files.schema.field(name) for name in names]), {*plain, files.key})
    listed = log_files(files.folder)
    # A merge drops doubles, so a file that is alone and was merged holds none: its keys need no look.
    if len(listed) == 1 and listed[0].suffix == PARQUET and listed[0].name.startswith(COMPACTED):
        table = _read(listed[0], schema, files.key)
        if table is not None:
            return table
    return _distinct(_snapshot(files, with_key(schema, files)), files.key).select(list(names))


def coded(schema: pa.Schema, plain: Collection[str]) -> pa.Schema:
    """`schema` with every field nullable, and strings as dictionaries but for those in `plain`."""
    fields = (
        field.with_type(WORD) if field.type == pa.string() and field.name not in plain else field
        for field in schema
    )
    return relaxed(pa.schema(list(fields)))


def with_key(schema: pa.Schema, files: TableFiles) -> pa.Schema:
    """`schema`, with the key of the table where it lacks it."""
    return schema if files.key in schema.names else schema.append(pa.field(files.key, pa.string()))


def _snapshot(files: TableFiles, schema: pa.Schema) -> pa.Table:
    """All rows of all files, doubles too; lists again when a file vanishes while it is read."""
    found, give_up = dict[Path, pa.Table](), time.monotonic() + RELIST_S
    while True:
        paths = [path for path in log_files(files.folder) if path.suffix == STREAM or path not in found]
        read = {path: _read(path, schema, files.key) for path in paths}
        # What a stream held before it was published stays: doubles are dropped, losses are not.
        found |= {path: table for path, table in read.items() if table is not None}
        gone = {path for path, table in read.items() if table is None}
        if not gone:
            return pa.concat_tables([pa.Table.from_batches([], schema), *found.values()])
        if still := gone.intersection(log_files(files.folder)):  # a shared folder's listing lags behind
            if time.monotonic() > give_up:
                raise StorageError(f"cannot read {min(still)}: it is listed, but it is not there")
            time.sleep(RELIST_PAUSE_S)


def _read(path: Path, schema: pa.Schema, key: str) -> pa.Table | None:
    """The rows of one file; None where it vanished since it was listed."""
    try:
        if path.suffix == STREAM:
            batches = [item.batch for item in stream_batches(path)]
            table = pa.Table.from_batches(batches, None if batches else schema)
        else:
            metadata = pq.read_metadata(path)
            fields = [field for field in schema if field.name in set(metadata.schema.names)]
            words = [field.name for field in fields if pa.types.is_dictionary(field.type)]
            with pq.ParquetFile(path, metadata=metadata, read_dictionary=words, pre_buffer=True) as file:
                table = file.read([field.name for field in fields])
        if key not in table.schema.names and key in schema.names:
            raise StorageError(f"cannot read {path}: it has no column {key!r}, so it is no file of this log")
        return _conform(table, schema)
    except OSError as error:
        if error.errno not in GONE:
            raise StorageError(f"cannot read {path}: {error}") from error
        return None
    except pa.ArrowException as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    present = set(table.schema.names)
    columns = [
        _cast(table[field.name], field.type) if field.name in present else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    if kind == WORD and not pa.types.is_dictionary(column.type):
        return pc.dictionary_encode(column.cast(pa.string())).cast(WORD)
    return column.cast(kind)


def _distinct(table: pa.Table, key: str) -> pa.Table:
    """The first row of each key."""
    keys = whole(table[key])
    codes = keys.dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    if len(codes.dictionary) == len(codes):
        return table
    _, first = np.unique(raw(codes.indices).values, return_index=True)
    rows, columns, schema = _indices(np.sort(first)), table.columns, table.schema
    del keys, codes, table
    for place, column in enumerate(columns):  # one by one, so that never all are there twice
        columns[place] = column.take(rows)
    return pa.table(columns, schema=schema)


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; `combine_chunks` would copy the only chunk, too."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class Raw(NamedTuple):
    """A column's values as they lie in memory, and where they say nothing; None where all do."""

    values: NDArray[Any]
    unsaid: NDArray[np.bool_] | None


def raw(array: pa.Array) -> Raw:
    """The numbers, times (as their whole number) or truth values of an array, without a copy where possible.

    Reads Arrow's buffers: `to_numpy` and `pa.scalar` would import pandas, which takes longer than reading a
    million rows does.
    """
    validity, data = array.buffers()
    start, stop = array.offset, array.offset + len(array)
    unsaid = None if not array.null_count else ~_bits(validity, start, stop)
    if not len(array):
        return Raw(np.empty(0, np.float64), unsaid)
    if pa.types.is_boolean(array.type):
        return Raw(_bits(data, start, stop), unsaid)
    kind = f"{'f' if pa.types.is_floating(array.type) else 'i'}{array.type.bit_width // 8}"
    return Raw(np.frombuffer(data, kind)[start:stop], unsaid)


def _bits(buffer: pa.Buffer, start: int, stop: int) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(buffer, np.uint8), count=stop, bitorder="little")[start:].view(
        np.bool_
    )


def take(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """These rows of `table`. `pa.array` would import pandas for it, which takes longer than the reading."""
    return table.take(_indices(rows))


def _indices(rows: NDArray[np.int64]) -> pa.Array:
    numbers = np.ascontiguousarray(rows, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])
