"""Rows and bodies as a writer buffers them: checked when taken, Arrow batches when written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any

import pyarrow as pa

from ray_app.events import EVENT_SCHEMA, PAYLOAD_SCHEMA, SCHEMA_VERSION
from ray_app.records import Event

Row = tuple[Any, ...]  # event_id, then the fields of an Event in their order, `t_start` in Unix seconds
Body = tuple[str, str, str]  # hash, media, text

_MAX_TIME_S = 253_402_300_799  # the end of the year 9999, the last that Python's datetime can show
_PYTHON = {pa.string(): (str,), pa.int64(): (int,), pa.float64(): (float, int), pa.bool_(): (bool,)}

_COLUMNS = list(EVENT_SCHEMA)[2:]
_FIELDS = EVENT_SCHEMA.names[2:]
_ALLOWED = tuple(
    frozenset((*_PYTHON.get(field.type, (float, int)), *([NoneType] if field.nullable else [])))
    for field in _COLUMNS
)
_TIME = _FIELDS.index("t_start")
_DOUBLE = 2**53  # up to here a double holds every whole number; Arrow refuses to round one beyond
# By the types of a row that was found good: what picks its whole numbers.
_WHOLE: dict[tuple[type, ...], Callable[[Row], tuple[int, ...]]] = {}
_MAX_KINDS = 4096

FIELDS = len(_FIELDS)
fields_of: Callable[[Event], Row] = attrgetter(*_FIELDS)


def check(row: Row) -> None:
    """Raises TypeError or ValueError where a field fits not its column: one would block every later flush.

    `row` holds the fields of an event, without an id.
    """
    kinds = tuple(map(type, row))
    whole = _WHOLE.get(kinds)
    if whole is None:
        _check_types(row)
        whole = itemgetter(*(place for place, kind in enumerate(kinds) if kind is int))
        if len(_WHOLE) < _MAX_KINDS:
            _WHOLE[kinds] = whole
    numbers = whole(row)
    if max(numbers) > _DOUBLE or min(numbers) < -_DOUBLE:
        _check_sizes(row)
    if not 0 <= row[_TIME] <= _MAX_TIME_S:
        raise ValueError(f"Event.t_start is {row[_TIME]!r}: expected Unix seconds")


def _check_types(row: Row) -> None:
    for name, value, allowed in zip(_FIELDS, row, _ALLOWED, strict=True):
        if type(value) not in allowed:
            expected = " or ".join(sorted(kind.__name__ for kind in allowed))
            raise TypeError(f"Event.{name} is {value!r} ({type(value).__name__}): expected {expected}")


def _check_sizes(row: Row) -> None:
    for name, value, column in zip(_FIELDS, row, _COLUMNS, strict=True):
        if type(value) is not int:
            continue
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"Event.{name} is {value}: expected 64 bits at most")
        if column.type == pa.float64() and abs(value) > _DOUBLE:
            raise ValueError(f"Event.{name} is {value}: no double holds it, expected a float")


def event_batch(rows: Iterable[Row]) -> pa.RecordBatch:
    """Rows that `check` let pass, each after its event_id, as a batch of EVENT_SCHEMA's columns."""
    # One conversion of tuples costs a third of one per column where a batch is small.
    after = 1 + _TIME
    stored = [
        (SCHEMA_VERSION, *row[:after], round(row[after] * 1_000_000), *row[after + 1 :]) for row in rows
    ]
    return _batch(stored, EVENT_SCHEMA)


def payload_batch(bodies: Sequence[Body]) -> pa.RecordBatch:
    """Bodies as a batch of PAYLOAD_SCHEMA's columns."""
    return _batch(bodies, PAYLOAD_SCHEMA)


def _batch(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    kind = pa.struct(list(schema))
    try:
        array = pa.array(rows, kind)
    except UnicodeEncodeError:  # a lone surrogate, as a model may send one
        array = pa.array([tuple(map(_encodable, row)) for row in rows], kind)
    return pa.RecordBatch.from_struct_array(array)


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
