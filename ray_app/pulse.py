"""The pulse of a process of a run: `status/NAME.json`, rewritten every two seconds while it lives.

Holds when the process last lived and which outside calls it is waiting for, so that another terminal can
tell a run that works from one that hangs, without Ray and after a crash. It is advice: a status that
cannot be written never stops the run, and nothing that counts is read from it. Ages are differences of
wall clocks: those of another machine are as good as the two clocks agree.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_app import object_store, steady
from ray_app.errors import ConfigError, StorageError
from ray_app.records import Event, TaskResult

if TYPE_CHECKING:
    from ray_app.engine import Watcher
    from ray_app.planning import Tally, WorkItem

BEAT_S = 2.0
# The oldest calls of a process are named, the rest are counted: the file stays a few kB.
NAMED_CALLS = 100
# Files beside the sockets of the calls: the log, libraries, pipes of sandboxed programs, Ray itself.
SPARE_FILES = 512


@dataclass(frozen=True, slots=True)
class Call:
    """An outside call that has begun and not ended; `since` is wall time (Unix seconds)."""

    task_id: str
    trial: int
    attempt: int
    turn: int
    kind: str
    role: str
    tool: str
    alias: str
    model: str
    since: float


@dataclass(frozen=True, slots=True)
class CallGroup:
    """How many calls of one kind are in flight, and since when the oldest is."""

    kind: str
    role: str
    model: str
    n: int
    since: float


@dataclass(frozen=True, slots=True)
class Status:
    """What one process last said of itself.

    `started` tells it from a later process with the same number, `beat` is its last heartbeat, `ended` when
    it closed; `is_lost` says that the driver found it dead and replaced it. `figures` are the driver's.
    `clock_step_s`: by how much its machine's clock was set since it began, which its events do not show.
    """

    name: str
    epoch: int
    host: str
    pid: int
    started: float | None
    node: str
    beat: float
    ended: float | None = None
    is_lost: bool = False
    calls_ended: int = 0
    in_flight: int = 0
    groups: tuple[CallGroup, ...] = ()
    calls: tuple[Call, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    clock_step_s: float = 0.0


class Pulse:
    """Writes this process's status; the journal tells it of calls. Thread-safe."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        *,
        epoch: int,
        node: str = "",
        figures: Callable[[], Mapping[str, Any]] = dict,
        interval_s: float = BEAT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = status_path(run_dir, name, epoch)
        pid = os.getpid()
        self._self = Status(name, epoch, socket.gethostname(), pid, process_started(pid), node, 0.0)
        self._figures, self._interval_s, self._clock = figures, interval_s, clock
        self._calls: dict[int, tuple[Event, str]] = {}
        self._numbers = itertools.count()
        self._ended_calls = 0
        self._lock, self._writing, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._tend, name=f"pulse-{name}", daemon=True)
        self._thread.start()

    def begin(self, row: Event, model: str = "") -> int:
        """Note that the call of `row` goes out now; the number that `end` takes."""
        number = next(self._numbers)
        with self._lock:
            self._calls[number] = (row, model)
        return number

    def end(self, number: int) -> None:
        with self._lock:
            if self._calls.pop(number, None) is not None:
                self._ended_calls += 1

    @property
    def in_flight(self) -> int:
        """Calls that have gone out and not ended."""
        return len(self._calls)

    def beat(self) -> None:
        """Write the status now."""
        self._write(self.status())

    def status(self) -> Status:
        """What the file would say at this moment."""
        with self._lock:
            rows, ended_calls = list(self._calls.values()), self._ended_calls
        step_s = steady.step_s()
        return replace(
            self._self,
            beat=self._clock(),
            calls_ended=ended_calls,
            in_flight=len(rows),
            groups=_groups(rows, step_s),
            calls=tuple(_call(*row, step_s) for row in rows[:NAMED_CALLS]),
            figures=dict(self._figures()),
            clock_step_s=step_s,
        )

    def close(self) -> None:
        """Stop, and say that this process ended as it meant to."""
        self._stop.set()
        self._thread.join()
        status = self.status()
        self._write(replace(status, ended=status.beat))

    def _tend(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.beat()

    def _write(self, status: Status) -> None:
        with self._writing, suppress(OSError, StorageError):
            _write(self._path, status)


class Followed:
    """Shows a run's progress as `shown` does, and keeps the figures of the driver's status."""

    def __init__(self, shown: Watcher, tally: Tally, clock: Callable[[], float] = steady.now) -> None:
        self._shown, self._tally, self._clock = shown, tally, clock
        self._began = clock()
        self._in_flight = self._finished = 0
        self._last_commit: float | None = None
        self._cost_usd = 0.0
        self._failures = Counter[str]()

    def started(self, item: WorkItem) -> None:
        self._in_flight += 1
        self._shown.started(item)

    def committed(self, result: TaskResult, tally: Tally) -> None:
        self._tally, self._last_commit = tally, self._clock()
        self._in_flight -= 1
        self._finished += 1
        self._cost_usd += result.cost_usd
        if result.error_kind is not None:
            self._failures[result.error_kind] += 1
        self._shown.committed(result, tally)

    def tick(self) -> None:
        self._shown.tick()

    def figures(self) -> dict[str, Any]:
        """Tasks planned, by outcome and in flight; rate per minute; seconds to the end; last commit; dollars
        and kinds of error of the results of this command."""
        elapsed_s, tally = self._clock() - self._began, self._tally
        rate = self._finished / elapsed_s if elapsed_s > 0 else 0.0
        return {
            "planned": tally.planned,
            **{str(name): count for name, count in tally.counts.items()},
            "pending": tally.pending,
            "in_flight": self._in_flight,
            "per_min": 60 * rate,
            "eta_s": tally.pending / rate if rate else None,
            "last_commit": None if self._last_commit is None else self._last_commit + steady.step_s(),
            "cost_usd": self._cost_usd,
            "failures": dict(self._failures),
        }


def read(run_dir: Path) -> list[Status]:
    """The statuses of all processes of a run, by name; one that does not read is left out."""
    found = (_parse(path) for path in sorted((Path(run_dir) / "status").glob("*.json")))
    return [status for status in found if status is not None]


def mark_lost(run_dir: Path, name: str, epoch: int) -> None:
    """Note that the process `name` was found dead and has been replaced."""
    path = status_path(run_dir, name, epoch)
    status = _parse(path)
    if status is not None:
        with suppress(OSError, StorageError):
            _write(path, replace(status, is_lost=True))


def status_path(run_dir: Path, name: str, epoch: int) -> Path:
    return Path(run_dir) / "status" / f"e{epoch:04d}-{name}.json"


def process_started(pid: int) -> float | None:
    """When the process of this machine began, in ticks since its boot; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A process that has ended and that its parent has not asked for is dead as well.
    return None if fields[0] in {"Z", "X"} else float(fields[19])


def raise_file_limit(concurrency: int) -> int:
    """Lift this process's limit of open files as far as it may; the limit, which is enough.

    Raises ConfigError where `concurrency` tasks in flight could need more.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # a kernel's own maximum may be below the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = 2 * concurrency + SPARE_FILES
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ConfigError(
            f"open files: the limit is {limit}, expected at least {needed} for concurrency {concurrency}; "
            f"raise it (`ulimit -n {needed}`, as root or in limits.conf) or lower concurrency"
        )
    return limit


def _call(row: Event, model: str, step_s: float) -> Call:
    place = (row.task_id, row.trial, row.attempt, row.turn)
    return Call(*place, row.kind, row.role, row.tool, row.alias, model, row.t_start + step_s)


def _groups(rows: Iterable[tuple[Event, str]], step_s: float) -> tuple[CallGroup, ...]:
    """Counted by kind, role and model, the group with the oldest call first."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row, model in rows:
        found.setdefault((row.kind, row.role, model), []).append(row.t_start + step_s)
    groups = (CallGroup(*key, len(times), min(times)) for key, times in found.items())
    return tuple(sorted(groups, key=lambda group: group.since))


def _write(path: Path, status: Status) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(status)))
    temporary.replace(path)
    object_store.push(path.parent.parent, [f"status/{path.name}"])


def _parse(path: Path) -> Status | None:
    try:
        value = json.loads(path.read_text())
        groups = tuple(CallGroup(**group) for group in value.pop("groups"))
        calls = tuple(Call(**call) for call in value.pop("calls"))
        return Status(**value, groups=groups, calls=calls)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
