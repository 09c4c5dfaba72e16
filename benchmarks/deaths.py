"""Which calls are made again after a death: `python -m benchmarks.deaths`.

Real runs, and SIGKILL at seeded moments: of a worker, of the checkpoint actor, of a node that does not hold
it, of everything at once. What was repeated is told by the stub model, which notes each call in a file of
its own as it is sent, as it ends, and as the journal returns it (acknowledged); the event log is asked only
for the results. A kill is of processes: what the kernel has of their files survives it. Not covered: the
loss of a machine with its page cache, and the death of the node that holds the checkpoint actor, which is
the driver's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import psutil
import ray
import typer

from benchmarks.figures import Figure, report, told
from benchmarks.load import Load, MakeSolver
from benchmarks.stub_model import Behaviour
from ray_app import engine, events, lease, planning
from ray_app.options import Options
from ray_app.records import TaskResult

T = TypeVar("T")
Kind = Literal["a worker", "the checkpoint actor", "a node not holding it", "everything at once"]
Call = tuple[str, int]  # rollout key, number

WORKERS = 2
REPLY_BYTES = 1000
ATTEMPTS = 10
# Deaths come while this part of the calls is being sent: work is in flight before, and left after.
BETWEEN = (0.15, 0.75)
POLL_S = 0.05
NODE = "second-node"
PROGRAM = "from benchmarks.deaths import drive; drive()"
DEADLINE_S = 180.0
# How soon Ray sees that a node is gone is not measured here; its default is 15 s.
HEALTH_CHECKS = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}


class Note(NamedTuple):
    """One line of evidence; `at` in Unix seconds."""

    what: str  # sent, ended, acked
    call: Call
    at: float
    pid: int


@dataclass(frozen=True)
class Death:
    """A moment (Unix seconds) and who was killed in it."""

    at: float
    pids: frozenset[int]


@dataclass(frozen=True)
class Outlived:
    """A run with deaths that came to its good end."""

    notes: Sequence[Note]
    deaths: Sequence[Death]

    @property
    def repeated(self) -> set[Call]:
        """The acknowledged calls that were sent again."""
        acked = _first(note for note in self.notes if note.what == "acked")
        sent = [note for note in self.notes if note.what == "sent"]
        return {note.call for note in sent if note.at > acked.get(note.call, math.inf)}

    @property
    def at_stake(self) -> int:
        """The calls that a process acknowledged before it was killed, of tasks that went on after that."""
        return sum(len(self._at_stake(death)) for death in self.deaths)

    def _at_stake(self, death: Death) -> set[Call]:
        acked = {note.call for note in self.notes if note.what == "acked" and note.pid in death.pids}
        later = (note for note in self.notes if note.at > death.at and note.pid not in death.pids)
        gone_on = {note.call[0] for note in later}
        return {call for call in acked if call[0] in gone_on}

    def lost_ages_s(self) -> list[float]:
        """Of each call that had ended before the last death and was sent after it: how long before."""
        died = self.deaths[-1]
        again = {note.call for note in self.notes if note.what == "sent" and note.pid not in died.pids}
        ended = _first(note for note in self.notes if note.what == "ended" and note.pid in died.pids)
        return sorted(died.at - at for call, at in ended.items() if call in again)


def _first(notes: Iterable[Note]) -> dict[Call, float]:
    """When each call was noted first."""
    found: dict[Call, float] = {}
    for note in notes:
        found[note.call] = min(note.at, found.get(note.call, math.inf))
    return found


def read_notes(folder: Path) -> list[Note]:
    """All evidence, in the order of time."""
    notes = []
    for path in folder.iterdir():
        # A kill may fall between the pages of a write: a line without its end is no evidence.
        for line in path.read_text().rpartition("\n")[0].splitlines():
            what, rollout_key, number, at, pid = line.split()
            notes.append(Note(what, (rollout_key, int(number)), float(at), int(pid)))
    return sorted(notes, key=lambda note: note.at)


def drive() -> None:
    """One driver's life, in a process of its own: begin or resume the load of the command line."""
    folder, values, nodes = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    load = Load(**(values | {"behaviour": Behaviour(**values["behaviour"])}))
    with _session(Path(sys.argv[4]), nodes):
        tally = _drive(load, folder / "run")
    print(tally.line(), flush=True)


def _drive(load: Load, run_dir: Path) -> planning.Tally:
    held = lease.take(run_dir)
    options = Options(run_dir, "deaths", held.epoch, load.in_flight, WORKERS, ATTEMPTS)
    results = events.results(run_dir).to_pylist() if (run_dir / "log").exists() else []
    work = planning.plan(load.work(), 1, results)
    log = options.writer("driver")

    async def run() -> planning.Tally:
        stop = asyncio.Event()
        return await engine.run(
            work, MakeSolver(load), options, log=log, lease=held, watcher=Nobody(), stop=stop
        )

    try:
        return asyncio.run(run())
    finally:
        log.close()
        held.release()


class Nobody:
    """Watches nothing."""

    def started(self, item: planning.WorkItem) -> None:
        pass

    def committed(self, result: TaskResult, tally: planning.Tally) -> None:
        pass

    def tick(self) -> None:
        pass


@contextmanager
def _session(temporary: Path, nodes: int) -> Iterator[None]:
    """A Ray session below `temporary`; a second node's process id is there as a file."""
    context = ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        _temp_dir=str(temporary),
        include_dashboard=False,
        num_cpus=1,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        with _second_node(temporary, str(context.address_info["address"])) if nodes == 2 else nullcontext():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _second_node(temporary: Path, address: str) -> Iterator[None]:
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--address={address}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-agent-listen-port=0"]
    with subprocess.Popen([*command, "--num-cpus=1", "--disable-usage-stats"]) as process:
        try:
            (temporary / NODE).write_text(str(process.pid))
            while len(ray.nodes()) < 2:  # for as long as whoever started this driver waits
                time.sleep(POLL_S)
            yield
        finally:
            _kill(process.pid)


@dataclass(frozen=True)
class Driver:
    """A driver that runs, and the folders of its run and of its Ray session."""

    process: subprocess.Popen[bytes]
    folder: Path
    temporary: Path

    def until(self, what: str, ready: Callable[[], T]) -> T:
        """The first answer of `ready` that is true. Raises RuntimeError when the driver ends before."""
        deadline = time.monotonic() + DEADLINE_S
        while not (answer := ready()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no {what} in {DEADLINE_S:g} s or before the driver's end: {self.said}")
            time.sleep(POLL_S)
        return answer

    def finish(self) -> None:
        """Raises RuntimeError unless the driver comes to a good end by itself."""
        try:
            status = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the driver did not end in {DEADLINE_S:g} s: {self.said}") from None
        if status != 0:
            raise RuntimeError(f"the driver ended with {status}: {self.said}")

    @property
    def said(self) -> str:
        return (self.folder / "driver.log").read_text()[-2000:]


@contextmanager
def driving(load: Load, folder: Path, nodes: int = 1) -> Iterator[Driver]:
    """A driver with a Ray session of its own; nothing of either is left."""
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for the paths of Ray's sockets
    arguments = [str(folder), json.dumps(asdict(load)), str(nodes), str(temporary)]
    environ = os.environ | {"RAY_ADDRESS": "local"} | HEALTH_CHECKS
    with (folder / "driver.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], env=environ, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield Driver(process, folder, temporary)
    finally:
        if process.poll() is None:
            _kill(process.pid)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _family(pid: int) -> set[psutil.Process]:
    """The process and its descendants."""
    try:
        process = psutil.Process(pid)
        return {process, *process.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _kill(pid: int) -> Death:
    """SIGKILL of a process and its descendants; all stand still first, so that none sees another one die."""
    stopped: set[psutil.Process] = set()
    while started := _family(pid) - stopped:
        _signal(started, signal.SIGSTOP)
        stopped |= started
    at = time.time()
    _signal(stopped, signal.SIGKILL)
    return Death(at, frozenset(process.pid for process in stopped))


def _signal(processes: Collection[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _titled(family: Collection[psutil.Process], title: str) -> list[int]:
    """The ids of those whose title starts so, in order."""
    found = []
    for process in family:
        with suppress(psutil.Error):
            if (process.cmdline() or [""])[0].startswith(title):
                found.append(process.pid)
    return sorted(found)


def outlive(kind: Kind, load: Load, folder: Path, deaths: int, chance: random.Random) -> Outlived:
    """A run of `load` in which `kind` dies so many times at moments left to `chance`.

    Raises RuntimeError when nothing of the kind is there to be killed, or the run does not come to its
    good end, with one counted result of each task.
    """
    evidence = folder / "evidence"
    evidence.mkdir(parents=True)
    load = replace(load, evidence=str(evidence))
    with driving(load, folder, nodes=2 if kind == "a node not holding it" else 1) as driver:
        died = []
        for share in moments(deaths, chance):
            driver.until(f"{share:.0%} of the calls", partial(_is_sent, evidence, share * load.calls))
            died.append(_kill(driver.until("victim", partial(_victim, kind, driver, chance))))
        if kind != "everything at once":
            driver.finish()
    if kind == "everything at once":
        with driving(load, folder) as driver:
            driver.finish()
    check(load, folder / "run")
    return Outlived(read_notes(evidence), died)


def moments(deaths: int, chance: random.Random) -> list[float]:
    """Shares of the calls, one in each of `deaths` equal parts of BETWEEN."""
    first, last = BETWEEN
    return [first + (last - first) * (number + chance.random()) / deaths for number in range(deaths)]


def _is_sent(evidence: Path, calls: float) -> bool:
    return sum(path.read_bytes().count(b"sent ") for path in evidence.iterdir()) >= calls


def _victim(kind: Kind, driver: Driver, chance: random.Random) -> int:
    """Who dies, with its descendants; 0 while there is nobody of the kind who would be missed."""
    if kind == "everything at once":
        return driver.process.pid
    family = _family(driver.process.pid)
    if kind == "the checkpoint actor":
        return next(iter(_titled(family, "ray::Checkpoint")), 0)
    workers = [pid for pid in _titled(family, "ray::Worker") if _in_flight(driver, pid) > 1]
    if kind == "a worker":
        return chance.choice(workers) if workers else 0
    node = int((driver.temporary / NODE).read_text())
    if _titled(_family(node), "ray::Checkpoint"):
        raise RuntimeError("the checkpoint actor is on another node than the driver")
    return node if {process.pid for process in _family(node)} & set(workers) else 0


def _in_flight(driver: Driver, worker: int) -> int:
    """The calls that this worker waits for. A task that runs alone is under suspicion of having killed
    its worker, and would be given up with the next one."""
    path = driver.folder / "evidence" / str(worker)
    noted = path.read_bytes() if path.exists() else b""
    return noted.count(b"sent ") - noted.count(b"ended ")


def check(load: Load, run_dir: Path) -> None:
    """Raises RuntimeError unless each task of `load` ended well and has one result row."""
    expected = Counter({task.rollout_key: 1 for task in load.work()})
    counted = events.results(run_dir).to_pylist()
    if Counter(row["rollout_key"] for row in counted if row["outcome"] == "ok") != expected:
        ended = Counter(row["outcome"] for row in counted)
        raise RuntimeError(f"{load.tasks} tasks should have ended well, these did: {dict(ended)}")
    columns = ["kind", "rollout_key"]
    rows = [row for batch in events.read(run_dir, columns) for row in batch.to_pylist()]
    written = Counter(row["rollout_key"] for row in rows if row["kind"] == "result")
    if written != expected:
        raise RuntimeError(f"result rows of a task, beside one: {dict(written - expected)}")


@dataclass(frozen=True)
class Sizes:
    """How much is measured: deaths in the run of a kind, runs in which everything dies, runs at once.

    Those are of a `quiet` load: tasks that do not end before the death, and few rows. Else the end of a
    task, or many rows, would have the log written sooner than its clock does.
    """

    load: Load
    quiet: Load
    deaths: int
    runs: int
    at_once: int

    def trials(self) -> Iterator[tuple[Kind, Load, int]]:
        """The runs, each with its number of deaths."""
        yield "a worker", self.load, self.deaths
        yield "the checkpoint actor", self.load, self.deaths
        yield "a node not holding it", self.load, 1  # there is one such node
        for _ in range(self.runs):
            yield "everything at once", self.quiet, 1


FULL = Sizes(
    Load(300, 16, 128, Behaviour(0.3, REPLY_BYTES)), Load(24, 24, 24, Behaviour(0.5, REPLY_BYTES)), 3, 3, 1
)
QUICK = Sizes(
    Load(48, 6, 24, Behaviour(0.25, REPLY_BYTES)), Load(16, 10, 16, Behaviour(0.4, REPLY_BYTES)), 1, 1, 4
)


def measure(sizes: Sizes, seed: int) -> Iterator[Figure]:
    """All figures, in the order in which they are read."""
    with tempfile.TemporaryDirectory(prefix="bench-deaths-") as name:

        def outlived(number: int, kind: Kind, load: Load, deaths: int) -> tuple[Kind, Outlived]:
            chance = random.Random(f"{seed} {number}")
            return kind, outlive(kind, load, Path(name) / str(number), deaths, chance)

        with ThreadPoolExecutor(sizes.at_once) as pool:
            runs = list(pool.map(outlived, itertools.count(), *zip(*sizes.trials(), strict=True)))
    yield from after_one({kind: run for kind, run in runs if kind != "everything at once"})
    yield from after_all([run for kind, run in runs if kind == "everything at once"])


def after_one(outlived: Mapping[Kind, Outlived]) -> Iterator[Figure]:
    """What a run repeats where one thing dies and the rest goes on."""
    repeated = sum(len(run.repeated) for run in outlived.values())
    name = f"acknowledged calls repeated after the death of {', '.join(outlived)}"
    yield Figure(name, repeated, "<=", 0)
    for kind, run in outlived.items():
        yield Figure(f"  of {kind}", len(run.repeated))
        yield Figure("    deaths", len(run.deaths))
        if run.at_stake:
            yield Figure("    acknowledged by the dead, of tasks that went on", run.at_stake)


def after_all(outlived: Sequence[Outlived]) -> Iterator[Figure]:
    """What the next driver repeats where nothing was left of the first one but its files."""
    ages_s = [age_s for run in outlived for age_s in run.lost_ages_s()]
    name = "after SIGKILL of everything at once: age of the oldest call that is repeated"
    yield Figure(name, max(ages_s, default=0.0), "<=", 2.0, "s")
    yield Figure("  deaths of everything", sum(len(run.deaths) for run in outlived))
    yield Figure("  calls that had ended and are repeated", len(ages_s))
    yield Figure("  of them acknowledged", sum(len(run.repeated) for run in outlived))
    yield Figure("  acknowledged by the dead, of tasks that went on", sum(run.at_stake for run in outlived))


def main(
    seed: Annotated[int, typer.Option(help="Of the moments and the victims.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="Half a minute: a small load, each death once.")] = False,
) -> None:
    """Measure what is repeated after deaths."""
    raise typer.Exit(report(told(measure(QUICK if quick else FULL, seed)), json))


if __name__ == "__main__":
    typer.run(main)
