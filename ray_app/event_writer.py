"""The event log of a run, write side: the writer of one process, recovery and compaction.

A writer appends to an Arrow IPC stream per table, `<writer_id>-<part>.arrows`, and from time to time
publishes the stream as Parquet and opens the next part. A file is finished under a temporary name,
synced, renamed, and only then is what it replaces deleted; a crash in between leaves doubles, which
the reader drops. Nothing is ever appended to a stream that another process, or a failed write, left.

Flushed rows survive the death of the process; the timed flush also syncs them, so that a machine that
dies takes the rows of the last `flush_s` at most. Not covered: two live writers with one id, and a
writer that is alive while `recover` or `compact` runs (the caller's promise).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ray_app.errors import StorageError
from ray_app.events import (
    EVENT_SCHEMA,
    PARQUET,
    PAYLOAD_SCHEMA,
    SCHEMA_VERSION,
    STREAM,
    TableFiles,
    event_files,
    file_schema,
    log_files,
    payload_files,
    relaxed,
    snapshot,
    stream_batches,
)
from ray_app.records import Event

_log = logging.getLogger(__name__)

_COMPACTED = "compacted"
_TEMPORARY = ".tmp"
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_GROUP_ROWS, _GROUP_BYTES = 65_536, 32 << 20  # one Parquet row group: what compaction holds in memory
_MAX_TIME_S = 253_402_300_799  # the end of the year 9999, the last that Python's datetime can show
_PYTHON = {pa.string(): (str,), pa.int64(): (int,), pa.float64(): (float, int), pa.bool_(): (bool,)}

_FIELDS = EVENT_SCHEMA.names[2:]
_ROW = attrgetter(*_FIELDS)
_ALLOWED = tuple(
    frozenset((*_PYTHON.get(field.type, (float, int)), *([NoneType] if field.nullable else [])))
    for field in list(EVENT_SCHEMA)[2:]
)
_TIME = _FIELDS.index("t_start")


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What `recover` found: streams made Parquet, their rows, and the torn tails that were dropped."""

    streams: int = 0
    events: int = 0
    payloads: int = 0
    torn_streams: int = 0
    torn_bytes: int = 0


class EventWriter:
    """Appends events and payloads of one process; thread-safe, and never waits for an event loop.

    `writer_id` must be a safe file name that no other process start of this run has used: ids of events
    are built from it. `metadata` (a benchmark's canary, say) is stored with the schema of every file.

    While writing fails (a full disk), `append`, `payload` and `flush` raise StorageError; rows taken
    before stay in memory and the timed flush tries again. A Parquet file that cannot be published is
    logged and tried again; its stream stays readable, and `close` raises if it still fails.
    """

    def __init__(
        self,
        run_dir: Path,
        writer_id: str,
        *,
        flush_rows: int = 256,
        flush_s: float = 1.0,
        publish_s: float = 60.0,
        publish_bytes: int = 64 << 20,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._id = writer_id
        self._flush_rows, self._flush_s = flush_rows, flush_s
        self._publish_s, self._publish_bytes = publish_s, publish_bytes
        tables = payload_files(run_dir), event_files(run_dir)
        _check_writer_id(writer_id, tables)
        self._payload_stream, self._event_stream = (
            _Stream(table.folder, writer_id, table.schema.with_metadata(metadata)) for table in tables
        )
        pa.array([""])  # pyarrow imports pandas at its first conversion (0.4 s): now, not in an event loop
        self._rows: list[tuple[Any, ...]] = []
        self._bodies: list[tuple[str, str, str]] = []
        self._stored: set[str] = set()
        self._count = 0
        self._failure = ""
        self._is_closed = False
        self._lock = threading.RLock()
        self._publishing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tend, name=f"events-{writer_id}", daemon=True)
        self._thread.start()

    def append(self, event: Event) -> str:
        """Takes `event` and returns its id; an error (StorageError, TypeError) means it is not taken."""
        row = _row(event)
        with self._lock:
            self._check_open()
            event_id = f"{self._id}-{self._count}"
            self._count += 1
            self._rows.append((event_id, *row))
            if len(self._rows) >= self._flush_rows:
                with suppress(StorageError):  # this row is taken: the next call raises what is remembered
                    self._write()
        return event_id

    def payload(self, body: str, media: Literal["json", "text"] = "json") -> str:
        """Stores `body` once per writer; returns the SHA-256 of its UTF-8 (32 hex digits).

        A lone surrogate is stored as its JSON escape, since UTF-8 has no form for it.
        """
        data = body.encode("utf-8", "backslashreplace")
        key = hashlib.sha256(data).hexdigest()[:32]
        with self._lock:
            self._check_open()
            if key not in self._stored:
                self._bodies.append((key, media, data.decode()))
                self._stored.add(key)
        return key

    def flush(self) -> None:
        """Hands everything taken so far to the operating system; raises StorageError where it cannot."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Flushes, publishes as Parquet and deletes the streams; after an error it may be called again."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._write()
            self._is_closed = True
            for stream in self._streams():
                stream.retire()
        self._publish()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"event writer {self._id} is closed: nothing can be added")
        if self._failure:
            raise StorageError(self._failure)

    def _streams(self) -> tuple[_Stream, _Stream]:
        return self._payload_stream, self._event_stream

    def _write(self) -> None:
        """Writes what waits, payloads first: no reader may see an event before the payload it names."""
        try:
            if self._bodies:
                self._payload_stream.write(_payload_batch(self._bodies))
                self._bodies.clear()
            if self._rows:
                self._event_stream.write(_event_batch(self._rows))
                self._rows.clear()
        except StorageError as error:
            self._failure = f"{error}; {len(self._rows)} events wait in memory, free space to go on"
            raise StorageError(self._failure) from error
        self._failure = ""

    def _tend(self) -> None:
        while not self._stop.wait(self._flush_s):
            with suppress(StorageError):  # remembered: the next call raises it
                self._sync()
            try:
                self._publish()
            except StorageError as error:
                _log.warning("%s; trying again", error)

    def _sync(self) -> None:
        with self._lock:
            self._write()
            for stream in self._streams():
                if stream.is_due(self._publish_s, self._publish_bytes):
                    stream.retire()
            handles = [fd for stream in self._streams() for fd in stream.unsynced()]
        # Outside the lock: a slow disk must not hold up those who append.
        for fd in handles:
            try:
                os.fsync(fd)
            except OSError as error:
                self._failure = f"cannot sync the event log: {error.strerror}"
            finally:
                os.close(fd)

    def _publish(self) -> None:
        with self._publishing:
            for stream in self._streams():
                while stream.finished:
                    _publish_stream(stream.finished[0])
                    stream.finished.pop(0)


def recover(run_dir: Path) -> RecoveryReport:
    """Makes Parquet of every stream that dead writers left, keeping each complete batch.

    Raises StorageError; safe to run again. No writer of the run may be alive.
    """
    streams = events = payloads = torn_streams = torn_bytes = 0
    for table in (payload_files(run_dir), event_files(run_dir)):
        for path in [path for path in log_files(table.folder) if path.suffix == STREAM]:
            rows, torn = _publish_stream(path)
            streams += 1
            torn_streams, torn_bytes = torn_streams + bool(torn), torn_bytes + torn
            events += rows if table.schema is EVENT_SCHEMA else 0
            payloads += rows if table.schema is PAYLOAD_SCHEMA else 0
        _delete(table.folder.glob(f"*{_TEMPORARY}"))
    return RecoveryReport(streams, events, payloads, torn_streams, torn_bytes)


def compact(run_dir: Path) -> None:
    """Merges all files of each table into one Parquet file without doubles; safe to run again.

    Readers may be at work, writers may not. Raises StorageError.
    """
    for table in (payload_files(run_dir), event_files(run_dir)):
        inputs = log_files(table.folder)
        merged = [int(path.stem.rpartition("-")[2]) for path in inputs if path.name.startswith(_COMPACTED)]
        if len(inputs) > len(merged) or len(merged) > 1:
            target = table.folder / f"{_COMPACTED}-{max(merged, default=-1) + 1}{PARQUET}"
            schema = _union(table.schema, inputs)
            _write_parquet(target, schema, snapshot(table, schema))
            _delete(inputs)


class _Stream:
    """The files of one table that one writer appends to, one part after the other.

    `finished` lists parts that will never be appended to, oldest first. Not thread-safe.
    """

    def __init__(self, folder: Path, writer_id: str, schema: pa.Schema) -> None:
        self._folder, self._writer_id = folder, writer_id
        self._header = schema.serialize().to_pybytes()
        self._part = 0
        self._path = folder
        self._fd: int | None = None
        self._size = 0
        self._synced = 0
        self._opened = 0.0
        self.finished: list[Path] = []

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends a batch whole, or raises StorageError and leaves no trace of it."""
        try:
            fd = self._open() if self._fd is None else self._fd
            data = batch.serialize().to_pybytes()
            self._size += _write_all(fd, data if self._size else self._header + data)
        except BaseException as error:
            # A torn batch hides what follows it, so nothing may be appended to this part again.
            self.retire()
            if isinstance(error, OSError):
                raise StorageError(f"cannot write {self._path}: {error.strerror}") from error
            raise

    def is_due(self, age_s: float, size: int) -> bool:
        """Whether the part is old or large enough to publish."""
        return self._fd is not None and (self._size >= size or time.monotonic() - self._opened >= age_s)

    def retire(self) -> None:
        """Ends the current part, cut back to its last complete batch."""
        if self._fd is None:
            return
        with suppress(OSError):
            os.ftruncate(self._fd, self._size)
        os.close(self._fd)
        self._fd = None
        if self._size:
            self.finished.append(self._path)
        else:
            _delete([self._path])

    def unsynced(self) -> list[int]:
        """Descriptors to sync and close for what was written since the last call: file and folder."""
        if self._fd is None or self._synced == self._size:
            return []
        self._synced = self._size
        return [os.dup(self._fd), os.open(self._folder, os.O_RDONLY)]

    def _open(self) -> int:
        self._path = self._folder / f"{self._writer_id}-{self._part:06d}{STREAM}"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._part += 1
        self._size = self._synced = 0
        self._opened = time.monotonic()
        return self._fd


def _check_writer_id(writer_id: str, tables: Iterable[TableFiles]) -> None:
    if not _SAFE_ID.fullmatch(writer_id) or writer_id.startswith(_COMPACTED):
        raise ValueError(f"writer id {writer_id!r} is no safe file name: expected {_SAFE_ID.pattern}")
    for table in tables:
        try:
            table.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {table.folder}: {error.strerror}") from error
        for path in log_files(table.folder):
            if path.stem.rpartition("-")[0] == writer_id:
                raise ValueError(
                    f"writer id {writer_id!r} was used before ({path}): ids of events would repeat"
                )


def _row(event: Event) -> tuple[Any, ...]:
    """The fields of `event`, each known to fit its column: one bad row would block every later flush."""
    row: tuple[Any, ...] = _ROW(event)
    for name, value, allowed in zip(_FIELDS, row, _ALLOWED, strict=True):
        if type(value) not in allowed:
            expected = " or ".join(sorted(kind.__name__ for kind in allowed))
            raise TypeError(f"Event.{name} is {value!r} ({type(value).__name__}): expected {expected}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"Event.{name} is {value}: expected 64 bits at most")
    if not 0 <= row[_TIME] <= _MAX_TIME_S:
        raise ValueError(f"Event.t_start is {row[_TIME]!r}: expected Unix seconds")
    return row


def _event_batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    event_ids, *columns = zip(*rows, strict=True)
    columns[_TIME] = [round(value * 1_000_000) for value in columns[_TIME]]
    version = pa.repeat(pa.scalar(SCHEMA_VERSION, pa.int16()), len(rows))
    arrays = [
        _array(values, field.type) for values, field in zip(columns, list(EVENT_SCHEMA)[2:], strict=True)
    ]
    return pa.RecordBatch.from_arrays([version, pa.array(event_ids), *arrays], schema=EVENT_SCHEMA)


def _payload_batch(bodies: list[tuple[str, str, str]]) -> pa.RecordBatch:
    columns = zip(*bodies, strict=True)
    arrays = [pa.array(values, kind) for values, kind in zip(columns, PAYLOAD_SCHEMA.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=PAYLOAD_SCHEMA)


def _array(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # a lone surrogate, as a model may send one
        return pa.array(
            [None if v is None else v.encode("utf-8", "backslashreplace").decode() for v in values]
        )


def _publish_stream(path: Path) -> tuple[int, int]:
    """Turns a finished stream into Parquet and deletes it; returns its rows and the torn bytes."""
    target = path.with_suffix(PARQUET)
    try:
        items = list(stream_batches(path))
        torn = path.stat().st_size - (items[-1].end if items else 0)
        # A target that is there was made of this very stream: only the deletion is outstanding.
        if items and not target.exists():
            _write_parquet(target, relaxed(items[0].batch.schema), (item.batch for item in items))
        _delete([path])
    except OSError as error:
        raise StorageError(f"cannot publish {path}: {error.strerror}") from error
    return sum(len(item.batch) for item in items), torn


def _write_parquet(target: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    temporary = target.with_name(target.name + _TEMPORARY)
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as sink:
            for group in _groups(batches):
                sink.write_table(pa.Table.from_batches(group).cast(schema))
        _sync_path(temporary)
        temporary.rename(target)
        _sync_path(target.parent)
    except OSError as error:
        _delete([temporary])
        raise StorageError(f"cannot write {target}: {error}") from error


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Batches gathered to row groups: a file of one group per flush would scan many times slower."""
    group: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        group.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def _union(schema: pa.Schema, inputs: Iterable[Path]) -> pa.Schema:
    """`schema` plus the columns and metadata that only some inputs know, so that merging loses none."""
    known = [relaxed(found) for path in inputs if (found := file_schema(path)) is not None]
    metadata = {key: value for found in known for key, value in (found.metadata or {}).items()}
    return pa.unify_schemas([relaxed(schema), *known]).with_metadata(metadata or None)


def _write_all(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
