"""The reader: each row once, of every version, and the result that counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_app import events
from ray_app.compaction import compact, merge, recover
from ray_app.errors import RunDirError, StorageError
from ray_app.parquet_file import publish
from ray_app.records import Event
from ray_app.table_files import PARQUET, STREAM
from tests.event_logs import FULL, make_writer, names, read_numbers, read_rows, result, turn, write_file

OPTIONAL = {
    *(
        "error_kind",
        "error_type",
        "queue_s",
        "prefill_s",
        "decode_s",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "reasoning_tokens",
    ),
    *("cost_usd", "local_hits", "web_hits", "exit_status", "outcome", "is_correct", "confidence"),
    *("web_calls", "context_tokens", "context_cut", "is_estimated"),
}


def test_columns_that_are_always_filled_stay_the_same_set() -> None:
    # A column added later must be nullable, or files of this version would no longer fit the schema.
    required = {field.name for field in events.EVENT_SCHEMA if not field.nullable}
    assert required == {field.name for field in dataclasses.fields(Event)} - OPTIONAL | {
        "schema_version",
        "event_id",
    }


def test_columns_are_picked_in_the_order_asked_for(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.append(FULL)
    writer.close()
    assert events.read(tmp_path, ["tool", "kind"]).read_all().to_pydict() == {
        "tool": ["search"],
        "kind": ["model_call"],
    }
    with pytest.raises(ValueError, match="nonesuch"):
        events.read(tmp_path, ["nonesuch"])


def test_a_later_commit_supersedes_an_owed_result(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.append(result("owed", t_start=1_700_000_009.0))  # a clock set back must not revive it
    writer.append(result("ok"))
    writer.append(result("ok", trial=1))
    writer.append(turn(0, rollout_key="r"))
    writer.close()
    counted = events.results(tmp_path).select(["trial", "outcome"]).to_pylist()
    assert counted == [{"trial": 0, "outcome": "ok"}, {"trial": 1, "outcome": "ok"}]


def test_the_highest_epoch_wins_over_a_driver_that_woke_up(tmp_path: Path) -> None:
    new, old = make_writer(tmp_path, "a"), make_writer(tmp_path, "b")
    new.append(result("ok", epoch=2))
    old.append(result("failed", epoch=1, t_start=1_700_000_500.0))
    for writer in (new, old):
        writer.close()
    assert events.results(tmp_path)["outcome"].to_pylist() == ["ok"]


def test_within_an_epoch_the_later_writer_wins_over_more_rows_of_an_earlier_one(tmp_path: Path) -> None:
    first, second = make_writer(tmp_path, "z"), make_writer(tmp_path, "a")
    first.append(turn(0))
    first.append(result("owed"))
    second.append(result("ok", t_start=1_700_000_001.0))
    for writer in (first, second):
        writer.close()
    assert events.results(tmp_path)["outcome"].to_pylist() == ["ok"]


@pytest.mark.parametrize("task_id", ["../../etc/x", "a/b", "o'clock\"; drop table events", "\x00", "é\ud800"])
def test_ids_from_data_stay_data(tmp_path: Path, task_id: str) -> None:
    run_dir = tmp_path / "run"
    writer = make_writer(run_dir)
    writer.append(result("ok", task_id=task_id, rollout_key=task_id))
    writer.close()
    stored = task_id.encode("utf-8", "backslashreplace").decode()
    assert events.results(run_dir)["task_id"].to_pylist() == [stored]
    with events.connect(run_dir) as connection:
        query = "select count(*) from events where task_id = ?"
        assert connection.execute(query, [stored]).fetchall() == [(1,)]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (run_dir / "log").iterdir()] == ["w-000000.parquet"]


# Columns of the first version; a file of it lacks what was added later.
FIRST = (
    *("schema_version", "event_id", "kind", "t_start", "duration_s", "run_id", "epoch", "rollout_key"),
    *("judge_key", "task_id", "trial", "attempt", "turn", "call_seq", "status", "outcome", "payload_hash"),
)


def _of_version(version: int, event_id: str, **more: Any) -> dict[str, Any]:
    """The columns of one row, a result, as a program of `version` wrote it; `more` are its later ones."""
    event = dataclasses.replace(FULL, kind="result", outcome="ok", rollout_key=event_id, payload_hash="old")
    values = dataclasses.asdict(event) | {"schema_version": version, "event_id": event_id}
    return {name: [values[name]] for name in FIRST if name != "t_start"} | {
        "t_start": [datetime.fromtimestamp(event.t_start, UTC)],
        **{name: [value] for name, value in more.items()},
    }


def _schema(columns: Iterable[str], **unknown: pa.DataType) -> pa.Schema:
    """With nullability as that version had it; `unknown` are columns that only newer versions know."""
    known = [events.EVENT_SCHEMA.field(name) for name in columns if name not in unknown]
    return pa.schema([*known, *unknown.items()], metadata={"canary": "c-1"})


def _write_older_and_newer(run_dir: Path) -> None:
    """Files of versions 1 and 99 in both forms, beside those of a writer of today."""
    for suffix in (STREAM, PARQUET):
        form = suffix[1:]
        old = _of_version(1, f"old-{form}-0")
        write_file(run_dir / "log" / f"old-{form}-000000{suffix}", old, _schema(old))
        new = _of_version(99, f"new-{form}-0", confidence=0.5, novel=form)
        write_file(run_dir / "log" / f"new-{form}-000000{suffix}", new, _schema(new, novel=pa.string()))
    bodies = pa.schema([events.PAYLOAD_SCHEMA.field("hash"), events.PAYLOAD_SCHEMA.field("body")])
    write_file(
        run_dir / "payloads" / "old-000000.arrows", {"hash": ["old"], "body": ["[1]"]}, bodies
    )  # before `media`
    writer = make_writer(run_dir)
    writer.append(dataclasses.replace(FULL, kind="result", rollout_key="w-0"))
    writer.flush()


def test_files_of_older_and_newer_versions_are_read_with_those_of_today(tmp_path: Path) -> None:
    _write_older_and_newer(tmp_path)
    ids = {"old-arrows-0", "old-parquet-0", "new-arrows-0", "new-parquet-0", "w-0"}
    for step in (lambda: None, lambda: recover(tmp_path), lambda: compact(tmp_path)):
        step()
        rows = {row["event_id"]: row for row in read_rows(tmp_path)}
        assert rows.keys() == ids
        assert {row["schema_version"] for row in rows.values()} == {1, 99, events.SCHEMA_VERSION}
        for form in ("arrows", "parquet"):
            old, new = rows[f"old-{form}-0"], rows[f"new-{form}-0"]
            assert (old["trial"], old["confidence"], old["worker"]) == (FULL.trial, None, None)
            assert old["t_start"] == datetime.fromtimestamp(FULL.t_start, UTC)
            assert (new["trial"], new["confidence"]) == (FULL.trial, 0.5)
            assert "novel" not in new
        assert rows["w-0"]["confidence"] == FULL.confidence
        counted = events.results(tmp_path).to_pylist()
        assert {row["rollout_key"] for row in counted} == ids
        assert events.read_payloads(tmp_path, ["old"]) == {"old": "[1]"}
        with events.connect(tmp_path) as connection:
            query = (
                "select count(*), count(confidence), count(body), max(media) from events left join payloads"
            )
            found = connection.execute(f"{query} on hash = payload_hash").fetchall()
            assert found == [(5, 3, 4, None)]
            assert connection.execute("select count(*) from results").fetchall() == [(5,)]
    merged = pq.read_table(next((tmp_path / "log").iterdir()))
    assert sorted(merged["novel"].to_pylist(), key=str) == [None, None, None, "arrows", "parquet"]
    assert merged.schema.metadata[b"canary"] == b"c-1"


def test_a_merge_while_writers_live_keeps_what_only_newer_versions_know(tmp_path: Path) -> None:
    _write_older_and_newer(tmp_path)
    assert merge(tmp_path, name="e0001", min_files=2) == 1
    found = names(tmp_path / "log")
    assert [name for name in found if name.endswith(".arrows")] == [
        "new-arrows-000000.arrows",
        "old-arrows-000000.arrows",
        "w-000000.arrows",
    ]
    merged = pq.read_table(tmp_path / "log" / found[0])
    assert sorted(merged["novel"].to_pylist(), key=str) == [None, "parquet"]
    assert len(read_rows(tmp_path)) == 5


def test_a_row_of_a_version_without_epochs_gives_way_to_one_with(tmp_path: Path) -> None:
    old = _of_version(1, "old-0")
    del old["epoch"], old["t_start"]
    write_file(tmp_path / "log" / "old-000000.parquet", old, _schema(old))
    assert events.results(tmp_path)["event_id"].to_pylist() == ["old-0"]
    writer = make_writer(tmp_path)
    writer.append(result("owed", epoch=1, rollout_key="old-0", trial=FULL.trial))
    writer.close()
    assert events.results(tmp_path)["event_id"].to_pylist() == ["w-0"]


def test_a_directory_without_a_log_is_the_users_mistake(tmp_path: Path) -> None:
    for call in (events.read, events.results, events.connect):
        with pytest.raises(RunDirError, match="no event log at"):
            call(tmp_path / "nowhere")


def test_an_unreadable_parquet_file_is_named(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.append(turn(0))
    writer.close()
    (tmp_path / "log" / "w-000000.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(StorageError, match=r"w-000000\.parquet"):
        read_numbers(tmp_path)


def test_sql_sees_new_rows_while_the_writer_works(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    with events.connect(tmp_path) as connection:
        for number in range(3):
            key = writer.payload(f"[{number}]")
            writer.append(turn(number, payload_hash=key))
            writer.append(result("ok" if number else "owed"))
            writer.flush()
            joined = "events left join payloads on hash = payload_hash"
            counted = connection.execute(
                f"select count(*), count(body), max(t_start) from {joined}"
            ).fetchone()
            assert counted == (2 * number + 2, number + 1, datetime(2023, 11, 14, 22, 13, 20 + number))
            outcome = connection.execute("select outcome from results").fetchall()
            assert outcome == [("ok" if number else "owed",)]
    writer.close()


def test_rows_are_picked_by_the_values_of_columns(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for number in range(6):
        kind, status = ("code", "turn")[number % 2], ("ok", "error")[number // 3]
        writer.append(turn(number, kind=kind, status=status, rollout_key=f"r{number}"))
        if number == 2:
            writer.flush()
    columns = {"schema_version": [1], "event_id": ["old-0"], "call_seq": [9]}  # without a kind
    write_file(tmp_path / "log" / "old-000000.parquet", columns, _schema(columns))
    everything = {f"r{number}" for number in range(1000)}
    for step in (writer.flush, writer.close, lambda: compact(tmp_path)):
        step()

        def picked(**where: Any) -> list[int]:
            found = events.read(tmp_path, ["call_seq"], where=where).read_all()
            return sorted(found["call_seq"].to_pylist())

        assert picked(kind={"code"}) == [0, 2, 4]
        assert picked(kind=["code", "turn"], status={"ok"}) == [0, 1, 2]
        assert picked(kind={"code"}, rollout_key=everything) == [0, 2, 4]
        assert picked(call_seq={5, 9}) == [5, 9]
        assert picked(kind=()) == []
    with pytest.raises(ValueError, match="novel"):
        events.read(tmp_path, where={"novel": {1}})


def test_a_writer_that_goes_on_while_others_are_relisted_leaves_no_hole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for writer_id in ("a", "b", "c"):
        writer = make_writer(tmp_path, writer_id, publish_s=3600.0)
        writer.append(turn(0))
        writer.flush()
    first = log / "a-000000.arrows"
    row = {"schema_version": [1], "event_id": ["a-1"], "call_seq": [1]}
    batches = iter(events.read(tmp_path, ["event_id"]))
    seen = [next(batches)["event_id"][0].as_py(), next(batches)["event_id"][0].as_py()]
    assert seen == ["a-0", "b-0"]
    # `a` writes on, ends its part, begins the next; `c` is published before it was read.
    write_file(tmp_path / "more" / first.name, row, _schema(row))
    (tmp_path / "more" / first.name).rename(first)
    row["event_id"] = ["a-2"]
    write_file(log / "a-000001.arrows", row, _schema(row))
    publish(log / "c-000000.arrows")
    seen += [event_id for batch in batches for event_id in batch["event_id"].to_pylist()]
    assert sorted(seen) == ["a-0", "a-1", "a-2", "b-0", "c-0"]
