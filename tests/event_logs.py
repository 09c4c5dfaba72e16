"""Small event logs for tests: rows, writers that do nothing by themselves, what a reader sees."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_app import events
from ray_app.event_writer import EventWriter
from ray_app.records import Event
from ray_app.table_files import PARQUET

FULL = Event(
    kind="model_call",
    t_start=1_700_000_000.123456,
    duration_s=1.5,
    run_id="run",
    epoch=2,
    rollout_key="r",
    judge_key="j",
    task_id="t",
    trial=3,
    attempt=4,
    turn=5,
    call_seq=6,
    role="expert",
    tool="search",
    alias="expert-1",
    model="m",
    endpoint="e",
    status="error",
    error_kind="model",
    error="too long",
    queue_s=0.1,
    prefill_s=0.2,
    decode_s=0.3,
    prompt_tokens=7,
    cached_tokens=8,
    completion_tokens=9,
    cost_usd=0.01,
    retries=10,
    search_backend="local",
    local_hits=11,
    web_hits=12,
    exit_status=-9,
    outcome="failed",
    is_correct=False,
    verdict_method="judge",
    confidence=0.75,
    category="c",
    answer_type="exactMatch",
    is_replayed=True,
    request_hash="q",
    payload_hash="p",
    detail="d",
    worker="w",
    web_calls=13,
    context_tokens=14,
    context_cut=15,
    error_type="ContextOverflow",
)


def make_writer(run_dir: Path, writer_id: str = "w", **options: Any) -> EventWriter:
    """A writer that flushes and publishes only when told to."""
    return EventWriter(run_dir, writer_id, **{"flush_s": 3600.0, "flush_rows": 10_000, **options})


def turn(number: int, **fields: Any) -> Event:
    """A row that is known by its `call_seq`."""
    return dataclasses.replace(
        Event(kind="turn", t_start=1_700_000_000.0 + number, call_seq=number), **fields
    )


def result(outcome: str, **fields: Any) -> Event:
    base = Event(kind="result", t_start=1_700_000_000.0, rollout_key="r", judge_key="j", outcome=outcome)  # type: ignore[arg-type]
    return dataclasses.replace(base, **fields)


def read_rows(run_dir: Path, *columns: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = events.read(run_dir, columns or None).read_all().to_pylist()
    return found


def read_numbers(run_dir: Path) -> list[int]:
    return sorted(row["call_seq"] for row in read_rows(run_dir, "call_seq"))


def stream_of(run_dir: Path) -> Path:
    return next((run_dir / "log").glob("*.arrows"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_part(run_dir: Path, writer_id: str, numbers: Sequence[int]) -> None:
    """A published file of both tables, with rows of these numbers."""
    writer = make_writer(run_dir, writer_id)
    for number in numbers:
        writer.append(turn(number, payload_hash=writer.payload(f"[{number}]")))
    writer.close()


def write_file(path: Path, columns: dict[str, Any], schema: pa.Schema) -> None:
    """A file of the log in the form that its name says, as a program of another version leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = pa.RecordBatch.from_pydict(columns, schema=schema)
    if path.suffix == PARQUET:
        pq.write_table(pa.Table.from_batches([batch]), path)
    else:
        path.write_bytes(schema.serialize().to_pybytes() + batch.serialize())


def start_child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that writes to the run whose directory is its first argument (`run`)."""
    prelude = (
        "import sys\nfrom itertools import count\nfrom pathlib import Path\n"
        "from ray_app.compaction import compact, merge\n"
        "from ray_app.event_writer import EventWriter\nfrom ray_app.records import Event\n"
        "run = Path(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", prelude + script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
