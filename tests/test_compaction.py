"""Recovery and merging: a crash, a reader or a second merger at any point never costs or doubles a row."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_app import events
from ray_app.compaction import Compactor, compact, is_mergeable, merge, recover
from ray_app.errors import StorageError
from tests.event_logs import (
    make_writer,
    names,
    read_numbers,
    read_rows,
    start_child,
    stream_of,
    turn,
    write_part,
)

ROOT = Path(__file__).parent.parent


def until(is_so: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits for what another process does."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.001)


def test_a_cut_stream_gives_every_batch_before_the_cut(tmp_path: Path) -> None:
    writer, ends = make_writer(tmp_path / "whole"), [0]
    for number in range(20):
        writer.append(turn(number, detail="x" * number))
        writer.flush()
        ends.append(stream_of(tmp_path / "whole").stat().st_size)
    whole = stream_of(tmp_path / "whole").read_bytes()
    writer.close()
    log = tmp_path / "cut" / "log"
    log.mkdir(parents=True)
    (tmp_path / "cut" / "payloads").mkdir()
    edges = [end + step for end in ends for step in (-1, 0, 1) if 0 <= end + step <= len(whole)]
    for cut in [*edges, *random.Random(0).choices(range(len(whole)), k=60)]:
        (log / "w-000000.arrows").write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends[1:])
        assert read_numbers(tmp_path / "cut") == list(range(complete)), cut
        report = recover(tmp_path / "cut")
        assert (report.streams, report.events) == (1, complete)
        assert report.torn_bytes == cut - (ends[complete] if complete else 0)
        assert read_numbers(tmp_path / "cut") == list(range(complete)), cut
        assert not list(log.glob("*.arrows"))
        for path in log.iterdir():
            path.unlink()


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
    with start_child(_UNTIL_KILLED, tmp_path) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(40)][-1]
        os.kill(process.pid, signal.SIGKILL)
    for step in (lambda: None, lambda: recover(tmp_path), lambda: compact(tmp_path)):
        step()
        numbers = read_numbers(tmp_path)
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > acknowledged
        keys = {row["payload_hash"] for row in read_rows(tmp_path, "payload_hash")}
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
    with start_child(_ROUNDS, tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        before, looks, sizes = 0, 0, set[int]()
        while looks < 120 or len(sizes) < 20:  # of a log that grows
            looks += 1
            rows = read_rows(tmp_path, "call_seq", "payload_hash")
            assert sorted(row["call_seq"] for row in rows) == list(range(len(rows)))
            assert len(rows) >= before
            before = len(rows)
            sizes.add(before)
            newest = {row["payload_hash"] for row in rows if row["call_seq"] > before - 20}
            assert set(events.read_payloads(tmp_path, newest)) == newest
        process.stdin.close()
        written = int(process.stdout.read())
    assert read_numbers(tmp_path) == list(range(written))
    assert len(list((tmp_path / "log").iterdir())) == len(list((tmp_path / "payloads").iterdir())) == 1


def test_doubles_that_a_crash_left_are_dropped(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.append(turn(0, payload_hash=writer.payload("{}")))
    writer.flush()
    stream = stream_of(tmp_path)
    left = stream.read_bytes()
    writer.append(turn(1))
    writer.close()
    part = next((tmp_path / "log").glob("*.parquet"))
    published = part.read_bytes()
    stream.write_bytes(left)  # died between rename and delete of a publication
    assert read_numbers(tmp_path) == [0, 1]
    compact(tmp_path)
    part.write_bytes(published)  # died between rename and delete of a compaction
    assert read_numbers(tmp_path) == [0, 1]
    stream.write_bytes(left)
    recover(tmp_path)
    compact(tmp_path)
    assert read_numbers(tmp_path) == [0, 1]
    assert len(names(tmp_path / "log")) == 1


def test_recovery_never_replaces_a_published_part_by_a_shorter_stream(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.append(turn(0))
    writer.flush()
    stream, left = stream_of(tmp_path), stream_of(tmp_path).read_bytes()
    writer.append(turn(1))
    writer.close()
    stream.write_bytes(left)
    recover(tmp_path)
    assert read_numbers(tmp_path) == [0, 1]


def test_recovery_keeps_what_a_longer_stream_has_over_its_published_part(tmp_path: Path) -> None:
    # A worker woke up and went on with a stream that a new driver was just recovering.
    writer = make_writer(tmp_path)
    writer.append(turn(0))
    writer.flush()
    stream = stream_of(tmp_path)
    shorter = stream.read_bytes()
    writer.append(turn(1))
    writer.flush()
    longer = stream.read_bytes()
    stream.write_bytes(shorter)
    recover(tmp_path)
    stream.write_bytes(longer)
    report = recover(tmp_path)
    assert (report.streams, report.events) == (1, 2)
    assert read_numbers(tmp_path) == [0, 1]
    assert not list(tmp_path.rglob("*.arrows"))


def _write_parts(run_dir: Path, count: int, start: int = 0, rows: int = 3) -> None:
    for number in range(start, start + count):
        write_part(run_dir, f"w{number}", range(rows * number, rows * (number + 1)))


def test_files_of_one_level_are_merged_and_what_was_merged_waits_for_its_like(tmp_path: Path) -> None:
    writes = 0
    for number in range(9):
        _write_parts(tmp_path, 1, number)
        before = set(names(tmp_path / "log"))
        merge(tmp_path, name="e0001", min_files=3)
        made = set(names(tmp_path / "log")) - before
        writes += sum(pq.read_metadata(tmp_path / "log" / name).num_rows for name in made)
        assert read_numbers(tmp_path) == list(range(3 * (number + 1)))
    assert [name[:18] for name in names(tmp_path / "log")] == ["compacted-e0001-L2"]
    # Each row once per level (3 and 9 files); of two levels at once the reader saw the last.
    assert 9 * 3 <= writes <= 2 * 9 * 3
    assert len(names(tmp_path / "payloads")) == 1


def test_too_few_files_and_streams_of_live_writers_are_left_alone(tmp_path: Path) -> None:
    _write_parts(tmp_path, 3)
    live = make_writer(tmp_path, "live")
    live.append(turn(9, payload_hash=live.payload("[9]")))
    live.flush()
    assert not is_mergeable(tmp_path, 4)
    assert merge(tmp_path, name="e0001", min_files=4) == 0
    assert is_mergeable(tmp_path, 3)
    assert merge(tmp_path, name="e0001", min_files=3) == 2  # one of each table
    assert names(tmp_path / "log")[1:] == ["live-000000.arrows"]
    live.append(turn(10))
    live.close()
    assert read_numbers(tmp_path) == [*range(10), 10]


def test_a_merge_drops_doubles(tmp_path: Path) -> None:
    _write_parts(tmp_path, 2)
    again = (tmp_path / "log" / "w0-000000.parquet").read_bytes()
    merge(tmp_path, name="e0001", min_files=2)
    (tmp_path / "log" / "w0-000000.parquet").write_bytes(again)  # died before it was deleted
    _write_parts(tmp_path, 1, 2)
    merge(tmp_path, name="e0001", min_files=2)
    (merged,) = (tmp_path / "log").iterdir()
    assert sorted(pq.read_table(merged)["call_seq"].to_pylist()) == list(range(9))


@pytest.mark.parametrize(("name", "min_files"), [("../x", 2), ("a/b", 2), ("", 2), ("e0001", 1)])
def test_an_unsafe_name_or_a_merge_without_end_is_refused(tmp_path: Path, name: str, min_files: int) -> None:
    with pytest.raises(ValueError, match="expected 2 at least"):
        merge(tmp_path, name=name, min_files=min_files)


@contextmanager
def _merging(run_dir: Path, name: str, min_files: int = 4) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ray_app.compaction", str(run_dir), "--name", name]
    command += ["--min-files", str(min_files)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # one that was stopped would never end


def _write_large_parts(run_dir: Path) -> list[str]:
    """Four files whose merge takes a while; returns the payloads' hashes."""
    keys: list[str] = []
    for number in range(4):
        writer = make_writer(run_dir, f"w{number}")
        keys += [writer.payload(os.urandom(1 << 19).hex()) for _ in range(8)]
        for index, key in enumerate(keys[-8:]):
            writer.append(turn(8 * number + index, payload_hash=key))
        writer.close()
    return keys


def _is_whole(run_dir: Path, keys: list[str]) -> bool:
    return read_numbers(run_dir) == list(range(32)) and set(events.read_payloads(run_dir, keys)) == set(keys)


def _leftovers(run_dir: Path) -> list[Path]:
    return list(run_dir.rglob("*.tmp"))


def test_a_merger_that_wakes_up_late_neither_loses_nor_doubles(tmp_path: Path) -> None:
    keys = _write_large_parts(tmp_path)
    with _merging(tmp_path, "old") as stale:
        until(lambda: _leftovers(tmp_path / "payloads"))  # the large ones, which take a while
        os.kill(stale.pid, signal.SIGSTOP)
        merge(tmp_path, name="new", min_files=4)
        assert _leftovers(tmp_path)  # of a process that lives
        assert _is_whole(tmp_path, keys)
        os.kill(stale.pid, signal.SIGCONT)
        assert stale.wait() == 0
    assert _is_whole(tmp_path, keys)
    compact(tmp_path)
    assert _is_whole(tmp_path, keys)
    assert len(names(tmp_path / "log")) == len(names(tmp_path / "payloads")) == 1


def test_a_merger_that_wakes_up_after_the_end_of_the_run_does_no_harm(tmp_path: Path) -> None:
    keys = _write_large_parts(tmp_path)
    with _merging(tmp_path, "old") as stale:
        until(lambda: _leftovers(tmp_path / "payloads"))  # the large ones, which take a while
        os.kill(stale.pid, signal.SIGSTOP)
        compact(tmp_path)
        os.kill(stale.pid, signal.SIGCONT)
        stale.wait()
    assert _is_whole(tmp_path, keys)
    compact(tmp_path)
    assert _is_whole(tmp_path, keys)
    assert len(names(tmp_path / "log")) == len(names(tmp_path / "payloads")) == 1


def test_a_killed_merge_loses_nothing_and_the_next_clears_what_it_left(tmp_path: Path) -> None:
    keys = _write_large_parts(tmp_path)
    for delay_s in (0.0, 0.1):
        with _merging(tmp_path, "e0001") as process:
            until(lambda: _leftovers(tmp_path) or process.poll() is not None)
            time.sleep(delay_s)
            process.kill()
        assert _is_whole(tmp_path, keys)
    merge(tmp_path, name="e0002", min_files=2)
    assert not _leftovers(tmp_path)
    assert _is_whole(tmp_path, keys)


_MERGED_MEANWHILE = """
import select
number = 0
for part in count():
    writer = EventWriter(run, f"part-{part}", flush_rows=5, flush_s=0.004, publish_s=0.0)
    for _ in range(40):
        key = writer.payload(f"[{number}]")
        writer.append(Event("turn", 1.7e9, call_seq=number, payload_hash=key))
        number += 1
    writer.close()
    if part == 0:
        print("started", flush=True)
    if select.select([sys.stdin], [], [], 0)[0]:
        break
print(number)
"""


def test_snapshots_while_two_mergers_work_at_once_never_lose_double_or_go_back(tmp_path: Path) -> None:
    def merge_on(name: str) -> None:
        while not is_over.is_set():
            merges[name] += merge(tmp_path, name=name, min_files=2)

    is_over, merges = threading.Event(), {"old": 0, "new": 0}
    threads = [threading.Thread(target=merge_on, args=(name,)) for name in merges]
    with start_child(_MERGED_MEANWHILE, tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        for thread in threads:
            thread.start()
        before = 0
        for _ in range(30):
            seen = read_numbers(tmp_path)
            assert seen == list(range(len(seen)))
            assert len(seen) >= before
            before = len(seen)
        process.stdin.close()
        written = int(process.stdout.read())
    is_over.set()
    for thread in threads:
        thread.join()
    assert min(merges.values()) > 0
    compact(tmp_path)
    assert read_numbers(tmp_path) == list(range(written))


def test_a_compactor_merges_in_a_process_of_its_own(tmp_path: Path) -> None:
    _write_parts(tmp_path, 4)
    compactor = Compactor.start(tmp_path, "e0003", every_s=0.01, min_files=4)
    until(lambda: len(names(tmp_path / "log")) == 1 and not _leftovers(tmp_path))
    compactor.stop()
    compactor.stop()
    assert [name[:18] for name in names(tmp_path / "log")] == ["compacted-e0003-L1"]
    assert read_numbers(tmp_path) == list(range(12))


def test_a_compactor_that_is_stopped_ends_its_merge_and_leaves_nothing(tmp_path: Path) -> None:
    keys = _write_large_parts(tmp_path)
    compactor = Compactor.start(tmp_path, "e0003", every_s=0.01, min_files=4)
    until(lambda: _leftovers(tmp_path))
    compactor.stop()
    assert not _leftovers(tmp_path)
    assert len(names(tmp_path / "log")) == 4  # payloads go first, and were not done
    assert _is_whole(tmp_path, keys)


def test_a_merge_that_fails_is_said_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write_parts(tmp_path, 4)
    bad = tmp_path / "payloads" / "w1-000000.parquet"
    good = bad.read_bytes()
    bad.write_bytes(b"PAR1 nonsense PAR1")
    with caplog.at_level(logging.WARNING):
        compactor = Compactor.start(tmp_path, "e0003", every_s=0.01, min_files=4)
        until(lambda: len(caplog.records) >= 2)
        bad.write_bytes(good)
        until(lambda: not is_mergeable(tmp_path, 4))
        compactor.stop()
    assert "merging the event log failed (exit 1): cannot merge" in caplog.records[0].message
    assert read_numbers(tmp_path) == list(range(12))


def test_the_command_line_compacts_an_ended_run(tmp_path: Path) -> None:
    _write_parts(tmp_path, 2)
    command = [sys.executable, "-m", "ray_app.compaction", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert len(names(tmp_path / "log")) == 1
    assert read_numbers(tmp_path) == list(range(6))
    missing = subprocess.run(
        [*command[:-1], str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    with pytest.raises(StorageError, match="cannot list"):
        compact(tmp_path / "x")
