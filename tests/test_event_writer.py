"""The writer: what it takes is kept, comes back as it was, and never fails for storage."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_app import events
from ray_app.compaction import compact, recover
from ray_app.errors import StorageError
from ray_app.event_rows import Body, Row
from ray_app.event_writer import EventWriter
from ray_app.records import Event
from ray_app.table_files import file_schema
from tests.disks import fill, mounted
from tests.event_logs import FULL, make_writer, names, read_numbers, read_rows, turn


def until(is_so: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits for what another thread does."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.001)


def test_every_field_of_an_event_comes_back(tmp_path: Path) -> None:
    least = Event(kind="run_start", t_start=0.0)
    writer = make_writer(tmp_path)
    ids = [writer.append(FULL), writer.append(least)]
    writer.flush()
    rows = {row["event_id"]: row for row in read_rows(tmp_path)}
    assert list(rows) == ids == ["w-0", "w-1"]
    for event_id, event in zip(ids, (FULL, least), strict=True):
        stamp = datetime.fromtimestamp(event.t_start, UTC)
        fixed = {"schema_version": events.SCHEMA_VERSION, "event_id": event_id, "t_start": stamp}
        assert rows[event_id] == {**dataclasses.asdict(event), **fixed}
    writer.close()
    assert {row["event_id"]: row for row in read_rows(tmp_path)} == rows
    assert not list(tmp_path.rglob("*.arrows"))


def test_the_background_thread_flushes_and_publishes_by_itself(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, "w", flush_s=0.005, publish_s=0.0)
    writer.append(turn(0))
    until(lambda: list((tmp_path / "log").glob("*.parquet")))
    assert pq.read_table(next((tmp_path / "log").glob("*.parquet")))["call_seq"].to_pylist() == [0]
    writer.close()


def test_a_full_batch_is_readable_without_a_flush(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, flush_rows=3)
    for number in range(3):
        writer.append(turn(number))
    until(lambda: read_numbers(tmp_path) == [0, 1, 2])
    writer.append(turn(3))
    writer.append(turn(4))
    assert read_numbers(tmp_path) == [0, 1, 2]
    writer.close()
    assert read_numbers(tmp_path) == [0, 1, 2, 3, 4]


def test_a_payload_is_stored_once_and_read_by_hash(tmp_path: Path) -> None:
    writer, other = make_writer(tmp_path), make_writer(tmp_path, "other")
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


@pytest.mark.parametrize("writer_id", ["", "../w", "a/b", ".hidden", "compacted-0", "w\n", "x" * 200])
def test_an_unsafe_writer_id_is_refused(tmp_path: Path, writer_id: str) -> None:
    with pytest.raises(ValueError, match="safe file name"):
        EventWriter(tmp_path, writer_id)
    assert not list(tmp_path.iterdir())


def test_a_writer_id_serves_one_process_start_only(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.append(turn(0))
    writer.close()
    with pytest.raises(ValueError, match="used before"):
        EventWriter(tmp_path, "w")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_tokens": "12"},
        {"task_id": None},
        {"prompt_tokens": 2**70},
        {"t_start": float("nan")},
        {"is_replayed": 1},
        {"trial": True},
        {"cost_usd": 2**60 + 1},
    ],
)
def test_a_value_that_fits_no_column_is_refused_and_blocks_nothing(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    writer = make_writer(tmp_path)
    with pytest.raises((TypeError, ValueError), match=next(iter(fields))):
        writer.append(turn(0, **fields))
    assert writer.append(turn(1)) == "w-0"
    writer.close()
    assert read_numbers(tmp_path) == [1]
    with pytest.raises(ValueError, match="closed"):
        writer.append(turn(2))


def _canary(path: Path) -> bytes | None:
    schema = file_schema(path)
    return None if schema is None else schema.metadata[b"canary"]


def test_the_canary_travels_with_every_file(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, metadata={"canary": "c-1"})
    writer.append(turn(0, payload_hash=writer.payload("{}")))
    writer.flush()
    files = [*tmp_path.rglob("*.arrows")]
    assert [_canary(path) for path in files] == [b"c-1"] * 2
    writer.close()
    compact(tmp_path)
    files = [*tmp_path.rglob("*.parquet")]
    assert [_canary(path) for path in files] == [b"c-1"] * 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_full_disk_never_reaches_those_who_append_and_loses_nothing(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reserve = small_disk / "reserve"
    reserve.write_bytes(b"0" * 500_000)
    run_dir = small_disk / "run"
    writer, taken, acknowledged = make_writer(run_dir), 0, 0
    with pytest.raises(StorageError, match=r"w-000\d\d\d\.arrows: No space left"):
        for number in range(100_000):
            writer.append(turn(number, detail="x" * 300, payload_hash=writer.payload(f"{number}" * 20)))
            taken += 1
            if number % 70 == 0:
                writer.flush()
                acknowledged = taken
    assert len(seen := read_numbers(run_dir)) >= acknowledged > 0
    assert seen == list(range(len(seen)))
    assert writer.failing_s > 0 and "No space left" in writer.failure
    writer.append(turn(taken))
    with pytest.raises(StorageError):
        writer.sync()
    assert acknowledged <= writer.synced <= len(seen) < writer.taken == taken + 1
    reserve.unlink()
    writer.flush()
    assert (writer.failing_s, writer.failure, writer.synced) == (0.0, "", taken + 1)
    assert [record.message[:16] for record in caplog.records] == ["event log w: can", "event log w: sto"]
    writer.close()
    rows = read_rows(run_dir, "call_seq", "payload_hash")
    assert sorted(row["call_seq"] for row in rows) == list(range(taken + 1))
    keys = {row["payload_hash"] for row in rows} - {""}
    assert set(events.read_payloads(run_dir, keys)) == keys


def test_the_timed_flush_tries_again_and_says_so_once(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = make_writer(small_disk / "run", flush_s=0.002)
    writer.append(turn(0))
    writer.sync()
    ballast = fill(small_disk)
    writer.append(turn(1, detail="x" * 5000))
    until(lambda: writer.failing_s > 0.05)
    assert sum("w-000000.arrows" in record.message for record in caplog.records) == 1
    assert (writer.taken, writer.synced) == (2, 1)
    ballast.unlink()
    until(lambda: writer.synced == 2)
    assert writer.failure == ""
    assert sum("works again" in record.message for record in caplog.records) == 1
    writer.close()
    assert read_numbers(small_disk / "run") == [0, 1]


def test_a_part_that_cannot_be_published_is_said_once_and_comes_later(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = make_writer(small_disk / "run", flush_s=0.002, publish_s=0.3)
    writer.append(turn(0, detail="x" * 20_000))
    writer.sync()
    ballast = fill(small_disk)
    until(lambda: caplog.records)
    time_to_repeat = time.monotonic() + 0.05
    until(lambda: time.monotonic() > time_to_repeat)
    assert [record.message.split(":")[1][:13] for record in caplog.records] == [" cannot write"]
    assert read_numbers(small_disk / "run") == [0] and writer.failing_s == 0.0
    ballast.unlink()
    until(lambda: names(small_disk / "run" / "log") == ["w-000000.parquet"])
    writer.close()


def test_rows_are_synced_only_by_a_sync(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for number in range(3):
        writer.append(turn(number))
    assert (writer.taken, writer.synced) == (3, 0)
    writer.flush()
    assert (writer.taken, writer.synced) == (3, 0)
    writer.sync()
    assert (writer.taken, writer.synced) == (3, 3)
    writer.append(turn(3))
    writer.close()
    assert (writer.taken, writer.synced) == (4, 4)


def test_a_writer_that_may_write_no_more_leaves_the_log_as_it_is(tmp_path: Path) -> None:
    replaced = threading.Event()

    def guard() -> None:
        if replaced.is_set():
            raise StorageError("another driver has the run")

    writer = EventWriter(tmp_path, "w", flush_s=0.005, guard=guard)
    writer.append(turn(0))
    writer.flush()
    replaced.set()
    writer.append(turn(1))
    for store in (writer.flush, writer.sync, writer.close):
        with pytest.raises(StorageError, match="another driver has the run"):
            store()
    assert read_numbers(tmp_path) == [0]
    assert writer.failing_s == 0.0, "nothing is wrong with the storage"


def test_a_writer_whose_stream_was_recovered_by_another_process_writes_again(tmp_path: Path) -> None:
    # A process that was stopped for a minute wakes up: a new driver has taken its files.
    writer = make_writer(tmp_path)
    writer.append(turn(0))
    writer.sync()
    recover(tmp_path)
    compact(tmp_path)
    writer.append(turn(1, payload_hash=writer.payload("[1]")))
    with pytest.raises(StorageError, match="another process has deleted"):
        writer.sync()
    assert writer.synced == 1
    writer.sync()
    assert (writer.synced, writer.failure) == (2, "")
    assert read_numbers(tmp_path) == [0, 1]
    writer.close()
    assert read_numbers(tmp_path) == [0, 1]
    assert not list(tmp_path.rglob("*.arrows"))


class Order:
    """A tap that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, Row]] = []

    def row(self, row: Row) -> None:
        self.shown.append(("row", row))

    def body(self, body: Body) -> None:
        self.shown.append(("body", body))


def test_a_tap_is_shown_rows_and_bodies_in_their_order(tmp_path: Path) -> None:
    order = Order()
    writer = make_writer(tmp_path, tap=order)
    key = writer.payload("[0]")
    writer.append(turn(0, payload_hash=key))
    assert writer.payload("[0]") == key
    writer.append(turn(1))
    with pytest.raises(TypeError):
        writer.append(turn(2, task_id=None))
    assert [(what, fields[0]) for what, fields in order.shown] == [
        ("body", key),
        ("row", "w-0"),
        ("row", "w-1"),
    ]
    assert order.shown[0][1] == (key, "json", "[0]")
    assert order.shown[1][1][1:] == dataclasses.astuple(turn(0, payload_hash=key))
    writer.close()


def test_a_tap_sees_each_body_before_its_row_whatever_runs_at_once(tmp_path: Path) -> None:
    order = Order()
    writer = make_writer(tmp_path, tap=order, flush_s=0.001, flush_rows=16)

    def work(first: int) -> None:
        for number in range(first, first + 300):
            writer.append(turn(number, payload_hash=writer.payload(f"[{number}]")))

    threads = [threading.Thread(target=work, args=(1000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    where = 1 + [field.name for field in dataclasses.fields(Event)].index("payload_hash")
    known: set[str] = set()
    for what, fields in order.shown:
        if what == "body":
            known.add(fields[0])
        else:
            assert fields[where] in known
    taken = [fields[0] for what, fields in order.shown if what == "row"]
    assert taken == [f"w-{number}" for number in range(1200)]
    writer.close()
    assert len(read_numbers(tmp_path)) == 1200


def test_rows_of_a_dead_writer_are_adopted_as_they_were_shown(tmp_path: Path) -> None:
    order = Order()
    lost = make_writer(tmp_path / "lost", "dead", tap=order)
    keys = [lost.payload(f"[{number}]") for number in range(3)]
    for number, key in enumerate(keys):
        lost.append(turn(number, payload_hash=key))
    rows = [fields for what, fields in order.shown if what == "row"]
    bodies = [fields for what, fields in order.shown if what == "body"]
    keeper = make_writer(tmp_path / "run", "keeper", tap=(again := Order()))
    keeper.payload("[0]")
    keeper.adopt(rows, bodies)
    keeper.adopt(rows[:1])
    keeper.append(turn(7))
    assert keeper.taken == 5 == sum(what == "row" for what, _ in again.shown)
    keeper.close()
    found = read_rows(tmp_path / "run", "event_id", "call_seq", "payload_hash")
    assert {row["event_id"]: row["call_seq"] for row in found} == {
        **{f"dead-{number}": number for number in range(3)},
        "keeper-0": 7,
    }
    assert set(events.read_payloads(tmp_path / "run", keys)) == set(keys)
    lost.close()


@pytest.mark.parametrize("row", [("dead-1",), (7, *dataclasses.astuple(FULL)), ("dead-1", None) * 22])
def test_a_row_that_fits_no_column_is_not_adopted(tmp_path: Path, row: Row) -> None:
    writer = make_writer(tmp_path)
    with pytest.raises((TypeError, ValueError)):
        writer.adopt([("dead-0", *dataclasses.astuple(FULL)), row])
    assert writer.taken == 0
    writer.close()
    assert not list(tmp_path.rglob("*.parquet"))


def test_old_hashes_are_forgotten_and_what_is_stored_twice_is_read_once(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    first = writer.payload("first")
    for number in range(70_000):
        writer.payload(str(number))
    assert writer.payload("first") == first
    writer.close()
    stored = pq.read_table(tmp_path / "payloads" / "w-000000.parquet")["body"].to_pylist()
    assert stored.count("first") == 2 and stored.count("69000") == 1
    assert events.read_payloads(tmp_path, [first]) == {first: "first"}
