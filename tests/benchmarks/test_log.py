"""The measurements of the log find what they look for, and the log keeps what they ask in a short form."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import log
from benchmarks.figures import Figure
from tests.event_logs import write_part


def test_a_batch_that_does_not_come_back_is_counted(tmp_path: Path) -> None:
    whole = log.write_whole(tmp_path, "log")
    first, second, third = whole.keys
    assert whole.lost(whole.ends[1], first | second) == 0
    assert whole.lost(whole.ends[1], first) == 1
    assert whole.lost(whole.ends[1] - 1, first) == 0
    assert whole.lost(whole.ends[2], frozenset()) == 3
    with pytest.raises(RuntimeError, match="rows that were not complete"):
        whole.lost(whole.ends[1], first | second | third)


@pytest.mark.parametrize("table", log.TABLES)
def test_a_cut_stream_gives_back_each_batch_before_the_cut(tmp_path: Path, table: log.Table) -> None:
    whole = log.write_whole(tmp_path, table)
    edges = {end + step for end in whole.ends for step in (-1, 0, 1) if end + step <= len(whole.data)}
    told = log.cut_at(whole, sorted({0, *edges, *range(1, len(whole.data), 97)}))
    assert told["cuts"] > 20
    assert (told["read"], told["recovered"]) == (0, 0)


def test_a_snapshot_that_loses_or_goes_back_is_seen(tmp_path: Path) -> None:
    flushed = [2, 0, 0]
    for index in range(2):
        write_part(tmp_path, f"w{index}", range(2))
    reader = log.Reader(tmp_path, flushed)
    assert reader.look() == set()
    flushed[0] = 3
    assert reader.look() == {"lost"}  # fewer than were flushed
    flushed[0] = 0
    part = tmp_path / "log" / "w1-000000.parquet"
    rows = pq.read_table(part)
    pq.write_table(rows.slice(1), part)
    assert reader.look() == {"lost", "back"}  # a hole
    part.unlink()
    assert reader.look() == {"back"}
    (tmp_path / "payloads" / "w0-000000.parquet").unlink()
    (tmp_path / "payloads" / "w1-000000.parquet").unlink()
    assert reader.look() == {"lost"}  # bodies


@pytest.mark.long
def test_readers_writers_and_mergers_at_once(tmp_path: Path) -> None:
    told = log.snapshot_round(tmp_path, 60)
    assert told["wrong"] == 0
    assert told["snapshots"] == told["with streams"] == 60
    assert told["rows"] > 20
    assert told["merges"] > 0


def test_a_figure_that_must_be_nothing_misses_with_one() -> None:
    assert Figure("lost", 0, "==", 0).is_reached
    assert not Figure("lost", 1, "==", 0).is_reached
