"""The event log of a run, read side: Arrow schemas, the one reader, results, payloads, DuckDB views.

A run directory holds two tables: `log/` (one row per `records.Event`) and `payloads/` (texts by content
hash). `table_files.py` reads their files, `event_writer.py` makes them, `compaction.py` recovers and
merges them. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

from ray_app.columns import read_columns
from ray_app.errors import RunDirError, StorageError
from ray_app.records import Event
from ray_app.table_files import TableFiles, Where, conform, relaxed, snapshot

if TYPE_CHECKING:
    import duckdb

SCHEMA_VERSION = 1
# Rows of a judge-only pass (`rejudge.py`): evidence of their own, which no figure of the run counts.
SECOND_OPINION = "coalesce(role = 'judge' and alias <> '', false)"
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


def let_go() -> None:
    """Gives the system the memory that this thread read or wrote with, where it is used no more.

    Arrow keeps what it has once had: 120 MB in a driver that looks into the log of 100,000 tasks for the
    record of one, 30 to 100 MB in a process that has published a minute's rows.
    """
    pa.default_memory_pool().release_unused()


def event_files(run_dir: Path) -> TableFiles:
    """The event table of the run at `run_dir`."""
    return TableFiles(Path(run_dir) / "log", "event_id", EVENT_SCHEMA)


def payload_files(run_dir: Path) -> TableFiles:
    """The payload table of the run at `run_dir`."""
    return TableFiles(Path(run_dir) / "payloads", "hash", PAYLOAD_SCHEMA)


def read(
    run_dir: Path, columns: Sequence[str] | None = None, *, where: Where | None = None
) -> pa.RecordBatchReader:
    """A snapshot of the event log, in batches: each flushed event exactly once, in no order of time.

    `columns` picks and orders columns (default: all of EVENT_SCHEMA), `where` picks rows: those that have
    in each column that it names one of the values given. Fields read as nullable: a file of an older
    schema has nulls where it lacks a column; columns unknown here are left out. The reader keeps the ids
    that it has seen, about 120 bytes an event. Raises RunDirError where there is no log, StorageError
    while iterating where a file cannot be read.
    """
    names = EVENT_SCHEMA.names if columns is None else list(columns)
    if unknown := sorted({*names, *(where or ())} - set(EVENT_SCHEMA.names)):
        raise ValueError(f"unknown event columns {unknown}: expected some of {EVENT_SCHEMA.names}")
    return _reader(event_files(run_dir), names, where)


def columns(run_dir: Path, names: Sequence[str], plain: Collection[str] = ()) -> pa.Table:
    """What `read` gives of the columns `names`, whole and many times faster (`columns.py`).

    Strings come as dictionaries, but for the event's id and those in `plain`.
    """
    files = event_files(run_dir)
    _check_folder(files.folder)
    return read_columns(files, names, plain)


def read_payloads(run_dir: Path, hashes: Collection[str]) -> dict[str, str]:
    """Bodies by hash, for those of `hashes` that are stored; a hash that is not stored is left out."""
    wanted, found = set(hashes), dict[str, str]()
    for batch in _reader(payload_files(run_dir), ["hash", "body"], {"hash": wanted}):
        found.update(zip(batch["hash"].to_pylist(), batch["body"].to_pylist(), strict=True))
        if len(found) == len(wanted):
            break
    return found


def payloads(run_dir: Path) -> pa.RecordBatchReader:
    """All payloads, `hash` and `body`, in batches: each hash once, in no order."""
    return _reader(payload_files(run_dir), ["hash", "body"])


def results(run_dir: Path) -> pa.Table:
    """The result that counts for each (rollout_key, trial): EVENT_SCHEMA columns, one row each.

    Of several, the highest epoch counts, and within it the last committed: by sequence number where
    one writer wrote them, else the writer with the latest `t_start`. So an owed result gives way to
    the verdict that came later.
    """
    table = read(run_dir, where={"kind": {"result"}}).read_all()
    return table.take(pa.array(last_committed(table), pa.int64()))


def connect(run_dir: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with views `events`, `results` and `payloads`; every query reads anew.

    `t_start` is a plain TIMESTAMP in UTC there: DuckDB hands TIMESTAMP WITH TIME ZONE to Python only
    where pytz is installed. Values belong in query parameters, never in the text of a query.
    """
    import duckdb  # most readers need no SQL

    _check_folder(event_files(run_dir).folder)
    connection = duckdb.connect(":memory:")
    texts = payload_files(run_dir), PAYLOAD_SCHEMA.names
    try:
        connection.register("events", _View(EVENT_SCHEMA, lambda: read(run_dir)))
        connection.register("results", _View(EVENT_SCHEMA, lambda: results(run_dir).to_batches()))
        connection.register("payloads", _View(PAYLOAD_SCHEMA, lambda: _reader(*texts)))
    except duckdb.Error as error:  # which hides what could not be read in its own words
        connection.close()
        raise StorageError(str(error).rpartition("StorageError: ")[2]) from None
    return connection


class _View:
    """What DuckDB scans: each request for the Arrow stream reads the log anew."""

    def __init__(self, schema: pa.Schema, source: Callable[[], Any]) -> None:
        naive = [pa.timestamp("us") if pa.types.is_timestamp(field.type) else field.type for field in schema]
        self._schema = pa.schema(list(zip(schema.names, naive, strict=True)))
        self._source = source

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        batches = (conform(batch, self._schema) for batch in self._source())
        return pa.RecordBatchReader.from_batches(self._schema, batches).__arrow_c_stream__(requested_schema)


def _reader(files: TableFiles, names: Sequence[str], where: Where | None = None) -> pa.RecordBatchReader:
    _check_folder(files.folder)
    schema = relaxed(pa.schema([files.schema.field(name) for name in names]))
    return pa.RecordBatchReader.from_batches(schema, snapshot(files, schema, where))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise RunDirError(f"no event log at {folder}: expected a run directory that holds log/ and payloads/")


def last_committed(table: pa.Table) -> list[int]:
    """Positions of the `result` rows that count, among those of `table` (see `results`)."""
    columns = (table["trial"], table["epoch"], table["t_start"].cast(pa.int64()))
    numbers = ([value or 0 for value in column.to_pylist()] for column in columns)
    rollouts, ids = table["rollout_key"].to_pylist(), table["event_id"].to_pylist()
    rows = list(zip(rollouts, *numbers, ids, strict=True))
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
