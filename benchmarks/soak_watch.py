"""What the processes of a run hold while it goes on, once a second; and kills of some of them.

Watches from outside, so that what is measured does not measure itself. A process that is killed starts
again small, which must hide no growth: the oldest worker is never killed, and stands by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from benchmarks import session
from ray_app.table_files import log_files

MIB = float(1 << 20)
# Ours, and judged; the rest is Ray's own.
HOLDING = session.HOLDING
DONE = b"_TASK_COMPLETE]"
# A level is the median over this share of the tasks around its moment: single samples jump.
AROUND = 0.02
_ENDED = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied, OSError)
Victim = Literal["workers", "checkpoint actor"]


class Held(NamedTuple):
    """One process at one moment. `started`: Unix seconds; bytes resident, and of them anonymous."""

    kind: str
    pid: int
    started: float
    rss: int
    anonymous: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """A run at one moment: seconds since its beginning, results told, its processes, its log on disk."""

    at_s: float
    done: int
    held: Sequence[Held]
    log_bytes: int
    log_files: int

    def of(self, *kinds: str) -> list[Held]:
        return [one for one in self.held if one.kind in kinds]


Measure = Callable[[Sample], float]


class Kill(NamedTuple):
    """A SIGKILL, in seconds since the beginning."""

    kind: Victim
    at_s: float


@dataclass
class Watch:
    """Samples a run of `tasks` tasks. `kills`: after so many results, a process of which kind is killed."""

    driver: int
    run_dir: Path
    told: Path  # what the driver prints
    tasks: int
    kills: Sequence[tuple[int, Victim]] = ()
    samples: list[Sample] = field(default_factory=list)
    killed: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = self._counted = time.monotonic()
        self._read = self.done = 0
        self._due = sorted(self.kills)
        self.all_done_s: float | None = None

    def look(self) -> None:
        """One sample; then the kills that are due."""
        self._count()
        now_s = time.monotonic() - self._began
        if self.done >= self.tasks and self.all_done_s is None:
            self.all_done_s = now_s
        files = [path for table in ("log", "payloads") for path in log_files(self.run_dir / table)]
        sizes = list(map(_size, files))
        held = tuple(_processes(self.driver))
        self.samples.append(Sample(now_s, self.done, held, sum(sizes), len(sizes)))
        while self._due and self.done >= self._due[0][0]:
            self._kill(self._due.pop(0)[1], now_s)

    def _count(self) -> None:
        """The results that the driver has told of since the last look."""
        with self.told.open("rb") as file:
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")[0]
        self._read += len(lines)
        if found := lines.count(DONE):
            self.done, self._counted = self.done + found, time.monotonic()

    @property
    def still_s(self) -> float:
        """Seconds since a result was told of."""
        return time.monotonic() - self._counted

    def _kill(self, kind: Victim, now_s: float) -> None:
        found = sorted(self.samples[-1].of(kind), key=lambda one: one.started)
        victims = found[1:] if kind == "workers" else found
        if victims and self.done < self.tasks:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(victims[-1].pid).kill()
                self.killed.append(Kill(kind, now_s))

    @property
    def run(self) -> list[Sample]:
        """From the first result to the last."""
        return [sample for sample in self.samples if sample.done > 0 and not self._is_over(sample)]

    @property
    def end(self) -> list[Sample]:
        """After the last result: the driver closes, compacts and analyses."""
        return [sample for sample in self.samples if self._is_over(sample)]

    def _is_over(self, sample: Sample) -> bool:
        return self.all_done_s is not None and sample.at_s >= self.all_done_s

    def level(self, share: float, measure: Measure) -> float:
        """The median of a measure where this share of the tasks was done."""
        near = [one for one in self.run if abs(one.done / self.tasks - share) <= AROUND]
        near = near or [min(self.run, key=lambda one: abs(one.done / self.tasks - share))]
        return statistics.median(map(measure, near))

    def growth(self, measure: Measure, since: float) -> float:
        """The level at the end over that at the share `since` of the tasks."""
        return self.level(1.0, measure) / self.level(since, measure)


def _size(path: Path) -> int:
    """0 for one that was merged meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _processes(driver: int) -> Iterable[Held]:
    try:
        family = psutil.Process(driver)
        found = [family, *family.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in found:
        with suppress(*_ENDED), process.oneshot():
            kind = _kind(process, driver)
            memory = _anonymous(process.pid)
            held = process.num_fds(), process.num_threads()
            yield Held(kind, process.pid, process.create_time(), process.memory_info().rss, memory, *held)


def _kind(process: psutil.Process, driver: int) -> str:
    if "ray_app.compaction" in process.cmdline():
        return "merging"
    return session.kind(process, driver)


def _anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def rss(*kinds: str) -> Measure:
    """Resident bytes of all processes of these kinds."""
    return lambda sample: float(sum(one.rss for one in sample.of(*kinds)))


def anonymous(*kinds: str) -> Measure:
    return lambda sample: float(sum(one.anonymous for one in sample.of(*kinds)))


def descriptors(*kinds: str) -> Measure:
    return lambda sample: float(sum(one.descriptors for one in sample.of(*kinds)))


def threads(*kinds: str) -> Measure:
    return lambda sample: float(sum(one.threads for one in sample.of(*kinds)))


def oldest_worker(what: Literal["rss", "anonymous", "descriptors"]) -> Measure:
    """Of the worker that was there from the beginning and is never killed."""

    def measured(sample: Sample) -> float:
        first = min(sample.of("workers"), key=lambda one: one.started, default=None)
        return float(getattr(first, what)) if first else 0.0

    return measured


def most_of_a_worker(sample: Sample) -> float:
    """Resident bytes of the worker that holds most."""
    return float(max((one.rss for one in sample.of("workers")), default=0))
