"""The event log of a run, read side: Arrow schemas, the one reader, results, payloads, DuckDB views.

A run directory holds two tables, each a folder of files: `log/` (one row per `records.Event`) and
`payloads/` (texts by content hash). A file is an Arrow IPC stream that a writer still appends to
(`*.arrows`) or a finished Parquet file. The same row may lie in two files for a moment, because a
new file is renamed into place before the old one is deleted; the reader drops such doubles by key.

`event_writer.py` makes, recovers and compacts these files. Nothing here writes. IPC streams carry no
checksum: a cut stream gives its complete batches, a flipped bit in one may go unseen.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_app.errors import RunDirError, StorageError
from ray_app.records import Event

SCHEMA_VERSION = 1
STREAM, PARQUET = ".arrows", ".parquet"
# Rows of a judge-only pass (`rejudge.py`): evidence of their own, which no figure of the run counts.
SECOND_OPINION = "coalesce(role = 'judge' and alias <> '', false)"
_BATCH_ROWS = 2048  # payload bodies can be large: a batch of them has to fit in memory
_GONE = {errno.ENOENT, errno.ESTALE}
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _field(name: str, hint: Any) -> pa.Field:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    base = next(part for part in parts if part is not NoneType)
    kind = pa.string() if get_origin(base) is Literal else _ARROW[base]
    return pa.field(name, pa.timestamp("us", tz="UTC") if name == "t_start" else kind, NoneType in parts)


EVENT_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("schema_version", pa.int16(), nullable=False),
        pa.field("event_id", pa.string(), nullable=False),
        *(_field(name, hint) for name, hint in get_type_hints(Event).items()),
    ]
)
PAYLOAD_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("hash", pa.string(), nullable=False),
        pa.field("media", pa.string(), nullable=False),
        pa.field("body", pa.large_string(), nullable=False),
    ]
)


class TableFiles(NamedTuple):
    """Where one table of a run lies; `key` names the column by which doubles are known."""

    folder: Path
    key: str
    schema: pa.Schema


class StreamBatch(NamedTuple):
    """One complete batch of an IPC stream and the byte offset at which it ends."""

    batch: pa.RecordBatch
    end: int


def event_files(run_dir: Path) -> TableFiles:
    """The event table of the run at `run_dir`."""
    return TableFiles(Path(run_dir) / "log", "event_id", EVENT_SCHEMA)


def payload_files(run_dir: Path) -> TableFiles:
    """The payload table of the run at `run_dir`."""
    return TableFiles(Path(run_dir) / "payloads", "hash", PAYLOAD_SCHEMA)


def read(run_dir: Path, columns: Sequence[str] | None = None) -> pa.RecordBatchReader:
    """A snapshot of the event log, in batches: each flushed event exactly once, in no order of time.

    `columns` picks and orders columns (default: all of EVENT_SCHEMA). Fields read as nullable: a file
    of an older schema has nulls where it lacks a column; columns unknown here are left out. The
    reader keeps the ids that it has seen, about 120 bytes an event. Raises RunDirError where there is
    no log, StorageError while iterating where a file cannot be read.
    """
    names = EVENT_SCHEMA.names if columns is None else list(columns)
    if unknown := sorted(set(names) - set(EVENT_SCHEMA.names)):
        raise ValueError(f"unknown event columns {unknown}: expected some of {EVENT_SCHEMA.names}")
    return _reader(event_files(run_dir), names)


def read_payloads(run_dir: Path, hashes: Collection[str]) -> dict[str, str]:
    """Bodies by hash, for those of `hashes` that are stored; a hash that is not stored is left out."""
    wanted, found = pa.array(sorted(set(hashes)), pa.string()), dict[str, str]()
    for batch in _reader(payload_files(run_dir), ["hash", "body"]):
        if len(found) == len(wanted):
            break
        hit = batch.filter(pc.is_in(batch["hash"], value_set=wanted))
        found.update(zip(hit["hash"].to_pylist(), hit["body"].to_pylist(), strict=True))
    return found


def results(run_dir: Path) -> pa.Table:
    """The result that counts for each (rollout_key, trial): EVENT_SCHEMA columns, one row each.

    Of several, the highest epoch counts, and within it the last committed: by sequence number where
    one writer wrote them, else the writer with the latest `t_start`. So an owed result gives way to
    the verdict that came later.
    """
    reader = read(run_dir)
    table = pa.Table.from_batches(
        (batch.filter(pc.equal(batch["kind"], "result")) for batch in reader), schema=reader.schema
    )
    return table.take(pa.array(_last_committed(table), pa.int64()))


def connect(run_dir: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with views `events`, `results` and `payloads`; every query reads anew.

    `t_start` is a plain TIMESTAMP in UTC there: DuckDB hands TIMESTAMP WITH TIME ZONE to Python only
    where pytz is installed. Values belong in query parameters, never in the text of a query.
    """
    _check_folder(event_files(run_dir).folder)
    connection = duckdb.connect(":memory:")
    payloads = payload_files(run_dir)
    connection.register("events", _View(EVENT_SCHEMA, lambda: read(run_dir)))
    connection.register("results", _View(EVENT_SCHEMA, lambda: results(run_dir).to_batches()))
    connection.register("payloads", _View(PAYLOAD_SCHEMA, lambda: _reader(payloads, PAYLOAD_SCHEMA.names)))
    return connection


def log_files(folder: Path) -> list[Path]:
    """Every file of a table, streams before Parquet, none missed while files replace one another.

    A directory listing may skip both a file deleted and one created while it runs, so it counts only
    when a second one shows the same names.
    """
    before, now = None, _names(folder)
    while before != now:
        before, now = now, _names(folder)
    return [folder / name for name in now]


def snapshot(files: TableFiles, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of `schema` over all files of a table, each key once; relists when a file vanishes."""
    seen, done, gone = set[str](), set[Path](), set[Path]()
    names = list(dict.fromkeys([files.key, *schema.names]))
    is_complete = False
    while not is_complete:
        is_complete = True
        for path in [path for path in log_files(files.folder) if path not in done]:
            for batch in _read_file(path, names, gone):
                if rows := _unseen(_key_of(batch, files.key, path), seen):
                    yield conform(batch if len(rows) == len(batch) else batch.take(pa.array(rows)), schema)
            if path in gone:
                is_complete = False
            done.add(path)


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


class _View:
    """What DuckDB scans: each request for the Arrow stream reads the log anew."""

    def __init__(self, schema: pa.Schema, source: Callable[[], Any]) -> None:
        naive = [pa.timestamp("us") if pa.types.is_timestamp(field.type) else field.type for field in schema]
        self._schema = pa.schema(list(zip(schema.names, naive, strict=True)))
        self._source = source

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        batches = (conform(batch, self._schema) for batch in self._source())
        return pa.RecordBatchReader.from_batches(self._schema, batches).__arrow_c_stream__(requested_schema)


def _reader(files: TableFiles, names: Sequence[str]) -> pa.RecordBatchReader:
    _check_folder(files.folder)
    schema = relaxed(pa.schema([files.schema.field(name) for name in names]))
    return pa.RecordBatchReader.from_batches(schema, snapshot(files, schema))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise RunDirError(f"no event log at {folder}: expected a run directory that holds log/ and payloads/")


def _names(folder: Path) -> list[str]:
    try:
        streams = sorted(path.name for path in folder.iterdir() if path.suffix == STREAM)
        return streams + sorted(path.name for path in folder.iterdir() if path.suffix == PARQUET)
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error.strerror}") from error


def _read_file(path: Path, names: Sequence[str], gone: set[Path]) -> Iterator[pa.RecordBatch]:
    """Batches of one file; puts it into `gone` where it was published or compacted since the listing."""
    try:
        if path.suffix == STREAM:
            yield from (item.batch for item in stream_batches(path))
        else:
            yield from _parquet_batches(path, names)
    except OSError as error:
        if error.errno not in _GONE:
            raise StorageError(f"cannot read {path}: {error}") from error
        gone.add(path)
    except pa.ArrowException as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _parquet_batches(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        present = [name for name in names if name in file.schema_arrow.names]
        yield from file.iter_batches(_BATCH_ROWS, columns=present)


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


def _last_committed(table: pa.Table) -> list[int]:
    starts = table["t_start"].cast(pa.int64())
    columns = (table["rollout_key"], table["trial"], table["epoch"], starts, table["event_id"])
    rows = list(zip(*(column.to_pylist() for column in columns), strict=True))
    latest: dict[tuple[Any, ...], Any] = {}  # of each writer, per (rollout, trial, epoch)
    for rollout, trial, epoch, start, event_id in rows:
        group = (rollout, trial, epoch, event_id.rpartition("-")[0])
        latest[group] = max(start, latest.get(group, start))
    winners: dict[tuple[Any, ...], tuple[Any, int]] = {}
    for position, (rollout, trial, epoch, _, event_id) in enumerate(rows):
        writer, _, number = event_id.rpartition("-")
        rank = (epoch, latest[rollout, trial, epoch, writer], writer, int(number)), position
        winners[rollout, trial] = max(winners.get((rollout, trial), rank), rank)
    return sorted(position for _, position in winners.values())
