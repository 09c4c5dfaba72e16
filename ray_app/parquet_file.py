"""A Parquet file of the log: written whole or not at all, and never over another one.

A file is finished under a temporary name, synced, given its name, and only then may what it replaces be
deleted; a crash in between leaves doubles, which the reader drops. A temporary file is locked while its
process lives, so that others may clear away what the dead left. Where locks or links are not to be had,
leftovers stay until `recover`, and that a name is new rests on its random part.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ray_app.errors import StorageError
from ray_app.table_files import PARQUET, file_schema, relaxed, stream_batches

TEMPORARY = ".tmp"
_GROUP_ROWS, _GROUP_BYTES = 65_536, 32 << 20  # one row group: what writing holds in memory
_BATCH_ROWS, _BATCH_BYTES = 1024, 4 << 20  # of those that it is gathered of
# Columns that zstd makes much smaller than lz4 does; the others are codes and digits, and lz4 is read sooner.
_PACKED = frozenset(
    ("event_id", "t_start", "request_hash", "payload_hash", "hash", "body", "error", "detail")
)
_TIMES = frozenset(("duration_s", "queue_s", "prefill_s", "decode_s"))
# Where hardly a value comes twice, a dictionary takes more room than the values do, and time.
_UNLIKE = (_PACKED - {"error", "detail"}) | _TIMES
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class Published(NamedTuple):
    """Rows of a stream that became Parquet, and the bytes of its torn end."""

    rows: int
    torn_bytes: int


def publish(stream: Path) -> Published:
    """Turns a finished stream into Parquet and deletes it; does nothing where another process did so.

    Raises StorageError. Whatever stands under the name of the Parquet file is never replaced.
    """
    target, batches = stream.with_suffix(PARQUET), _Batches(stream)
    try:
        size, schema = stream.stat().st_size, file_schema(stream)
        if (stored := _rows_in(target)) and _count(batches) > stored:
            target, stored = target.with_name(f"{stream.stem}-{unique()}{PARQUET}"), 0
        # A target that holds as much was made of this very stream: only the deletion is outstanding.
        if schema is not None and not stored:
            write(target, relaxed(schema), batches)
        delete([stream])
    except FileNotFoundError:
        return Published(0, 0)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot publish {stream}: {error}") from error
    return Published(batches.rows, size - batches.end)


class _Batches:
    """The complete batches of a stream; then `rows` of them there were, up to the byte `end`."""

    def __init__(self, stream: Path) -> None:
        self._stream = stream
        self.rows = self.end = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        self.rows = self.end = 0
        for batch, end in stream_batches(self._stream):
            self.rows, self.end = self.rows + len(batch), end
            yield batch


def _count(batches: Iterable[pa.RecordBatch]) -> int:
    return sum(map(len, batches))


def _rows_in(path: Path) -> int:
    """Rows of a Parquet file; 0 where there is none."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except FileNotFoundError:
        return 0


def write(target: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Writes `batches` as a durable file `target`, none where there are no rows; returns the rows.

    Raises StorageError, also where `target` is there already.
    """
    rows, temporary = 0, target
    try:
        with _open_temporary(target) as file:
            temporary = Path(file.name)
            with _writer(file, schema) as sink:
                for group in _groups(batches):
                    table = pa.Table.from_batches(group)
                    rows += len(table)
                    sink.write_table(table.cast(schema))
            file.flush()
            os.fsync(file.fileno())
            if rows:
                _name(temporary, target)
                sync_path(target.parent)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot write {target}: {error}") from error
    finally:
        if temporary != target:
            with suppress(OSError):
                delete([temporary])
    return rows


def _writer(file: BufferedWriter, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        file,
        schema,
        compression={name: "zstd" if name in _PACKED else "lz4" for name in schema.names},
        use_dictionary=[name for name in schema.names if name not in _UNLIKE],
    )


def clear_leftovers(folder: Path) -> None:
    """Deletes the temporary files of dead processes."""
    for path in folder.glob(f"*{TEMPORARY}"):
        with suppress(OSError), path.open("rb") as file:  # in use, or gone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def unique() -> str:
    """A part of a name that no other file has."""
    return uuid.uuid4().hex[:16]


def sync_path(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def delete(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _open_temporary(target: Path) -> BufferedWriter:
    """A new file beside `target`, locked."""
    while True:
        temporary = target.with_name(f"{target.name}.{unique()}{TEMPORARY}")
        file = temporary.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                return file
        except BlockingIOError:
            pass  # somebody who clears leftovers came before the lock
        except OSError:
            return file  # a file system without locks
        file.close()


def _name(temporary: Path, target: Path) -> None:
    """Gives a finished file its name; raises FileExistsError rather than replace another."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        temporary.rename(target)


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Batches gathered to row groups: a file of one group per flush would scan many times slower."""
    group: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in _joined(batches):
        group.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in fewer batches: one of a few rows, as a flush makes, takes 50 kB beside them."""
    some: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        some.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield pa.concat_batches(some)
            some, rows, size = [], 0, 0
    if some:
        yield pa.concat_batches(some)
