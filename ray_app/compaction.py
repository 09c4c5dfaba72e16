"""Fewer files of the event log: recovery of what dead writers left, and merging of Parquet files.

While a run goes on, `merge` puts files of one level together, so that each row is rewritten once per
level. Files are immutable, no name is ever used twice, and an input is deleted only after every row of it
stands in a durable file: so readers, writers and other mergers (that of an old driver, too) may be at
work at the same time, and a merge may be killed at any point; doubles are dropped by the reader and by
the next merge. `recover` and `compact` take streams as well, and rely on it that no writer is alive.

`python -m ray_app.compaction RUN_DIR --name e0003` merges in a process of its own: the ids that it has
seen, about 120 bytes a row, are not the driver's memory. Without `--name` it compacts an ended run.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ray_app.errors import StorageError
from ray_app.events import EVENT_SCHEMA, PAYLOAD_SCHEMA, event_files, payload_files
from ray_app.object_store import INCOMING, object_name, publish_compacted, store_of
from ray_app.parquet_file import TEMPORARY, clear_leftovers, delete, publish, unique, write
from ray_app.table_files import (
    COMPACTED,
    PARQUET,
    STREAM,
    TableFiles,
    distinct,
    file_schema,
    log_files,
    relaxed,
    snapshot,
)

_log = logging.getLogger(__name__)

MIN_FILES = 8
_MAX_FILES = 64  # of one merge: what is merged is on disk twice for a while
_LEVEL = re.compile(rf"{COMPACTED}-.*-L(\d+)-[0-9a-f]+")
_SAFE_NAME = re.compile(r"[A-Za-z0-9._]{1,64}")
_NICE = 10
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What `recover` found: streams made Parquet, their rows, and the torn tails that were dropped."""

    streams: int = 0
    events: int = 0
    payloads: int = 0
    torn_streams: int = 0
    torn_bytes: int = 0


def recover(run_dir: Path) -> RecoveryReport:
    """Makes Parquet of every stream that dead writers left, keeping each complete batch.

    Raises StorageError; safe to run again. No writer of the run may be alive. On an object store there is
    nothing to do: no stream there was ever appended to.
    """
    if store_of(run_dir) is not None:
        return RecoveryReport()
    streams = events = payloads = torn_streams = torn_bytes = 0
    for table in _tables(run_dir):
        for path in [path for path in log_files(table.folder) if path.suffix == STREAM]:
            rows, torn = publish(path)
            streams += 1
            torn_streams, torn_bytes = torn_streams + bool(torn), torn_bytes + torn
            events += rows if table.schema is EVENT_SCHEMA else 0
            payloads += rows if table.schema is PAYLOAD_SCHEMA else 0
        delete(table.folder.glob(f"*{TEMPORARY}"))
    return RecoveryReport(streams, events, payloads, torn_streams, torn_bytes)


def merge(run_dir: Path, *, name: str, min_files: int = MIN_FILES) -> int:
    """Merges published files wherever `min_files` of one level are there; returns the number of merges.

    `name`, a safe file name, stands in the names of the outputs. Writers may be alive: their streams are
    left alone. Raises StorageError; what was merged before stays merged.
    """
    if min_files < 2 or not _SAFE_NAME.fullmatch(name):
        raise ValueError(f"min_files {min_files}, name {name!r}: expected 2 at least, {_SAFE_NAME.pattern}")
    merges = 0
    for table in _tables(run_dir):
        clear_leftovers(table.folder)
        while level := next(iter(_full_levels(table.folder, min_files)), None):
            _merge_files(table, level.files[:_MAX_FILES], f"{COMPACTED}-{name}-L{level.number + 1}")
            merges += 1
    return merges


def is_mergeable(run_dir: Path, min_files: int = MIN_FILES) -> bool:
    """Whether `merge` would find something to do."""
    return any(_full_levels(table.folder, min_files) for table in _tables(run_dir))


def compact(run_dir: Path) -> None:
    """Merges all files of each table into one Parquet file without doubles; safe to run again.

    Readers and mergers may be at work, writers may not. Raises StorageError.
    """
    for table in _tables(run_dir):
        clear_leftovers(table.folder)
        inputs = log_files(table.folder)
        if len(inputs) > 1 or any(not path.name.startswith(COMPACTED) for path in inputs):
            while (schema := _union(table.schema, inputs)) is None:
                inputs = log_files(table.folder)
            _replace(table, inputs, f"{COMPACTED}-all", schema, snapshot(table, schema))


@dataclass(frozen=True, slots=True)
class _Level:
    """Published files that went through `number` merges."""

    number: int
    files: list[Path]


def _full_levels(folder: Path, min_files: int) -> list[_Level]:
    """Levels with files enough for a merge, lowest first. What `compact` made belongs to none."""
    found: dict[int, list[Path]] = {}
    is_remote = store_of(folder.parent) is not None  # where each stream is finished, being one flush
    for path in log_files(folder):
        if path.suffix != PARQUET and not is_remote:
            continue
        if not path.name.startswith(f"{COMPACTED}-"):
            found.setdefault(0, []).append(path)
        elif match := _LEVEL.fullmatch(path.stem):
            found.setdefault(int(match[1]), []).append(path)
    return [_Level(number, files) for number, files in sorted(found.items()) if len(files) >= min_files]


def _merge_files(table: TableFiles, inputs: Sequence[Path], stem: str) -> None:
    schema, gone = _union(table.schema, inputs), set[Path]()
    if schema is not None:
        # A file that another merger deletes meanwhile stands in that one's output, whatever is read here.
        _replace(table, inputs, stem, schema, distinct(table, inputs, schema, set(), gone), gone)


def _union(schema: pa.Schema, inputs: Iterable[Path]) -> pa.Schema | None:
    """`schema` plus the columns and metadata that only some inputs know, so that merging loses none.

    None where an input has vanished since it was listed.
    """
    try:
        known = [relaxed(found) for path in inputs if (found := file_schema(path)) is not None]
        metadata = {key: value for found in known for key, value in (found.metadata or {}).items()}
        return pa.unify_schemas([relaxed(schema), *known]).with_metadata(metadata or None)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot merge the files of the log: {error}") from error


def _replace(
    table: TableFiles,
    inputs: Sequence[Path],
    stem: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    gone: Collection[Path] = (),
) -> None:
    """One file of `batches` in the place of `inputs`, but for those that are `gone` once it is written."""
    target = table.folder / f"{stem}-{unique()}{PARQUET}"
    run_dir = table.folder.parent
    if store_of(run_dir) is None:
        write(target, schema, batches)
        delete(path for path in inputs if path not in gone)
        return
    made = run_dir / INCOMING / target.name
    write(made, schema, batches)
    names = [object_name(f"{table.folder.name}/{path.name}") for path in inputs if path not in gone]
    publish_compacted(run_dir, made, f"{table.folder.name}/{target.name}", names)
    made.replace(target)  # a copy of what the bucket has now; the next refresh drops the inputs


def _tables(run_dir: Path) -> tuple[TableFiles, TableFiles]:
    return payload_files(run_dir), event_files(run_dir)


class Compactor:
    """Merges the log of a run from time to time, in a process of its own, until `stop`.

    A merge that fails is logged, and tried again at its next turn.
    """

    def __init__(self, run_dir: Path, name: str, every_s: float, min_files: int) -> None:
        self._run_dir, self._name = run_dir, name
        self._every_s, self._min_files = every_s, min_files
        self._is_stopped = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, name=f"compactor-{name}", daemon=True)

    @classmethod
    def start(cls, run_dir: Path, name: str, every_s: float = 60.0, min_files: int = MIN_FILES) -> Compactor:
        """Looks every `every_s` whether there is enough to merge; `name` goes into the names of files."""
        compactor = cls(run_dir, name, every_s, min_files)
        compactor._thread.start()
        return compactor

    def stop(self) -> None:
        """Ends a merge under way, and waits for that: seconds at most. May be called twice."""
        self._is_stopped.set()
        with self._lock:
            if self._process is not None:
                self._process.terminate()
        self._thread.join()

    def _work(self) -> None:
        while not self._is_stopped.wait(self._every_s):
            try:
                if is_mergeable(self._run_dir, self._min_files):
                    self._merge()
            except (StorageError, OSError) as error:
                _log.warning("merging the event log failed: %s; trying again", error)

    def _merge(self) -> None:
        command = [sys.executable, "-m", __name__, str(self._run_dir), "--name", self._name]
        command += ["--min-files", str(self._min_files)]
        root = Path(__file__).parent.parent
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._is_stopped.is_set():
                return
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        errors = _end_of(self._process, self._is_stopped)
        status = self._process.returncode
        with self._lock:
            self._process = None
        if status and not self._is_stopped.is_set():
            last = errors.strip().splitlines()[-1:] or ["no message"]
            _log.warning("merging the event log failed (exit %d): %s; trying again", status, last[0])


def _end_of(process: subprocess.Popen[str], is_stopped: threading.Event) -> str:
    """What a process said on stderr, once it has ended; killed where it ignores that it was stopped."""
    while True:
        try:
            return process.communicate(timeout=_END_S)[1]
        except subprocess.TimeoutExpired:
            if is_stopped.is_set():
                process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 where the log cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m ray_app.compaction", description="Merge an event log.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--name", help="merge while writers are alive; goes into the names of the files")
    parser.add_argument("--min-files", type=int, default=MIN_FILES)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clears its leftovers
    os.nice(_NICE)
    try:
        if options.name is None:
            compact(options.run_dir)
        else:
            merge(options.run_dir, name=options.name, min_files=options.min_files)
    except StorageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
