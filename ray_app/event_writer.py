"""The event log of a run, write side: the writer of one process.

A writer appends to an Arrow IPC stream per table, `<writer_id>-<part>.arrows`, and from time to time
publishes the stream as Parquet (`parquet_file.py`) and opens the next part. Nothing is ever appended to a
stream that another process, or a failed write, left.

Flushed rows survive the death of the process; the timed sync makes them durable, so that a machine that
dies takes the rows of the last `flush_s` at most. Storage that fails never reaches those who append:
rows wait in memory, `failing_s` tells for how long. Not covered: two live writers with one id.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa

from ray_app.errors import StorageError
from ray_app.event_rows import FIELDS, Body, Row, check, event_batch, fields_of, payload_batch
from ray_app.events import event_files, let_go, payload_files
from ray_app.object_store import ObjectStore, store_of
from ray_app.parquet_file import publish, sync_path
from ray_app.records import Event
from ray_app.stream_file import StreamFile, sync_all, unsynced
from ray_app.stream_objects import StreamObjects
from ray_app.table_files import COMPACTED, TableFiles, log_files

_log = logging.getLogger(__name__)

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_STORED_GENERATION = 32_768  # hashes; two generations are held, some 8 MB of memory


# On an object store: seldom enough for its prices, often enough for the promise of 2 s.
STORE_FLUSH_S = 1.5


class Tap(Protocol):
    """Is shown what a writer takes, in order, each body before the rows that name it.

    Called under the writer's lock: must neither raise nor wait.
    """

    def row(self, row: Row) -> None: ...

    def body(self, body: Body) -> None: ...


class EventWriter:
    """Appends events and payloads of one process; thread-safe, and never waits for an event loop.

    `writer_id` must be a safe file name that no other process start of this run has used: ids of events
    are built from it. `metadata` (a benchmark's canary, say) is stored with the schema of every file. Where
    the run is on an object store each flush is an object, named by `epoch`, and nothing is published.
    `guard` is asked before each write and raises StorageError where this process may write no more: it may
    have been stopped, and wake up with rows of a run that is another's by now.

    `append`, `payload` and `adopt` neither wait for storage nor fail for it: while writing fails (a full
    disk), rows stay in memory, `failing_s` and `failure` tell of it, and every timed sync tries again.
    `flush`, `sync` and `close` raise StorageError. A Parquet file that cannot be published is logged and
    tried again; its stream stays readable, and `close` raises if it still fails.
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
        tap: Tap | None = None,
        epoch: int = 0,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._id = writer_id
        store = store_of(run_dir)
        if store is not None:  # each flush is an object there: not for every few rows
            flush_rows, flush_s = sys.maxsize, max(flush_s, STORE_FLUSH_S)
        self._flush_rows, self._flush_s = flush_rows, flush_s
        self._publish_s, self._publish_bytes = publish_s, publish_bytes
        self._tap, self._guard = tap, guard
        tables = payload_files(run_dir), event_files(run_dir)
        _check_writer_id(writer_id, tables)
        self._payload_stream, self._event_stream = (
            _stream(store, table, writer_id, epoch, metadata) for table in tables
        )
        pa.array([""])  # pyarrow imports pandas at its first conversion (0.4 s): now, not in an event loop
        self._waiting = _Taken()
        self._written = _Taken()  # and not yet durable: storage may still lose it
        self._stored = _Recent(_STORED_GENERATION)
        self._count = self._taken = self._synced = 0
        self._failure = self._publish_failure = ""
        self._failing_since = 0.0
        self._is_closed = False
        # Taken in this order. Who appends takes the last one only, and storage never works under it.
        self._syncing, self._writing, self._lock = threading.Lock(), threading.Lock(), threading.RLock()
        self._publishing = threading.Lock()
        self._is_stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._tend, name=f"events-{writer_id}", daemon=True)
        self._thread.start()

    @property
    def taken(self) -> int:
        """How many rows were taken so far."""
        return self._taken

    @property
    def synced(self) -> int:
        """So many of the rows taken, in their order, survive this process and its machine."""
        return self._synced

    @property
    def failing_s(self) -> float:
        """Seconds since storage began to fail; 0.0 while it works."""
        return time.monotonic() - self._failing_since if self._failure else 0.0

    @property
    def failure(self) -> str:
        """What storage fails with, in one line; empty while it works."""
        return self._failure

    def append(self, event: Event) -> str:
        """Takes `event` and returns its id; TypeError or ValueError means that it is not taken."""
        row: Row = fields_of(event)
        check(row)
        with self._lock:
            self._check_open()
            event_id = f"{self._id}-{self._count}"
            self._count += 1
            self._take_row((event_id, *row))
        return event_id

    def payload(self, body: str, media: Literal["json", "text"] = "json") -> str:
        """Stores `body`, seldom twice per writer; returns the SHA-256 of its UTF-8 (32 hex digits).

        A lone surrogate is stored as its JSON escape, since UTF-8 has no form for it.
        """
        try:
            data = body.encode()
        except UnicodeEncodeError:
            data = body.encode("utf-8", "backslashreplace")
            body = data.decode()
        key = hashlib.sha256(data).hexdigest()[:32]
        with self._lock:
            self._check_open()
            if self._stored.add(key):
                self._take_body((key, media, body))
        return key

    def adopt(self, rows: Sequence[Row], bodies: Iterable[Body] = ()) -> None:
        """Takes rows and bodies as another writer's tap was given them; they are treated like own ones.

        Raises TypeError or ValueError where a row fits no column; then nothing is taken.
        """
        for event_id, *fields in rows:
            if type(event_id) is not str or len(fields) != FIELDS:
                raise ValueError(f"row {event_id!r} has {len(fields)} fields: expected {FIELDS} after an id")
            check(tuple(fields))
        with self._lock:
            self._check_open()
            for body in bodies:
                if self._stored.add(body[0]):
                    self._take_body(body)
            for row in rows:
                self._take_row(row)

    def flush(self) -> None:
        """Hands everything taken so far to the operating system; raises StorageError where it cannot."""
        if self._failure:
            self.sync()  # only a sync can tell that storage works again
        else:
            self._write()

    def sync(self) -> None:
        """Makes everything taken so far durable; raises StorageError where it cannot."""
        with self._syncing:
            try:
                self._write()
            finally:  # what was written before goes its way
                self._sync_written()
            if self._failure:
                _log.warning("event log %s: storage works again", self._id)
                self._failure = ""

    def close(self) -> None:
        """Syncs, publishes as Parquet and deletes the streams; after an error it may be called again."""
        self._is_stopped = True
        self._wake.set()
        self._thread.join()
        self.sync()
        with self._lock:
            self._is_closed = True
        self.sync()  # what was taken meanwhile
        self._retire()
        self._publish()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"event writer {self._id} is closed: nothing can be added")

    def _take_row(self, row: Row) -> None:
        self._waiting.rows.append(row)
        self._taken += 1
        if self._tap is not None:
            self._tap.row(row)
        if len(self._waiting.rows) == self._flush_rows:
            self._wake.set()

    def _take_body(self, body: Body) -> None:
        self._waiting.bodies.append(body)
        if self._tap is not None:
            self._tap.body(body)

    def _streams(self) -> tuple[StreamFile | StreamObjects, StreamFile | StreamObjects]:
        return self._payload_stream, self._event_stream

    def _write(self) -> None:
        """Writes what waits, payloads first: no reader may see an event before the payload it names."""
        with self._writing:
            if self._waiting.rows or self._waiting.bodies:
                self._guard()
            with self._lock:
                batch, self._waiting = self._waiting, _Taken()
            try:
                if batch.bodies:
                    self._payload_stream.write(payload_batch(batch.bodies))
                    self._written.bodies += batch.bodies
                    batch.bodies = []
                if batch.rows:
                    self._event_stream.write(event_batch(batch.rows))
                    self._written.rows += batch.rows
                    batch.rows = []
            except (StorageError, pa.ArrowException, MemoryError) as error:
                raise self._failed(str(error)) from error
            finally:
                self._put_back(batch)

    def _sync_written(self) -> None:
        """Syncs what is written. A file that cannot be synced may have lost it: it is written again."""
        with self._writing:
            batch, self._written = self._written, _Taken()
            with self._lock:
                mark = self._taken - len(self._waiting.rows)
            descriptors, error = unsynced(self._streams())
        # Outside the locks: a slow disk must hold up neither those who append nor those who flush.
        error = sync_all(descriptors) or error
        if error is None:
            self._synced = max(self._synced, mark)
            return
        with self._writing:
            for stream in self._streams():
                stream.retire()
                stream.forget_unsynced()
            self._put_back(self._written)
            self._put_back(batch)
            self._written = _Taken()
        raise self._failed(f"cannot sync the event log: {error.strerror}") from error

    def _put_back(self, batch: _Taken) -> None:
        with self._lock:
            self._waiting.rows[:0] = batch.rows
            self._waiting.bodies[:0] = batch.bodies

    def _failed(self, message: str) -> StorageError:
        """Remembers a failure, and logs it where it is the first."""
        waiting = len(self._waiting.rows)
        if not self._failure:
            self._failing_since = time.monotonic()
            _log.warning("event log %s: %s; trying again", self._id, message)
        self._failure = f"{message}; {waiting} events wait in memory, free space to go on"
        return StorageError(self._failure)

    def _tend(self) -> None:
        due = time.monotonic() + self._flush_s
        while not self._is_stopped:
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            is_due = time.monotonic() >= due
            with suppress(StorageError):  # remembered, and tried again
                if is_due:
                    self.sync()
                elif not self._failure:
                    self._write()
            if is_due:
                self._retire(self._publish_s, self._publish_bytes)
                self._publish_quietly()
                due = time.monotonic() + self._flush_s

    def _retire(self, age_s: float = 0.0, size: int = 0) -> None:
        with self._writing:
            for stream in self._streams():
                if stream.is_due(age_s, size):
                    stream.retire()

    def _publish(self) -> None:
        with self._publishing:
            is_any = any(stream.finished for stream in self._streams())
            for stream in self._streams():
                while stream.finished:
                    publish(stream.finished[0])
                    stream.finished.pop(0)
            if is_any:
                let_go()

    def _publish_quietly(self) -> None:
        """Publishes what is finished; logs only the first failure of several, and their end."""
        failure = ""
        try:
            self._publish()
        except StorageError as error:
            failure = str(error)
        if bool(failure) != bool(self._publish_failure):
            _log.warning("event log %s: %s", self._id, f"{failure}; trying again" if failure else "published")
        self._publish_failure = failure


@dataclass
class _Taken:
    """Rows and bodies on their way to storage."""

    rows: list[Row] = field(default_factory=list)
    bodies: list[Body] = field(default_factory=list)


class _Recent:
    """A set of the newest keys: at least `generation` of them, at most two times as many."""

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._new, self._old = set[str](), set[str]()

    def add(self, key: str) -> bool:
        """Whether `key` was not held; it is the newest now."""
        if key in self._new:
            return False
        if len(self._new) >= self._generation:
            self._new, self._old = set(), self._new
        self._new.add(key)
        return key not in self._old


def _stream(
    store: ObjectStore | None,
    table: TableFiles,
    writer_id: str,
    epoch: int,
    metadata: Mapping[str, str] | None,
) -> StreamFile | StreamObjects:
    schema = table.schema.with_metadata(metadata)
    if store is None:
        return StreamFile(table.folder, writer_id, schema)
    return StreamObjects(store, table.folder.name, epoch, writer_id, schema)


def _check_writer_id(writer_id: str, tables: Iterable[TableFiles]) -> None:
    if not _SAFE_ID.fullmatch(writer_id) or writer_id.startswith(COMPACTED):
        raise ValueError(f"writer id {writer_id!r} is no safe file name: expected {_SAFE_ID.pattern}")
    for table in tables:
        try:
            table.folder.mkdir(parents=True, exist_ok=True)
            sync_path(table.folder.parent)
        except OSError as error:
            raise StorageError(f"cannot create {table.folder}: {error.strerror}") from error
        for path in log_files(table.folder):
            if path.stem.rpartition("-")[0] == writer_id:
                raise ValueError(
                    f"writer id {writer_id!r} was used before ({path}): ids of events would repeat"
                )
