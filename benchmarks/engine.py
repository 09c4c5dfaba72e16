"""How close the engine comes to ideal, and what it costs: `python -m benchmarks.engine`.

Models are stubs that only take their (seeded) time; everything else is real: worker actors, journal,
event log, lease, the driver's commits. The clock runs from the first call sent to the last result
committed. The ideal makespan is list scheduling: each task, in order, on the slot that is free first.
Then runs that lose processes (`deaths.py`) and logs that are cut and read while they grow (`log.py`).
What checkpoint and log cost is the difference to a second run, whose calls bypass the journal and whose
driver drops its rows (one row and one flush a task stay in it). `--quick` is smaller and judges nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pyarrow.parquet as pq
import ray
import typer

from benchmarks import deaths
from benchmarks import log as event_log
from benchmarks.figures import Figure, report
from benchmarks.load import Load, MakeSolver, StubSolver
from benchmarks.session import Snapshot, cpu_s, held_bytes, snapshot
from benchmarks.stub_model import USAGE, Behaviour, serving
from ray_app import engine, events, lease, planning
from ray_app.chat import ChatRequest
from ray_app.event_writer import EventWriter
from ray_app.journal import Journal
from ray_app.options import Options
from ray_app.records import ChatReply, Event, TaskResult, Verdict
from ray_app.table_files import PARQUET, log_files

WORKERS = 2
REPLY_BYTES = 1000
TRANSCRIPT_BYTES = 100_000
SAMPLES = 40  # of memory, over a run
GROWTH_FROM = 0.25


class DroppingLog(EventWriter):
    """A driver's log that takes everything and keeps nothing."""

    def append(self, event: Event) -> str:
        return ""

    def payload(self, body: str, media: Literal["json", "text"] = "json") -> str:
        return ""


@dataclass
class Meter:
    """Watches a run: its end, what it burns and holds from its first task to its last commit.

    `before` and `after` are the processes at both ends, `held` (share of the tasks committed, bytes).
    """

    run_dir: Path
    without: Collection[int] = ()
    started_at: float = 0.0
    ended_at: float = 0.0
    before: Snapshot = field(default_factory=dict)
    after: Snapshot = field(default_factory=dict)
    held: list[tuple[float, int]] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    log_bytes: int = 0

    def started(self, item: planning.WorkItem) -> None:
        if not self.before:
            self.before, self.started_at = snapshot(self.without), time.time()

    def committed(self, result: TaskResult, tally: planning.Tally) -> None:
        self.waits_s += json.loads(result.prediction)
        done = 1 - tally.pending / tally.planned
        if tally.pending == 0:
            self.ended_at, self.after = time.time(), snapshot(self.without)
            self.log_bytes = logged_bytes(self.run_dir)
        if not self.held or done >= self.held[-1][0] + 1 / SAMPLES or tally.pending == 0:
            self.held.append((done, held_bytes(self.after or snapshot(self.without))))

    def tick(self) -> None:
        pass

    @property
    def growth(self) -> float:
        """The most that is held after GROWTH_FROM of the run, as a growth over what is held then."""
        late = [held for share, held in self.held if share >= GROWTH_FROM]
        return max(late) / late[0] - 1


@dataclass(frozen=True)
class Ran:
    """A run that is over: seconds from its first call to its last commit, and what was metered."""

    load: Load
    meter: Meter
    makespan_s: float
    startup_s: float
    lateness_s: list[float]  # of each call, over the latency that it was to take

    @property
    def ratio(self) -> float:
        return self.load.ideal_s / self.makespan_s

    @property
    def cpu_ms(self) -> Counter[str]:
        """CPU per turn, by kind of process."""
        spent = cpu_s(self.meter.before, self.meter.after)
        return Counter({kind: 1000 * used / self.load.calls for kind, used in spent.items()})


def run(load: Load, run_dir: Path, without: Collection[int] = ()) -> Ran:
    """Solve `load` in `run_dir`, from its lease to its closed log. `without` names processes not metered."""
    called = time.time()
    meter = Meter(run_dir, without)
    held = lease.take(run_dir)
    options = Options(run_dir, "bench", held.epoch, load.in_flight, WORKERS, attempts=3)
    log = options.writer("driver") if load.is_journalled else DroppingLog(run_dir, "dropped")
    work = planning.plan(load.work(), 1, [])
    try:
        tally = asyncio.run(_drive(work, load, options, log, held, meter))
    finally:
        log.close()
        held.release()
    if tally.counts["ok"] != load.tasks:
        raise RuntimeError(f"the run did not end well: {tally.line()}")
    calls = _calls(load, run_dir) if load.is_journalled else []
    first_at = min((started_at for started_at, _ in calls), default=meter.started_at)
    lateness_s = [late_s for _, late_s in calls]
    return Ran(load, meter, meter.ended_at - first_at, first_at - called, lateness_s)


async def _drive(
    work: planning.Plan,
    load: Load,
    options: Options,
    log: EventWriter,
    held: lease.Lease,
    meter: Meter,
) -> planning.Tally:
    stop = asyncio.Event()
    return await engine.run(work, MakeSolver(load), options, log=log, lease=held, watcher=meter, stop=stop)


def _calls(load: Load, run_dir: Path) -> list[tuple[float, float]]:
    """When each model call was sent (Unix seconds), and how much longer than the model it took."""
    columns = ["kind", "t_start", "duration_s", "task_id", "turn"]
    return [
        (row["t_start"].timestamp(), row["duration_s"] - load.latency_s(int(row["task_id"]), row["turn"]))
        for batch in events.read(run_dir, columns)
        for row in batch.to_pylist()
        if row["kind"] == "model_call"
    ]


def logged_bytes(run_dir: Path) -> int:
    """What the log holds before compression: streams as they are, Parquet as its columns in memory."""
    found = [path for table in ("log", "payloads") for path in log_files(run_dir / table)]
    parts = [pq.read_table(path).nbytes if path.suffix == PARQUET else path.stat().st_size for path in found]
    return sum(parts)


class Instant:
    """A model that answers at once."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def complete(self, request: ChatRequest) -> ChatReply:
        return ChatReply(self._behaviour.text(request.sampling.seed or 0), finish_reason="stop", usage=USAGE)


async def write_finished(load: Load, run_dir: Path) -> None:
    """The log that a finished run of `load` leaves, without the run."""
    options = Options(run_dir, "bench", 1, load.in_flight, WORKERS, attempts=3)
    logs = [options.writer(f"w{number}") for number in range(WORKERS)]
    driver, solver = options.writer("driver"), StubSolver(load, Instant(load.behaviour))
    for number, task in enumerate(load.work()):
        names = {"rollout_key": task.rollout_key, "judge_key": task.judge_key, "task_id": task.task_id}
        base = Event("attempt", time.time(), run_id="bench", epoch=1, attempt=1, **names)  # type: ignore[arg-type]
        journal = Journal(task, logs[number % WORKERS], base)
        journal.note("attempt")
        await solver.solve(task, journal)
        result = TaskResult(
            task.task_id, task.rollout_key, task.judge_key, 0, 1, "ok", "", Verdict(True, "exact")
        )
        driver.append(engine.result_event(result, options, driver))
    for log in (*logs, driver):
        log.close()


def planning_s(load: Load, run_dir: Path) -> float:
    """How long it takes to find that nothing of `load` is left to do."""
    tasks = load.work()
    started = time.perf_counter()
    work = planning.plan(tasks, 1, events.results(run_dir).to_pylist())
    took_s = time.perf_counter() - started
    if work.items:
        raise RuntimeError(f"{len(work.items)} tasks of a finished run would run again")
    return took_s


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    tasks: int
    turns: int
    in_flight: int
    mean_s: float
    http_tasks: int
    http_in_flight: int
    http_mean_s: float
    transcripts: int
    finished: int

    @property
    def load(self) -> Load:
        return Load(self.tasks, self.turns, self.in_flight, Behaviour(self.mean_s, REPLY_BYTES))

    @property
    def http_load(self) -> Load:
        behaviour = Behaviour(self.http_mean_s, REPLY_BYTES)
        return Load(self.http_tasks, self.turns, self.http_in_flight, behaviour)

    @property
    def long_load(self) -> Load:
        behaviour = Behaviour(self.mean_s, TRANSCRIPT_BYTES // self.turns)
        return Load(self.transcripts, self.turns, self.in_flight, behaviour)

    @property
    def finished_load(self) -> Load:
        return replace(self.load, tasks=self.finished)


Figures = Iterator[Figure]


def in_process(sizes: Sizes, folder: Path) -> Figures:
    """Makespan and CPU where the model's latency is a sleep."""
    ran = run(sizes.load, folder / "in-process")
    bare = run(replace(sizes.load, is_journalled=False), folder / "bare")
    total, without = ran.cpu_ms.total(), bare.cpu_ms.total()
    at = f"{sizes.in_flight} in flight"
    yield Figure(f"ideal makespan / ours, in-process latencies, {at}", ran.ratio, ">=", 0.95)
    yield from _spans(ran)
    name = (
        "CPU per turn, all processes of the session summed (driver, workers, checkpoint actor, raylet, GCS)"
    )
    yield Figure(name, total, "<=", 3.0, "ms")
    for kind, used_ms in ran.cpu_ms.most_common():
        yield Figure(f"  {kind}", used_ms, unit="ms")
    yield Figure("of it checkpoint and log", total - without, "<=", 0.8, "ms")
    yield Figure(f"reply to acknowledgement, p99 at {at}", 1000 * _p99(ran.meter.waits_s), "<=", 50.0, "ms")
    yield Figure("  median", 1000 * statistics.median(ran.meter.waits_s), unit="ms")


def over_http(sizes: Sizes, folder: Path) -> Figures:
    """Makespan through the real client, against a stub server in a process of its own."""
    load = sizes.http_load
    with serving(load.behaviour) as server:
        ran = run(replace(load, url=server.url), folder / "http", {server.pid})
    at = f"{load.in_flight} in flight at {load.behaviour.mean_s:g} s"
    yield Figure(f"ideal makespan / ours, end to end over HTTP, {at}", ran.ratio, ">=", 0.90)
    yield from _spans(ran)
    yield Figure("  CPU per turn, without the stub server", ran.cpu_ms.total(), unit="ms")


def long_transcripts(sizes: Sizes, folder: Path) -> Figures:
    """What a run of long transcripts writes and holds."""
    ran = run(sizes.long_load, folder / "long")
    length = f"{TRANSCRIPT_BYTES // 1000} kB transcripts"
    written = ran.meter.log_bytes / ran.load.text_bytes
    name = f"bytes written by checkpoints and log / unique payload bytes ({length})"
    yield Figure(name, written, "<=", 1.2)
    held = "RSS growth of driver, workers, checkpoint actor and object store in use"
    name = f"{held}, from 25 % to 100 % of the run with {length}"
    yield Figure(name, 100 * ran.meter.growth, "<=", 10.0, "%")
    yield Figure("  tasks of that run", ran.load.tasks)
    yield Figure("  ideal makespan / ours of that run", ran.ratio)
    yield Figure("  held at its end", ran.meter.held[-1][1] / (1 << 20), unit="MiB")


def resuming(sizes: Sizes, folder: Path) -> Figures:
    """Planning where everything is done."""
    load = sizes.finished_load
    asyncio.run(write_finished(load, folder / "finished"))
    name = f"planning the resume of a finished {load.tasks:,}-task run"
    yield Figure(name, planning_s(load, folder / "finished"), "<=", 5.0, "s")


def _spans(ran: Ran) -> Figures:
    yield Figure("  ours, from the first call sent to the last commit", ran.makespan_s, unit="s")
    yield Figure("  ideal", ran.load.ideal_s, unit="s")
    yield Figure("  start-up before the first call", ran.startup_s, unit="s")
    late_ms = [1000 * late_s for late_s in ran.lateness_s]
    yield Figure("  a call takes longer than the model, median", statistics.median(late_ms), unit="ms")
    yield Figure("  a call takes longer than the model, p99", _p99(late_ms), unit="ms")


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


@contextmanager
def session() -> Iterator[float]:
    """A Ray session of its own on this machine; gives the seconds that it took to start."""
    started = time.perf_counter()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        yield time.perf_counter() - started
    finally:
        ray.shutdown()


def measure(sizes: Sizes) -> Figures:
    """All figures, in the order in which they are read."""
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as name, session() as startup_s:
        yield Figure("start of the Ray session", startup_s, unit="s")
        # Memory first: what others leave in the driver would hide its growth.
        for part in (long_transcripts, in_process, over_http, resuming):
            yield from part(sizes, Path(name))
    # Sessions and processes of their own, which die.
    is_quick = sizes is QUICK
    yield from deaths.measure(deaths.QUICK if is_quick else deaths.FULL, seed=1)
    yield from event_log.measure(event_log.QUICK if is_quick else event_log.FULL)


def main(
    tasks: Annotated[int, typer.Option(min=1)] = 2000,
    turns: Annotated[int, typer.Option(min=1)] = 8,
    in_flight: Annotated[int, typer.Option(min=1)] = 512,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="Half a minute; judges nothing.")] = False,
) -> None:
    """Measure the engine under a model that only takes time."""
    sizes = Sizes(
        tasks, turns, in_flight, 1.0, max(1, tasks // 2), in_flight // 2, 2.0, max(1, tasks // 2), 10_000
    )
    if quick:
        sizes = QUICK
    figures = []
    for figure in measure(sizes):
        shown = replace(figure, op=None, target=None) if quick else figure
        print(shown.line, file=sys.stderr, flush=True)
        figures.append(shown)
    raise typer.Exit(report(figures, json))


QUICK = Sizes(96, 4, 48, 0.3, 48, 24, 0.3, 96, 300)

if __name__ == "__main__":
    typer.run(main)
