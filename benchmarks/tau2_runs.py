"""The simulations of a load by our engine against the gold model, timed and metered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.session import Clocked, Snapshot, clocked, cpu_s, share_left, snapshot
from benchmarks.tau2_load import Load, config_of
from ray_app import engine, events, lease, planning
from ray_app.options import Options
from ray_app.prompting import load_prompts
from ray_app.records import TaskResult
from ray_app.tau2 import upstream
from ray_app.tau2.run import PROMPTS, SolverInWorker

EVERY_S = 0.5


@dataclass(frozen=True)
class Ran:
    """A run that is over: seconds from its first call to its last commit, CPU of all its processes.

    `share` is what others left of the machine's cores, from its first task to its last commit.
    """

    makespan_s: float
    solved: int
    calls: int
    cpu_s: float
    share: float


class Mark(NamedTuple):
    """The machine and this session's processes at one moment."""

    clock: Clocked
    processes: Snapshot


@dataclass
class Meter:
    """Watches a run: what its processes burn from its first task to its last commit."""

    marks: list[Mark] = field(default_factory=list)

    def started(self, item: planning.WorkItem) -> None:
        pass

    def committed(self, result: TaskResult, tally: planning.Tally) -> None:
        if tally.pending == 0:
            self.marks.append(Mark(clocked(), snapshot()))

    def tick(self) -> None:
        if not self.marks or time.time() - self.marks[-1].clock.at > EVERY_S:
            self.marks.append(Mark(clocked(), snapshot()))

    def since(self, moment: float) -> tuple[Mark, Mark]:
        """The mark nearest to this moment (Unix seconds), and the last one."""
        return min(self.marks, key=lambda mark: abs(mark.clock.at - moment)), self.marks[-1]


def run_ours(
    load: Load, run_dir: Path, url: str, in_flight: int, workers: int, without: Collection[int] = ()
) -> Ran:
    """Solve `load` by the engine. `without` names processes not metered."""
    config = config_of(load.domains, url, in_flight, workers)
    prompts = load_prompts(None, PROMPTS)
    make_solver = SolverInWorker(config, prompts, upstream.data_folder(), {}, {})
    held = lease.take(run_dir)
    options = Options(run_dir, "bench", held.epoch, in_flight, workers, attempts=1)
    log, meter = options.writer("driver"), Meter()
    work = planning.plan(load.tasks(), load.trials, [])

    async def drive() -> planning.Tally:
        stop = asyncio.Event()
        return await engine.run(work, make_solver, options, log=log, lease=held, watcher=meter, stop=stop)

    try:
        tally = asyncio.run(drive())
    finally:
        log.close()
        held.release()
    if tally.counts["ok"] != load.simulations:
        raise RuntimeError(f"the run did not end well: {tally.line()}")
    sent = [
        row["t_start"].timestamp()
        for batch in events.read(run_dir, ["t_start"], where={"kind": {"model_call"}})
        for row in batch.to_pylist()
    ]
    solved = sum(events.results(run_dir)["is_correct"].to_pylist())
    begin, end = meter.since(min(sent))
    share = share_left(begin.clock, end.clock, float(cpu_s(begin.processes, end.processes).total()))
    metered = {pid: process for pid, process in end.processes.items() if pid not in without}
    own_s = float(cpu_s(begin.processes, metered).total())
    return Ran(end.clock.at - min(sent), solved, len(sent), own_s, share)
