"""The files of one table of a log: which there are, and what they hold, each row once.

A table is a folder of files: Arrow IPC streams that a writer still appends to (`*.arrows`) and finished
Parquet files. The same row may lie in two files for a moment, because a new file gets its name before the
old one is deleted; doubles are dropped by key. Files may be published, merged and deleted while they are
read. IPC streams carry no checksum: a cut stream gives its complete batches, a flipped bit in one may go
unseen. Nothing here writes.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_app.errors import StorageError
from ray_app.object_store import refresh

STREAM, PARQUET = ".arrows", ".parquet"
COMPACTED = "compacted"  # how the names of merged files begin: doubles were dropped from them
_BATCH_ROWS, _BATCH_BYTES = 65_536, 16 << 20
RELIST_S, RELIST_PAUSE_S = 90.0, 0.05  # longer than file systems keep a listing
GONE = {errno.ENOENT, errno.ESTALE}

# By column, the values of the rows that are asked for.
Where = Mapping[str, Collection[Any]]


class TableFiles(NamedTuple):
    """Where one table of a run lies; `key` names the column by which doubles are known."""

    folder: Path
    key: str
    schema: pa.Schema


class StreamBatch(NamedTuple):
    """One complete batch of an IPC stream and the byte offset at which it ends."""

    batch: pa.RecordBatch
    end: int


def log_files(folder: Path) -> list[Path]:
    """Every file of a table, streams before Parquet, none missed while files replace one another.

    A directory listing may skip both a file deleted and one created while it runs, so it counts only
    when a second one shows the same names. The mirror of an object store is brought up to it first.
    """
    refresh(folder.parent, (folder.name,))
    before, now = None, _names(folder)
    while before != now:
        before, now = now, _names(folder)
    return [folder / name for name in now]


def snapshot(files: TableFiles, schema: pa.Schema, where: Where | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of `schema` over all files of a table, each key once; relists when a file vanishes."""
    seen, done, gone = set[str](), set[Path](), set[Path]()
    give_up = time.monotonic() + RELIST_S
    paths = log_files(files.folder)
    while paths:
        gone.clear()
        yield from distinct(files, paths, schema, seen, gone, where)
        done.update(path for path in paths if path not in gone)
        if not gone:
            return
        listed = log_files(files.folder)
        if still := gone.intersection(listed):  # a shared folder's listing lags behind
            if time.monotonic() > give_up:
                raise StorageError(f"cannot read {min(still)}: it is listed, but it is not there")
            time.sleep(RELIST_PAUSE_S)
        # A stream is read again: its writer may have gone on to a next part, which is listed now.
        paths = [path for path in listed if path.suffix == STREAM or path not in done]


def distinct(
    files: TableFiles,
    paths: Iterable[Path],
    schema: pa.Schema,
    seen: set[str],
    gone: set[Path],
    where: Where | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of `schema` over `paths`, without the keys in `seen`.

    Adds to `seen`, and to `gone` the paths that vanished since they were listed.
    """
    names = list(dict.fromkeys([files.key, *schema.names]))
    picked = _Picked(where, files.schema) if where is not None else None
    for path in paths:
        for batch in _read_file(path, names, picked, gone):
            if rows := _unseen(_key_of(batch, files.key, path), seen):
                yield conform(batch if len(rows) == len(batch) else batch.take(pa.array(rows)), schema)


class _Picked:
    """Tells the rows that have in each column of `where` one of its values; a file without it has none."""

    def __init__(self, where: Where, schema: pa.Schema) -> None:
        self.columns = list(where)
        self._values = {name: frozenset(values) for name, values in where.items()}
        self._sets = {
            name: pa.array(list(values), schema.field(name).type) for name, values in self._values.items()
        }

    def rows(self, batch: pa.RecordBatch | pa.Table) -> pa.Array:
        """A mask of the rows of `batch`."""
        mask = pa.repeat(pa.scalar(True), len(batch))
        for name in self.columns:
            if name not in batch.schema.names:
                return pa.repeat(pa.scalar(False), len(batch))
            mask = pc.and_(mask, self._in(name, batch[name]))
        return mask

    def _in(self, name: str, column: Any) -> Any:
        if len(self._sets[name]) < len(column):
            return pc.is_in(column, value_set=self._sets[name])
        values = self._values[name]  # hashed once, where Arrow would hash them for every batch
        return pa.array([value in values for value in column.to_pylist()], pa.bool_())


def stream_batches(path: Path) -> Iterator[StreamBatch]:
    """The complete batches of an IPC stream, up to the first that does not read (a cut, or its end)."""
    with pa.OSFile(str(path)) as source:
        stream = _step(lambda: pa.ipc.open_stream(source))
        while stream is not None and (batch := _step(lambda: _checked(stream.read_next_batch()))) is not None:
            yield StreamBatch(batch, source.tell())


def file_schema(path: Path) -> pa.Schema | None:
    """The Arrow schema of a file of either form; None for a stream cut within its first message."""
    if path.suffix == PARQUET:
        return pq.read_schema(path)
    with pa.OSFile(str(path)) as source:
        stream = _step(lambda: pa.ipc.open_stream(source))
        return None if stream is None else stream.schema


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """`batch` with the columns of `schema`, in its order; nulls where it lacks one."""
    present = set(batch.schema.names)
    arrays = [
        batch[field.name].cast(field.type) if field.name in present else pa.nulls(len(batch), field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def relaxed(schema: pa.Schema) -> pa.Schema:
    """`schema` with every field nullable: what can be promised over files of several versions."""
    return pa.schema([field.with_nullable(True) for field in schema], schema.metadata)


def _names(folder: Path) -> list[str]:
    try:
        streams = sorted(path.name for path in folder.iterdir() if path.suffix == STREAM)
        return streams + sorted(path.name for path in folder.iterdir() if path.suffix == PARQUET)
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error.strerror}") from error


def _read_file(
    path: Path, names: Sequence[str], picked: _Picked | None, gone: set[Path]
) -> Iterator[pa.RecordBatch]:
    """Batches of one file; puts it into `gone` where it was published or compacted since the listing."""
    try:
        found = (
            (item.batch for item in stream_batches(path))
            if path.suffix == STREAM
            else _parquet_batches(path, names, picked)
        )
        for batch in found:
            yield batch if picked is None else batch.filter(picked.rows(batch))
    except OSError as error:
        if error.errno not in GONE:
            raise StorageError(f"cannot read {path}: {error}") from error
        gone.add(path)
    except pa.ArrowException as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _parquet_batches(path: Path, names: Sequence[str], picked: _Picked | None) -> Iterator[pa.RecordBatch]:
    """Batches with those of `names` that the file has, and the columns that pick rows.

    Row groups of which no row is picked are left out, unread but for those columns.
    """
    with pq.ParquetFile(path) as file:
        known = set(file.schema_arrow.names)
        groups = list(range(file.num_row_groups))
        if picked is not None:
            names = list(dict.fromkeys([*names, *picked.columns]))
            groups = [group for group in groups if _has_picked(file, group, picked, known)]
        if groups:
            columns = [name for name in names if name in known]
            yield from file.iter_batches(_batch_rows(file.metadata), row_groups=groups, columns=columns)


def _has_picked(file: pq.ParquetFile, group: int, picked: _Picked, known: set[str]) -> bool:
    if not known.issuperset(picked.columns):
        return False
    return bool(pc.any(picked.rows(file.read_row_group(group, columns=picked.columns))).as_py())


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """So many rows as fit into `_BATCH_BYTES`, by their mean: payload bodies can be large."""
    rows: int = metadata.num_rows
    size: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


def _step(read: Callable[[], Any]) -> Any:
    """What `read` gives; None where the readable part of a stream ends.

    pyarrow reports a message that is cut short as an OSError without number; one with a number is
    the disk's, and rises.
    """
    try:
        return read()
    except (StopIteration, pa.ArrowException):
        return None
    except OSError as error:
        if error.errno:
            raise
        return None


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)
    return batch


def _key_of(batch: pa.RecordBatch, key: str, path: Path) -> list[str]:
    if key not in batch.schema.names:
        raise StorageError(f"cannot read {path}: it has no column {key!r}, so it is no file of this log")
    keys: list[str] = batch[key].to_pylist()
    return keys


def _unseen(keys: list[str], seen: set[str]) -> list[int]:
    """Positions of the keys not in `seen`, each the first of its kind; adds them to `seen`."""
    fresh = set(keys)
    if len(fresh) == len(keys) and seen.isdisjoint(fresh):
        rows = list(range(len(keys)))
    else:
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        rows = sorted(row for key, row in first.items() if key not in seen)
    seen |= fresh
    return rows
