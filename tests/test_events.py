"""The event log: what is acknowledged is kept, read once, and never moves backwards."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_app import events
from ray_app.errors import RunDirError, StorageError
from ray_app.event_writer import EventWriter, compact, recover
from ray_app.records import Event

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
)

OPTIONAL = {
    *(
        "error_kind",
        "queue_s",
        "prefill_s",
        "decode_s",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
    ),
    *("cost_usd", "local_hits", "web_hits", "exit_status", "outcome", "is_correct", "confidence"),
}


def _writer(run_dir: Path, writer_id: str = "w", **options: Any) -> EventWriter:
    """A writer that flushes and publishes only when told to."""
    return EventWriter(run_dir, writer_id, **{"flush_s": 3600.0, "flush_rows": 10_000, **options})


def _turn(number: int, **fields: Any) -> Event:
    return dataclasses.replace(
        Event(kind="turn", t_start=1_700_000_000.0 + number, call_seq=number), **fields
    )


def _result(outcome: str, **fields: Any) -> Event:
    base = Event(kind="result", t_start=1_700_000_000.0, rollout_key="r", judge_key="j", outcome=outcome)  # type: ignore[arg-type]
    return dataclasses.replace(base, **fields)


def _rows(run_dir: Path, *columns: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = events.read(run_dir, columns or None).read_all().to_pylist()
    return rows


def _numbers(run_dir: Path) -> list[int]:
    return sorted(row["call_seq"] for row in _rows(run_dir, "call_seq"))


def _stream(run_dir: Path) -> Path:
    return next((run_dir / "log").glob("*.arrows"))


def test_every_field_of_an_event_comes_back(tmp_path: Path) -> None:
    least = Event(kind="run_start", t_start=0.0)
    writer = _writer(tmp_path)
    ids = [writer.append(FULL), writer.append(least)]
    writer.flush()
    rows = {row["event_id"]: row for row in _rows(tmp_path)}
    assert list(rows) == ids == ["w-0", "w-1"]
    for event_id, event in zip(ids, (FULL, least), strict=True):
        stamp = datetime.fromtimestamp(event.t_start, UTC)
        fixed = {"schema_version": events.SCHEMA_VERSION, "event_id": event_id, "t_start": stamp}
        assert rows[event_id] == {**dataclasses.asdict(event), **fixed}
    writer.close()
    assert {row["event_id"]: row for row in _rows(tmp_path)} == rows
    assert not list(tmp_path.rglob("*.arrows"))


def test_columns_that_are_always_filled_stay_the_same_set() -> None:
    # A column added later must be nullable, or files of this version would no longer fit the schema.
    required = {field.name for field in events.EVENT_SCHEMA if not field.nullable}
    assert required == {field.name for field in dataclasses.fields(Event)} - OPTIONAL | {
        "schema_version",
        "event_id",
    }


def test_columns_are_picked_in_the_order_asked_for(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append(FULL)
    writer.close()
    assert events.read(tmp_path, ["tool", "kind"]).read_all().to_pydict() == {
        "tool": ["search"],
        "kind": ["model_call"],
    }
    with pytest.raises(ValueError, match="nonesuch"):
        events.read(tmp_path, ["nonesuch"])


def test_a_cut_stream_gives_every_batch_before_the_cut(tmp_path: Path) -> None:
    writer, ends = _writer(tmp_path / "whole"), [0]
    for number in range(20):
        writer.append(_turn(number, detail="x" * number))
        writer.flush()
        ends.append(_stream(tmp_path / "whole").stat().st_size)
    whole = _stream(tmp_path / "whole").read_bytes()
    writer.close()
    log = tmp_path / "cut" / "log"
    log.mkdir(parents=True)
    (tmp_path / "cut" / "payloads").mkdir()
    edges = [end + step for end in ends for step in (-1, 0, 1) if 0 <= end + step <= len(whole)]
    for cut in [*edges, *random.Random(0).choices(range(len(whole)), k=200)]:
        (log / "w-000000.arrows").write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends[1:])
        assert _numbers(tmp_path / "cut") == list(range(complete)), cut
        report = recover(tmp_path / "cut")
        assert (report.streams, report.events) == (1, complete)
        assert report.torn_bytes == cut - (ends[complete] if complete else 0)
        assert _numbers(tmp_path / "cut") == list(range(complete)), cut
        assert not list(log.glob("*.arrows"))
        for path in log.iterdir():
            path.unlink()


def _child(script: str, *args: object) -> subprocess.Popen[str]:
    prelude = "import sys\nfrom itertools import count\nfrom pathlib import Path\n" + (
        "from ray_app.event_writer import EventWriter, compact\nfrom ray_app.records import Event\n"
        "run = Path(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", prelude + script, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


_UNTIL_KILLED = """
writer = EventWriter(run, "child", flush_rows=7, flush_s=0.01, publish_s=0.05)
for number in count():
    key = writer.payload(f"[{number}]")
    writer.append(Event("turn", 1.7e9, call_seq=number, payload_hash=key))
    if number % 50 == 49:
        writer.flush()
        print(number, flush=True)
"""


def test_a_killed_writer_leaves_all_that_flush_acknowledged(tmp_path: Path) -> None:
    with _child(_UNTIL_KILLED, tmp_path) as child:
        assert child.stdout is not None
        acknowledged = [int(child.stdout.readline()) for _ in range(40)][-1]
        os.kill(child.pid, signal.SIGKILL)
    for step in (lambda: None, lambda: recover(tmp_path), lambda: compact(tmp_path)):
        step()
        numbers = _numbers(tmp_path)
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > acknowledged
        keys = {row["payload_hash"] for row in _rows(tmp_path, "payload_hash")}
        assert set(events.read_payloads(tmp_path, keys)) == keys


_ROUNDS = """
import select
number = 0
for turn in count():
    writer = EventWriter(run, f"round-{turn}", flush_rows=5, flush_s=0.004, publish_s=0.0)
    for _ in range(150):
        key = writer.payload(f"{number}" + "x" * 4_000)
        writer.append(Event("turn", 1.7e9, call_seq=number, payload_hash=key))
        number += 1
    writer.close()
    if turn == 0:
        print("started", flush=True)
    compact(run)
    if select.select([sys.stdin], [], [], 0)[0]:
        break
print(number)
"""


def test_snapshots_during_a_run_never_lose_double_or_go_back(tmp_path: Path) -> None:
    with _child(_ROUNDS, tmp_path) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        before, sizes = 0, set()
        for _ in range(300):
            rows = _rows(tmp_path, "call_seq", "payload_hash")
            assert sorted(row["call_seq"] for row in rows) == list(range(len(rows)))
            assert len(rows) >= before
            before = len(rows)
            sizes.add(before)
            newest = {row["payload_hash"] for row in rows if row["call_seq"] > before - 20}
            assert set(events.read_payloads(tmp_path, newest)) == newest
        child.stdin.close()
        written = int(child.stdout.read())
    assert len(sizes) > 20
    assert _numbers(tmp_path) == list(range(written))
    assert len(list((tmp_path / "log").iterdir())) == len(list((tmp_path / "payloads").iterdir())) == 1


def test_the_background_thread_flushes_and_publishes_by_itself(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, "w", flush_s=0.005, publish_s=0.0)
    writer.append(_turn(0))
    deadline = time.monotonic() + 20
    while not list((tmp_path / "log").glob("*.parquet")) and time.monotonic() < deadline:
        writer.payload(str(time.monotonic()))
    assert pq.read_table(next((tmp_path / "log").glob("*.parquet")))["call_seq"].to_pylist() == [0]
    writer.close()


def test_a_full_batch_is_readable_without_a_flush(tmp_path: Path) -> None:
    writer = _writer(tmp_path, flush_rows=3)
    for number in range(5):
        writer.append(_turn(number))
    assert _numbers(tmp_path) == [0, 1, 2]
    writer.close()
    assert _numbers(tmp_path) == [0, 1, 2, 3, 4]


def test_doubles_that_a_crash_left_are_dropped(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append(_turn(0, payload_hash=writer.payload("{}")))
    writer.flush()
    stream = _stream(tmp_path)
    left = stream.read_bytes()
    writer.append(_turn(1))
    writer.close()
    part = next((tmp_path / "log").glob("*.parquet"))
    published = part.read_bytes()
    stream.write_bytes(left)  # died between rename and delete of a publication
    assert _numbers(tmp_path) == [0, 1]
    compact(tmp_path)
    part.write_bytes(published)  # died between rename and delete of a compaction
    assert _numbers(tmp_path) == [0, 1]
    stream.write_bytes(left)
    recover(tmp_path)
    compact(tmp_path)
    assert _numbers(tmp_path) == [0, 1]
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["compacted-1.parquet"]


def test_recovery_never_replaces_a_published_part_by_a_shorter_stream(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append(_turn(0))
    writer.flush()
    stream, left = _stream(tmp_path), _stream(tmp_path).read_bytes()
    writer.append(_turn(1))
    writer.close()
    stream.write_bytes(left)
    recover(tmp_path)
    assert _numbers(tmp_path) == [0, 1]


def test_a_payload_is_stored_once_and_read_by_hash(tmp_path: Path) -> None:
    writer, other = _writer(tmp_path), _writer(tmp_path, "other")
    bodies = ['{"a": 1}', "line\nline", "", '"\udcff"']
    keys = [writer.payload(body) for body in bodies]
    assert [writer.payload(body) for body in bodies] == keys
    assert other.payload(bodies[0]) == keys[0]
    writer.close()
    other.close()
    assert (
        sum(pq.read_metadata(path).num_rows for path in (tmp_path / "payloads").iterdir()) == len(bodies) + 1
    )
    compact(tmp_path)
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "payloads").iterdir()) == len(bodies)
    found = events.read_payloads(tmp_path, [*keys, "absent"])
    assert [found[key] for key in keys[:3]] == bodies[:3]
    assert json.loads(found[keys[3]]) == json.loads(bodies[3])
    assert set(found) == set(keys)
    assert all(len(key) == 32 for key in keys)


def test_a_later_commit_supersedes_an_owed_result(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append(_result("owed", t_start=1_700_000_009.0))  # a clock set back must not revive it
    writer.append(_result("ok"))
    writer.append(_result("ok", trial=1))
    writer.append(_turn(0, rollout_key="r"))
    writer.close()
    counted = events.results(tmp_path).select(["trial", "outcome"]).to_pylist()
    assert counted == [{"trial": 0, "outcome": "ok"}, {"trial": 1, "outcome": "ok"}]


def test_the_highest_epoch_wins_over_a_driver_that_woke_up(tmp_path: Path) -> None:
    new, old = _writer(tmp_path, "a"), _writer(tmp_path, "b")
    new.append(_result("ok", epoch=2))
    old.append(_result("failed", epoch=1, t_start=1_700_000_500.0))
    for writer in (new, old):
        writer.close()
    assert events.results(tmp_path)["outcome"].to_pylist() == ["ok"]


def test_within_an_epoch_the_later_writer_wins_over_more_rows_of_an_earlier_one(tmp_path: Path) -> None:
    first, second = _writer(tmp_path, "z"), _writer(tmp_path, "a")
    first.append(_turn(0))
    first.append(_result("owed"))
    second.append(_result("ok", t_start=1_700_000_001.0))
    for writer in (first, second):
        writer.close()
    assert events.results(tmp_path)["outcome"].to_pylist() == ["ok"]


@pytest.mark.parametrize("task_id", ["../../etc/x", "a/b", "o'clock\"; drop table events", "\x00", "é\ud800"])
def test_ids_from_data_stay_data(tmp_path: Path, task_id: str) -> None:
    run_dir = tmp_path / "run"
    writer = _writer(run_dir)
    writer.append(_result("ok", task_id=task_id, rollout_key=task_id))
    writer.close()
    stored = task_id.encode("utf-8", "backslashreplace").decode()
    assert events.results(run_dir)["task_id"].to_pylist() == [stored]
    with events.connect(run_dir) as connection:
        query = "select count(*) from events where task_id = ?"
        assert connection.execute(query, [stored]).fetchall() == [(1,)]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (run_dir / "log").iterdir()] == ["w-000000.parquet"]


@pytest.mark.parametrize("writer_id", ["", "../w", "a/b", ".hidden", "compacted-0", "w\n", "x" * 200])
def test_an_unsafe_writer_id_is_refused(tmp_path: Path, writer_id: str) -> None:
    with pytest.raises(ValueError, match="safe file name"):
        EventWriter(tmp_path, writer_id)
    assert not list(tmp_path.iterdir())


def test_a_writer_id_serves_one_process_start_only(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append(_turn(0))
    writer.close()
    with pytest.raises(ValueError, match="used before"):
        EventWriter(tmp_path, "w")


@pytest.mark.parametrize(
    "fields",
    [{"prompt_tokens": "12"}, {"task_id": None}, {"prompt_tokens": 2**70}, {"t_start": float("nan")}],
)
def test_a_value_that_fits_no_column_is_refused_and_blocks_nothing(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    writer = _writer(tmp_path)
    with pytest.raises((TypeError, ValueError), match=next(iter(fields))):
        writer.append(_turn(0, **fields))
    assert writer.append(_turn(1)) == "w-0"
    writer.close()
    assert _numbers(tmp_path) == [1]
    with pytest.raises(ValueError, match="closed"):
        writer.append(_turn(2))


def _foreign_file(run_dir: Path, columns: dict[str, Any]) -> None:
    """A file of another version: some columns missing, one that is unknown here."""
    fields = [events.EVENT_SCHEMA.field(name) for name in columns if name != "novel"]
    schema = pa.schema([*fields, pa.field("novel", pa.string())], metadata={"canary": "c-1"})
    batch = pa.RecordBatch.from_pydict(columns, schema=schema)
    (run_dir / "log" / "old-000000.arrows").write_bytes(schema.serialize().to_pybytes() + batch.serialize())


def test_files_of_other_schema_versions_read_with_nulls_and_survive_compaction(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append(FULL)
    writer.close()
    old = {"schema_version": [0], "event_id": ["old-0"], "kind": ["turn"], "trial": [1], "novel": ["n"]}
    _foreign_file(tmp_path, old)
    for step in (lambda: None, lambda: recover(tmp_path), lambda: compact(tmp_path)):
        step()
        rows = {row["event_id"]: row for row in _rows(tmp_path)}
        assert rows["old-0"]["trial"] == 1
        assert rows["old-0"]["confidence"] is rows["old-0"]["prompt_tokens"] is None
        assert rows["w-0"]["confidence"] == FULL.confidence
        assert "novel" not in rows["old-0"]
    merged = pq.read_table(tmp_path / "log" / "compacted-0.parquet")
    assert sorted(merged["novel"].to_pylist(), key=str) == [None, "n"]
    assert merged.schema.metadata[b"canary"] == b"c-1"


def _canary(path: Path) -> bytes | None:
    schema = events.file_schema(path)
    return None if schema is None else schema.metadata[b"canary"]


def test_the_canary_travels_with_every_file(tmp_path: Path) -> None:
    writer = _writer(tmp_path, metadata={"canary": "c-1"})
    writer.append(_turn(0, payload_hash=writer.payload("{}")))
    writer.flush()
    files = [*tmp_path.rglob("*.arrows")]
    assert [_canary(path) for path in files] == [b"c-1"] * 2
    writer.close()
    compact(tmp_path)
    files = [*tmp_path.rglob("*.parquet")]
    assert [_canary(path) for path in files] == [b"c-1"] * 2


def test_a_directory_without_a_log_is_the_users_mistake(tmp_path: Path) -> None:
    for call in (events.read, events.results, events.connect):
        with pytest.raises(RunDirError, match="no event log at"):
            call(tmp_path / "nowhere")


def test_an_unreadable_parquet_file_is_named(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.append(_turn(0))
    writer.close()
    (tmp_path / "log" / "w-000000.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(StorageError, match=r"w-000000\.parquet"):
        _numbers(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65_536, 4096, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:
                continue
    return ballast


def test_a_full_disk_is_reported_and_loses_nothing_that_was_taken(small_disk: Path) -> None:
    reserve = small_disk / "reserve"
    reserve.write_bytes(b"0" * 500_000)
    writer, taken, acknowledged = _writer(small_disk / "run", flush_rows=50), 0, 0
    with pytest.raises(StorageError, match=r"w-000\d\d\d\.arrows: No space left"):
        for number in range(100_000):
            writer.append(_turn(number, detail="x" * 300, payload_hash=writer.payload(f"{number}" * 20)))
            taken += 1
            if number % 70 == 0:
                writer.flush()
                acknowledged = taken
    assert len(numbers := _numbers(small_disk / "run")) >= acknowledged > 0
    assert numbers == list(range(len(numbers)))
    with pytest.raises(StorageError):
        writer.append(_turn(-7))
    reserve.unlink()
    writer.flush()
    assert _numbers(small_disk / "run") == list(range(taken))
    writer.append(_turn(taken))
    writer.close()
    rows = _rows(small_disk / "run", "call_seq", "payload_hash")
    assert sorted(row["call_seq"] for row in rows) == list(range(taken + 1))
    keys = {row["payload_hash"] for row in rows} - {""}
    assert set(events.read_payloads(small_disk / "run", keys)) == keys


def test_an_error_of_the_background_thread_reaches_the_next_call(small_disk: Path) -> None:
    writer = _writer(small_disk / "run", flush_s=0.002)
    writer.append(_turn(0))
    writer.flush()
    ballast, deadline = _fill(small_disk), time.monotonic() + 20
    writer.append(_turn(1, detail="x" * 5000))
    with pytest.raises(StorageError, match="No space left"):
        while time.monotonic() < deadline:
            writer.payload("")
    ballast.unlink()
    writer.close()
    assert _numbers(small_disk / "run") == [0, 1]


def test_sql_sees_new_rows_while_the_writer_works(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    with events.connect(tmp_path) as connection:
        for number in range(3):
            key = writer.payload(f"[{number}]")
            writer.append(_turn(number, payload_hash=key))
            writer.append(_result("ok" if number else "owed"))
            writer.flush()
            joined = "events left join payloads on hash = payload_hash"
            counted = connection.execute(
                f"select count(*), count(body), max(t_start) from {joined}"
            ).fetchone()
            assert counted == (2 * number + 2, number + 1, datetime(2023, 11, 14, 22, 13, 20 + number))
            outcome = connection.execute("select outcome from results").fetchall()
            assert outcome == [("ok" if number else "owed",)]
    writer.close()
