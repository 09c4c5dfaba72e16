"""One question in SQL to a run's log: views `events`, `results` and `payloads`, and nothing else.

Read-only: one statement, which must ask; the engine may touch no file, no network and no variable of this
process. Each question reads the log anew, so a run that goes on can be asked again and again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

from ray_app import events
from ray_app.errors import ConfigError
from ray_app.events import EVENT_SCHEMA, PAYLOAD_SCHEMA

VIEWS = {"events": EVENT_SCHEMA.names, "results": EVENT_SCHEMA.names, "payloads": PAYLOAD_SCHEMA.names}
_ASKS = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_NO_OUTSIDE = (
    "set python_enable_replacements = false",
    "set enable_external_access = false",
    "set lock_configuration = true",
)


@dataclass(frozen=True, slots=True)
class Found:
    """The answer: column names, and rows of plain values (None, bool, int, float, str, list, dict)."""

    names: list[str]
    rows: list[list[Any]]


def ask(run_dir: Path, question: str) -> Found:
    """The rows that `question` gives. Raises ConfigError where it cannot be answered."""
    _check(question)
    with events.connect(run_dir) as log:
        for setting in _NO_OUTSIDE:
            log.execute(setting)
        try:
            answer = log.execute(question)
            names = [column[0] for column in answer.description or ()]
            rows = answer.fetchall()
        except duckdb.Error as error:
            raise ConfigError(_words(error)) from None
    return Found(names, [[plain_value(value) for value in row] for row in rows])


def _check(question: str) -> None:
    try:
        statements = duckdb.extract_statements(question)
    except duckdb.Error as error:
        raise ConfigError(_words(error)) from None
    if len(statements) != 1 or statements[0].type not in _ASKS:
        kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
        raise ConfigError(f"sql: {kinds}; expected one SELECT (or EXPLAIN): a log is only read")


def _words(error: duckdb.Error) -> str:
    """What DuckDB says, in one line; where a name is unknown, with those that there are."""
    lines = [line for line in str(error).split("\n") if line.strip()]
    words = " ".join(line for line in lines if not line.startswith(("LINE ", " ")))
    if "Table with name" in words:
        words = f"{words.partition(' Did you mean')[0]} Expected one of the views {', '.join(VIEWS)}"
    elif "column" in words.lower() and isinstance(error, duckdb.BinderException):
        shown = f"events and results: {', '.join(VIEWS['events'])}; payloads: {', '.join(VIEWS['payloads'])}"
        words += f" Expected some of {shown}"
    return f"sql: {words}"


def plain_value(value: Any) -> Any:
    """A value that JSON and CSV can hold; what is no number becomes None, a time becomes ISO text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain_value(item) for name, item in value.items()}
    return value if value is None or isinstance(value, bool | int | str) else str(value)
