"""A recorded run as something to replay: each counted result with all of its calls.

A task's record is what led to its counted result: the calls of that attempt and of earlier ones, those
that failed too. Tasks without a result, and adopted results, which have no calls, cannot be replayed.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ray_app import events, object_store
from ray_app.chat import ChatRequest
from ray_app.config import BaseRun, differing_keys
from ray_app.errors import InfrastructureError, RunDirError
from ray_app.journal import End, Record, RecordedCall, RecordedError, call_label
from ray_app.planning import Key
from ray_app.recorded import CALL_KINDS, is_call, is_second_opinion, with_bodies
from ray_app.records import ChatReply, ExecutionResult, Retrieval, Task, digest
from ray_app.rundir import LATE_KEYS, code_digest, locate

# Of an attempt that adopts a result of another system.
ADOPTED_ATTEMPT = 0
# A limit by time is told by its key in the message; a replay has no time.
WALL_LIMIT = "limits.wall_s"
# Of a replay's identity: what makes it another one although its config is equal.
REPLAY_KEYS = frozenset({"replay_of", "code_digest"})
# Tasks whose records are read at once: each read looks over the whole log.
GROUP = 128
COLUMNS = (
    *("kind", "status", "rollout_key", "trial", "attempt", "epoch", "turn", "call_seq", "t_start"),
    *("role", "tool", "alias", "request_hash", "payload_hash"),
    *("error_kind", "error_type", "error", "is_replayed"),
)
Row = Mapping[str, Any]
Run = TypeVar("Run", bound=BaseRun)


@dataclass(frozen=True)
class Recording:
    """A run that is replayed, and the counted results in it that can be."""

    run_dir: Path
    results: Mapping[Key, Row]

    @classmethod
    def of(cls, run_dir: Path) -> Recording:
        """Raises RunDirError where there is no run, or none of its results can be replayed."""
        if not (run_dir / "config.yaml").is_file() or not (run_dir / "log").is_dir():
            raise RunDirError(f"{run_dir}: no config.yaml and log/ there; expected the directory of a run")
        found = cls(run_dir.resolve(), counted(run_dir))
        if not found.results:
            raise RunDirError(f"{run_dir}: no result in it can be replayed; resume that run first")
        return found

    @property
    def name(self) -> str:
        """The run and the state that its results are in, for the identity of what replays it."""
        state = sorted((*key, row["epoch"], row["attempt"]) for key, row in self.results.items())
        return f"{self.run_dir.name} {digest(state)[:8]}"

    def records(self, keys: Collection[Key]) -> dict[Key, Record]:
        """The whole record of each of `keys`."""
        known = {key: self.results[key] for key in keys if key in self.results}
        found = calls(self.run_dir, known)
        rows = [row for key in found for row in found[key] if _is_before(row, known[key])]
        # Where two attempts made the same call, the later one counts, and an output more than an error.
        rows.sort(key=lambda row: (row["call_seq"], row["status"] == "ok", row["epoch"], row["attempt"]))
        recorded: dict[Key, list[RecordedCall]] = {key: [] for key in known}
        for row, body, texts in with_bodies(self.run_dir, rows):
            if body is None and row["status"] == "ok":
                continue  # its payload was lost with its process, and the call was made again
            recorded[row["rollout_key"], row["trial"]].append(
                RecordedCall(row["call_seq"], row["request_hash"], body or "", texts, label(row), _error(row))
            )
        return {key: Record(tuple(each), end=_end(known[key])) for key, each in recorded.items()}

    def differences(self, config: BaseRun, facts: Mapping[str, str]) -> list[str]:
        """The keys of what is measured otherwise now than in the recorded run; `code` where that changed."""
        there = yaml.safe_load((self.run_dir / "identity.yaml").read_text())
        there = {key: value for key, value in there.items() if key not in LATE_KEYS}
        keys = [
            key for key in differing_keys({**config.measured(), **facts}, there) if key not in REPLAY_KEYS
        ]
        return keys + (["code"] if self._code() not in (None, code_digest()) else [])

    def identity(self, facts: Mapping[str, str]) -> dict[str, str]:
        """Of a replay of this run: `facts` of what is replayed now, and what makes it another one."""
        return {**facts, "replay_of": self.name, "code_digest": code_digest()}

    def named(self, config: Run, identity: Mapping[str, str]) -> Run:
        """`config` with the name of a replay of this run."""
        key = digest([config.digest, dict(identity)])[:8]
        return config.model_copy(update={"run_name": f"replay-of-{self.run_dir.name}-{key}"})

    def place(self, config: BaseRun, identity: Mapping[str, str], run_dir: Path | None) -> Path:
        """The folder of a replay of this run. Raises RunDirError for the run's own."""
        path = locate(config, identity, None if run_dir is None else object_store.local(run_dir))
        if path == self.run_dir:
            raise RunDirError(
                f"--run-dir {path}: that is the recorded run; a replay needs a folder of its own"
            )
        return path

    def has_any(self, tasks: Iterable[Task]) -> bool:
        """Whether one of the tasks is in the run as it is asked now."""
        known = {rollout for rollout, _ in self.results}
        return any(task.rollout_key in known for task in tasks)

    def _code(self) -> str | None:
        try:
            found = json.loads((self.run_dir / "provenance.json").read_text())["code_digest"]
        except (OSError, ValueError, KeyError):
            return None
        return str(found)


class Nothing:
    """Model client, retriever and sandbox of a replay, in which the journal answers every call."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        raise self._refusal()

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        raise self._refusal()

    async def run(self, code: str) -> ExecutionResult:
        raise self._refusal()

    def _refusal(self) -> InfrastructureError:
        return InfrastructureError("a replay makes no call: its journal has the record of every one")


def without_time(config: Run) -> Run:
    """A replay has no time of its own: what the recorded run was limited by is in its record."""
    return config.model_copy(update={"limits": config.limits.model_copy(update={"wall_s": None})})


def counted(run_dir: Path) -> dict[Key, Row]:
    """The counted results of a run that have calls behind them."""
    if not (run_dir / "log").is_dir():
        return {}
    rows = events.results(run_dir).to_pylist()
    return {(row["rollout_key"], row["trial"]): row for row in rows if row["attempt"] != ADOPTED_ATTEMPT}


def calls(run_dir: Path, keys: Collection[Key]) -> dict[Key, list[Row]]:
    """The rows of all calls of these tasks, failed ones too, but for second opinions; in no order."""
    found: dict[Key, list[Row]] = {key: [] for key in keys}
    where = {"kind": CALL_KINDS, "rollout_key": {rollout for rollout, _ in keys}}
    for batch in events.read(run_dir, COLUMNS, where=where):
        for row in batch.to_pylist():
            key = (row["rollout_key"], row["trial"])
            if key in found and is_call(row) and not is_second_opinion(row):
                found[key].append(row)
    return found


def label(row: Row) -> str:
    return call_label(row["kind"], row["role"] or "", row["tool"] or "", row["alias"] or "")


def _is_before(row: Row, result: Row) -> bool:
    return bool((row["epoch"], row["attempt"]) <= (result["epoch"], result["attempt"]))


def _error(row: Row) -> RecordedError | None:
    if row["status"] == "ok":
        return None
    return RecordedError(row["error_kind"] or "", row["error_type"] or "", row["error"] or "")


def _end(result: Row) -> End:
    """An infrastructure failure, too, may have come where no call tells of it: a death, a full disk."""
    error = RecordedError(result["error_kind"] or "", result["error_type"] or "", result["error"] or "")
    is_limit = result["outcome"] == "limited" and WALL_LIMIT in error.message
    is_broken = result["outcome"] == "failed" and error.kind == "infrastructure"
    return End(error if is_limit or is_broken else None)


class Readahead:
    """Gives each task its whole record; reads those of the next ones with it. For one event loop."""

    def __init__(self, run_dir: Path, order: Sequence[Key]) -> None:
        self._recording = Recording(run_dir, counted(run_dir))
        self._coming = deque(order)
        self._read: dict[Key, Record] = {}
        self._lock = asyncio.Lock()

    async def before(self, key: Key) -> Record:
        """For the first attempt at a task."""
        async with self._lock:
            while key not in self._read and self._coming:
                group = [self._coming.popleft() for _ in range(min(GROUP, len(self._coming)))]
                self._read |= await asyncio.to_thread(self._recording.records, group)
        return self._read.pop(key)

    async def now(self, key: Key) -> Record:
        """For another attempt, after the death of a worker."""
        return (await asyncio.to_thread(self._recording.records, [key]))[key]
