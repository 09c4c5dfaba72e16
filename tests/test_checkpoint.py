"""The checkpoint actor's own rules, without Ray: what it takes, refuses, keeps and writes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_app import events, lease
from ray_app.checkpoint import Checkpoint, Mark
from ray_app.event_writer import EventWriter
from ray_app.options import Options
from ray_app.records import Event

KEY = ("rollout", 0)


class Tap:
    """What a log writer hands on: the rows and bodies that it takes."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.bodies: list[tuple[str, str, str]] = []

    def row(self, row: tuple[Any, ...]) -> None:
        self.rows.append(row)

    def body(self, body: tuple[str, str, str]) -> None:
        self.bodies.append(body)

    def blob(self) -> bytes:
        data = pickle.dumps((self.bodies, self.rows))
        self.rows, self.bodies = [], []
        return data


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    held = lease.take(tmp_path / "run")
    yield tmp_path / "run"
    held.release()


def checkpoint(run_dir: Path, epoch: int = 1) -> Checkpoint:
    made = Checkpoint(Options(run_dir, "run", epoch, 4, 2, 3), "unnamed")
    made.open(epoch, {})
    return made


def mark(attempt: int, call_seq: int, event_id: str = "") -> Mark:
    return (*KEY, attempt, call_seq, event_id or f"event-{attempt}-{call_seq}")


def is_taken(store: Checkpoint, *marks: Mark, epoch: int = 1) -> bool:
    return store.take(epoch, "w", 0, 1, marks, b"").refused == ()


def test_a_call_is_taken_once_and_only_from_the_newest_attempt(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    assert is_taken(store, mark(1, 0)) and is_taken(store, mark(1, 1))
    assert is_taken(store, mark(1, 1)), "the same commit again, as after a lost answer"
    assert not is_taken(store, mark(1, 1, "another"))
    assert not is_taken(store, mark(1, 0, "another"))
    assert is_taken(store, mark(2, 0)), "a newer attempt may begin anywhere"
    assert not is_taken(store, mark(1, 2))
    assert store.take(1, "w", 0, 1, [mark(1, 2), mark(1, 3)], b"").refused == ((KEY, 1),)


def test_an_attempt_that_is_over_commits_no_call_and_its_result_counts(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    assert is_taken(store, mark(1, 0))
    store.open(1, {KEY: 1})
    assert not is_taken(store, mark(1, 1))
    assert store.finish(1, {KEY: 1}).refused == ()


def test_an_attempt_may_ask_whether_it_is_still_wanted(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    question = (*KEY, 1, -1, "")
    assert is_taken(store, question) and store.holds()["live"] == 0, "a question leaves nothing"
    assert is_taken(store, mark(1, 0)) and is_taken(store, question)
    store.open(1, {KEY: 1})
    assert not is_taken(store, question) and is_taken(store, (*KEY, 2, -1, ""))


def test_a_result_of_a_replaced_attempt_is_refused(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    assert is_taken(store, mark(2, 0))
    assert store.finish(1, {KEY: 1}).refused == ((KEY, 1),)
    assert store.finish(1, {KEY: 2}).refused == ()


def test_finished_tasks_leave(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    for number in range(50):
        store.take(1, "w", 0, number, [(f"task-{number}", 0, 1, 0, f"event-{number}")], b"")
    assert store.holds()["live"] == 50
    store.finish(1, {(f"task-{number}", 0): 1 for number in range(50)})
    assert store.holds()["live"] == 0


def test_a_finished_task_that_was_cut_off_once_stays_closed(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    store.open(1, {KEY: 1})
    assert is_taken(store, mark(2, 0))
    store.finish(1, {KEY: 2})
    assert not is_taken(store, mark(1, 1)) and not is_taken(store, (*KEY, 1, -1, ""))


def test_an_older_epoch_is_told_of_the_newer_one_and_changes_nothing(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    assert store.open(3, {}).epoch == 3
    ack = store.take(1, "w", 0, 1, [mark(1, 0)], b"late")
    assert (ack.epoch, store.holds()) == (3, {"live": 0, "groups": 0, "bytes": 0})
    assert store.finish(1, {KEY: 9}).epoch == 3
    assert store.open(2, {KEY: 9}).epoch == 3
    assert is_taken(store, mark(1, 0), epoch=3)
    assert not store.close(1)


def test_a_restarted_actor_knows_the_epoch_from_storage(run_dir: Path) -> None:
    (run_dir / "lease" / "epoch-000007.json").write_text("{}")
    store = Checkpoint(Options(run_dir, "run", 1, 4, 2, 3), "unnamed")
    assert store.take(1, "w", 0, 1, [mark(1, 0)], b"late").epoch == 7


def test_what_storage_has_leaves(run_dir: Path) -> None:
    store = checkpoint(run_dir)
    for last in (3, 5, 9):
        store.take(1, "w", 0, last, [], b"1234")
    assert store.holds() == {"live": 0, "groups": 3, "bytes": 12}
    store.take(1, "w", 4, 9, [], b"")
    assert store.holds()["groups"] == 2, "a group of which storage lacks a row stays"
    store.take(1, "other", 9, 9, [], b"")
    assert store.holds()["groups"] == 2, "each writer counts its own rows"
    store.take(1, "w", 9, 9, [], b"")
    assert store.holds()["groups"] == 0


def test_a_tail_is_written_as_its_worker_would_have_and_doubles_do_not_show(run_dir: Path) -> None:
    store, tap = checkpoint(run_dir), Tap()
    worker = EventWriter(run_dir, "e0001-w001-x", flush_s=3600, tap=tap)
    body = worker.payload("the reply")
    ids = [worker.append(Event("model_call", 1.0, call_seq=n, payload_hash=body)) for n in range(3)]
    store.take(1, "e0001-w001-x", 0, 3, [], tap.blob())
    assert _ids(run_dir) == []
    assert store.drain("e0001-w002-") == 0, "another worker's"
    assert store.drain("e0001-w001-") == 1
    assert _ids(run_dir) == ids and events.read_payloads(run_dir, {body}) == {body: "the reply"}
    assert store.holds()["groups"] == 0 and store.drain() == 0
    worker.close()  # it lived after all, and writes the same rows
    assert _ids(run_dir) == ids


def test_an_old_tail_is_written_by_itself(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_app.checkpoint.TAKEN_OVER_S", 0.0)
    monkeypatch.setattr("ray_app.checkpoint.TEND_S", 0.01)
    store, tap = checkpoint(run_dir), Tap()
    worker = EventWriter(run_dir, "e0001-w001-x", flush_s=3600, tap=tap)
    event_id = worker.append(Event("model_call", 1.0, call_seq=0))
    store.take(1, "e0001-w001-x", 0, 1, [], tap.blob())
    while store.holds()["groups"]:  # the suite's own time limit ends this if it never comes
        pass
    assert _ids(run_dir) == [event_id]
    worker.close()


def _ids(run_dir: Path) -> list[str]:
    found = [row["event_id"] for batch in events.read(run_dir, ["event_id"]) for row in batch.to_pylist()]
    return sorted(found)
