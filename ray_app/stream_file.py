"""The Arrow IPC streams of one table that one writer appends to, one part after the other.

A batch is appended whole or not at all; a part in which an append failed is never appended to again, since
a torn batch hides what follows it. What storage could not sync may be lost: its rows have to come again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from ray_app.errors import StorageError
from ray_app.parquet_file import delete
from ray_app.table_files import STREAM


class StreamFile:
    """A stream and its successors, `<writer_id>-<part>.arrows` in `folder`.

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
        self._is_new = False  # the folder does not hold it durably
        self._opened = 0.0
        self._unsynced: list[int] = []
        self.finished: list[Path] = []

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends a batch whole, or raises StorageError and leaves no trace of it."""
        try:
            fd = self._open() if self._fd is None else self._fd
            data = batch.serialize()
            if not self._size:
                data = self._header + data.to_pybytes()
            self._size += _write_all(fd, data)
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
        if self._synced < self._size:
            self._unsynced.append(self._fd)
        else:
            close_all([self._fd])
        self._fd = None
        if self._size:
            self.finished.append(self._path)
        else:
            with suppress(OSError):  # an empty file is in nobody's way
                delete([self._path])

    def unsynced(self) -> list[int]:
        """Descriptors to sync and close for what was written since the last call: files and folder.

        Raises OSError, also where another process has recovered the part and deleted it.
        """
        if self._fd is not None and self._synced < self._size:
            if os.fstat(self._fd).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, f"another process has deleted {self._path}")
            self._unsynced.append(os.dup(self._fd))
            self._synced = self._size
        if self._is_new:
            self._unsynced.append(os.open(self._folder, os.O_RDONLY))
            self._is_new = False
        found, self._unsynced = self._unsynced, []
        return found

    def forget_unsynced(self) -> None:
        """Gives up on what was written since the last sync."""
        close_all(self._unsynced)
        self._unsynced = []

    def _open(self) -> int:
        self._path = self._folder / f"{self._writer_id}-{self._part:06d}{STREAM}"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._part += 1
        self._size = self._synced = 0
        self._is_new = True
        self._opened = time.monotonic()
        return self._fd


class Stream(Protocol):
    """What is written of it may have to be synced."""

    def unsynced(self) -> list[int]: ...


def unsynced(streams: Iterable[Stream]) -> tuple[list[int], OSError | None]:
    """Descriptors of all streams to sync and close, and what kept one from giving its own."""
    found: list[int] = []
    try:
        for stream in streams:
            found += stream.unsynced()
    except OSError as error:
        return found, error
    return found, None


def sync_all(descriptors: Iterable[int]) -> OSError | None:
    """Syncs and closes every one; the last error."""
    failed = None
    for fd in descriptors:
        try:
            os.fsync(fd)
        except OSError as error:
            failed = error
        close_all([fd])
    return failed


def close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        with suppress(OSError):
            os.close(fd)


def _write_all(fd: int, data: bytes | pa.Buffer) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)
