"""What the log has of tasks that did not end: read for a resume and for the next attempt.

Reading means a look over the whole log, so one read serves all who ask at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_app import events
from ray_app.errors import StorageError
from ray_app.journal import Note, Record, RecordedCall, named_texts
from ray_app.planning import Key

# `tool_call`: of an environment; as a note, without a place among the calls, it is none.
CALL_KINDS = ("model_call", "retrieval", "code", "tool_call")
RETRY_S = 0.5
NOTE_KINDS = ("turn", "tool_call", "verdict")
_COLUMNS = (
    *("kind", "status", "rollout_key", "trial", "attempt", "epoch", "turn", "tool"),
    *("call_seq", "request_hash", "payload_hash", "role", "alias", "cost_usd"),
)


class Recorder:
    """Gives the record of each task that is asked for; reads the log in a thread, one read at a time."""

    def __init__(self, run_dir: Path, patience_s: float = 0.0) -> None:
        self._run_dir, self._patience_s = run_dir, patience_s
        self._touched: set[Key] | None = None
        self._wanted: dict[Key, asyncio.Future[Record]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def before(self, key: Key) -> Record:
        """What earlier commands left of this task; most have nothing, which costs no read."""
        if self._touched is None:
            self._touched = touched(self._run_dir)
        return await self.now(key) if key in self._touched else Record()

    async def now(self, key: Key) -> Record:
        """What the log has of this task at this moment."""
        wanted = self._wanted.setdefault(key, asyncio.get_running_loop().create_future())
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return await wanted

    async def _read(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, {}
            try:
                found = await self._records(wanted.keys())
            except Exception as error:
                for future in wanted.values():
                    if not future.done():
                        future.set_exception(error)
                continue
            for key, future in wanted.items():
                if not future.done():
                    future.set_result(found.get(key, Record()))

    async def _records(self, keys: Collection[Key]) -> dict[Key, Record]:
        """Storage that cannot be read for a while is waited for."""
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                return await asyncio.to_thread(_records_alone, self._run_dir, keys)
            except StorageError:
                if time.monotonic() >= give_up:
                    raise
                await asyncio.sleep(RETRY_S)


def _records_alone(run_dir: Path, keys: Collection[Key]) -> dict[Key, Record]:
    """`records`, and nothing of the log stays behind in this process."""
    found = records(run_dir, keys)
    events.let_go()
    return found


def touched(run_dir: Path) -> set[Key]:
    """The tasks of which the log has calls."""
    if not (run_dir / "log").exists():
        return set()
    return {
        (row["rollout_key"], row["trial"])
        for batch in events.read(run_dir, ["rollout_key", "trial"], where={"kind": CALL_KINDS})
        for row in batch.to_pylist()
    }


def records(run_dir: Path, keys: Collection[Key]) -> dict[Key, Record]:
    """The record of each of the (rollout key, trial) pairs that has one."""
    wanted = set(keys)
    where = {"kind": (*CALL_KINDS, *NOTE_KINDS), "rollout_key": {rollout for rollout, _ in wanted}}
    rows = [
        row
        for batch in events.read(run_dir, _COLUMNS, where=where)
        for row in batch.to_pylist()
        if (row["rollout_key"], row["trial"]) in wanted and not is_second_opinion(row)
    ]
    calls = [row for row in rows if is_call(row) and row["status"] == "ok"]
    # Where two attempts made the same call, what follows it in the log followed the later one's output.
    calls.sort(key=lambda row: (row["call_seq"], row["epoch"], row["attempt"]))
    found: dict[Key, list[RecordedCall]] = {}
    for row, body, texts in with_bodies(run_dir, calls):
        if body is not None:  # else its payload was lost with its process: the call is made again
            call = RecordedCall(row["call_seq"], row["request_hash"], body, texts)
            found.setdefault((row["rollout_key"], row["trial"]), []).append(call)
    notes: dict[Key, set[Note]] = {}
    for row in rows:
        if row["kind"] in NOTE_KINDS:
            note = (row["kind"], row["turn"], row["tool"])
            notes.setdefault((row["rollout_key"], row["trial"]), set()).add(note)
    paid: dict[Key, float] = {}
    for row in rows:
        if is_call(row):
            key = row["rollout_key"], row["trial"]
            paid[key] = paid.get(key, 0.0) + (row["cost_usd"] or 0.0)
    return {key: Record(tuple(found.get(key, ())), frozenset(notes.get(key, ())), paid[key]) for key in paid}


def is_call(row: Mapping[str, Any]) -> bool:
    """Whether the row is of a call, and not a note about several."""
    return row["kind"] in CALL_KINDS and row["call_seq"] >= 0


def is_second_opinion(row: Mapping[str, Any]) -> bool:
    return row["role"] == "judge" and bool(row["alias"])


def with_bodies(
    run_dir: Path, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], str | None, dict[str, str]]]:
    """Each row of a call with its payload and the texts beside it; None where one of them is not stored."""
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in rows} - {"", None})
    named = {row["payload_hash"]: _texts(row, bodies) for row in rows if row["kind"] == "retrieval"}
    texts = events.read_payloads(run_dir, {text for each in named.values() for text in each})
    for row in rows:
        own = named.get(row["payload_hash"], set())
        body = bodies.get(row["payload_hash"]) if own <= texts.keys() else None
        yield row, body, {name: texts[name] for name in own if name in texts}


def _texts(row: Mapping[str, Any], bodies: Mapping[str, str]) -> set[str]:
    body = bodies.get(row["payload_hash"])
    return set() if body is None else named_texts(body)
