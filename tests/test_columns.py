"""Whole columns of the event log: the rows that the reader gives, whatever state the files are in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_app import events, parquet_file
from ray_app.columns import raw
from ray_app.compaction import compact
from ray_app.errors import RunDirError, StorageError
from tests.event_logs import FULL, make_writer, read_rows, start_child, stream_of, turn, write_file

NAMES = events.EVENT_SCHEMA.names


def rows_of(table: pa.Table) -> Counter[str]:
    return Counter(map(repr, table.to_pylist()))


def assert_same(run: Path, names: list[str] = NAMES) -> None:
    expected = Counter(repr(row) for row in read_rows(run, *names))
    assert rows_of(events.columns(run, names)) == expected
    assert events.columns(run, names).column_names == names


def messy(run: Path) -> None:
    """Published files, a torn stream, rows that stand in two files, a file of an older schema."""
    first = make_writer(run, "a")
    for number in range(40):
        first.append(turn(number, task_id=f"t{number % 3}", tool="search" if number % 2 else ""))
    first.append(FULL)
    first.close()
    second = make_writer(run, "b")
    second.append(turn(1, model="m"))
    second.flush()
    kept = stream_of(run).read_bytes()
    second.append(turn(2, model="n"))
    second.flush()
    torn = stream_of(run).read_bytes()[:-9]
    second.close()
    (run / "log" / "c-000000.arrows").write_bytes(torn)  # doubles of b's rows
    (run / "log" / "d-000000.arrows").write_bytes(kept[:50])  # cut within its first message
    schema = pa.schema([("event_id", pa.string()), ("kind", pa.string()), ("future", pa.int64())])
    write_file(run / "log" / "old-0.parquet", {"event_id": ["z-0"], "kind": ["turn"], "future": [1]}, schema)


def test_columns_are_what_the_reader_gives_before_and_after_compaction(tmp_path: Path) -> None:
    messy(tmp_path)
    assert_same(tmp_path)
    assert_same(tmp_path, ["tool", "duration_s"])
    before = rows_of(events.columns(tmp_path, NAMES))
    compact(tmp_path)
    assert len(list((tmp_path / "log").iterdir())) == 1
    assert_same(tmp_path)
    assert_same(tmp_path, ["tool", "duration_s"])
    assert rows_of(events.columns(tmp_path, NAMES)) == before
    assert before.total() == 40 + 1 + 2 + 1


def test_words_are_codes_and_ids_are_plain(tmp_path: Path) -> None:
    messy(tmp_path)
    table = events.columns(tmp_path, ["event_id", "tool", "payload_hash"], plain=["payload_hash"])
    kinds = [pa.types.is_dictionary(field.type) for field in table.schema]
    assert kinds == [False, True, False]


def test_values_that_hardly_repeat_are_written_as_they_are_and_words_as_codes(tmp_path: Path) -> None:
    known = {*NAMES, *events.PAYLOAD_SCHEMA.names}
    assert known >= parquet_file._UNLIKE | parquet_file._PACKED
    writer = make_writer(tmp_path, "a")
    for number in range(3000):
        writer.append(turn(number, tool="search", duration_s=1 / (number + 1)))
    writer.close()
    (path,) = (tmp_path / "log").glob("*.parquet")
    (group,) = pq.read_metadata(path).to_dict()["row_groups"]
    chunks = {chunk["path_in_schema"]: chunk for chunk in group["columns"]}
    coded = {name for name, chunk in chunks.items() if "RLE_DICTIONARY" in chunk["encodings"]}
    assert {"tool", "model", "task_id"} <= coded
    assert not coded & parquet_file._UNLIKE
    assert chunks["duration_s"]["total_compressed_size"] < 8.1 * 3000
    assert chunks["event_id"]["total_compressed_size"] < 3 * 3000  # zstd sees what ids share
    assert_same(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.float64(), [1.5, None, -2.0, 4.0]),
        (pa.int64(), [1, 2, None, -4]),
        (pa.int32(), [1, 2, 3, 4]),
        (pa.bool_(), [True, None, False, True] * 5),
        (pa.bool_(), [False, True]),
        (pa.timestamp("us", tz="UTC"), [7, None, 9]),
        (pa.float64(), []),
    ],
)
@pytest.mark.parametrize("start", [0, 1])
def test_values_are_read_from_memory_as_they_are(kind: pa.DataType, values: list[Any], start: int) -> None:
    found = raw(pa.array(values, kind)[start:])
    unsaid = [False] * len(found.values) if found.unsaid is None else found.unsaid.tolist()
    told = [None if no else value for value, no in zip(found.values.tolist(), unsaid, strict=True)]
    assert told == values[start:]


def test_an_empty_log_has_no_rows_and_no_log_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="expected a run directory"):
        events.columns(tmp_path, NAMES)
    (tmp_path / "log").mkdir()
    assert events.columns(tmp_path, NAMES).num_rows == 0


def test_a_file_that_is_none_of_this_log_is_named(tmp_path: Path) -> None:
    write_file(tmp_path / "log" / "x-0.parquet", {"a": [1]}, pa.schema([("a", pa.int64())]))
    with pytest.raises(StorageError, match=r"x-0.parquet: it has no column 'event_id'"):
        events.columns(tmp_path, ["kind"])
    (tmp_path / "log" / "x-0.parquet").write_text("no parquet")
    with pytest.raises(StorageError, match=r"cannot read .*x-0.parquet"):
        events.columns(tmp_path, ["kind"])


def test_no_row_is_lost_or_doubled_while_files_are_published_and_merged(tmp_path: Path) -> None:
    script = (
        "for part in range(60):\n"
        "    writer = EventWriter(run, f'w{part}')\n"
        "    for number in range(20):\n"
        "        writer.append(Event('turn', 1.7e9, call_seq=20 * part + number))\n"
        "    writer.flush()\n"
        "    print(20 * (part + 1), flush=True)\n"
        "    writer.close()\n"
        "    merge(run, name='m', min_files=3)\n"
        "compact(run)\n"
        "print('end', flush=True)\n"
    )
    seen = 0
    with start_child(script, tmp_path) as child:
        assert child.stdout is not None
        while (line := child.stdout.readline().strip()) != "end":
            assert line, "the child died"
            numbers = events.columns(tmp_path, ["call_seq"])["call_seq"].to_pylist()
            assert sorted(numbers) == list(range(len(numbers)))
            assert len(numbers) >= max(int(line), seen)
            seen = len(numbers)
    assert events.columns(tmp_path, ["call_seq"]).num_rows == 60 * 20
