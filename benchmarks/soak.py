"""Whether a long run holds more and more: `python -m benchmarks.soak`, 100,000 short tasks with faults.

A real command's life in a process of its own: lease, cluster, engine, workers, checkpoint actor, log, merges,
analysis. Only the models are a stub, over HTTP. One call in a hundred meets a fault and is asked again, some
tasks raise, and workers and checkpoint actor are killed now and then. Judged is what driver, workers and
checkpoint actor hold at the end against when a fifth of the tasks was done; what Ray's own processes hold
is told. Another order of tasks, larger texts, or an object store are not covered.
"""

from __future__ import annotations

import json as json_module
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from benchmarks import soak_picture
from benchmarks.figures import Figure, report
from benchmarks.soak_load import CALL_FAULTS, TURNS, call_fault, planned_faults
from benchmarks.soak_watch import (
    HOLDING,
    MIB,
    Victim,
    Watch,
    anonymous,
    descriptors,
    most_of_a_worker,
    oldest_worker,
    rss,
    threads,
)
from benchmarks.stub_model import served
from ray_app import events

SINCE = 0.2
MOST_GROWTH = 1.1
DRIVER = "from benchmarks.soak_load import drive; drive()"
SERVER = "from benchmarks.soak_server import main; main()"
# By the share of the tasks done. Some before what is compared, so that replaced processes are in both.
KILLS: tuple[tuple[float, Victim], ...] = (
    *((share, "workers") for share in (0.05, 0.12, 0.3, 0.45, 0.6, 0.75, 0.9)),
    *((share, "checkpoint actor") for share in (0.08, 0.38, 0.68)),
)
STALL_S = 180.0
FEW_KILLS: tuple[tuple[float, Victim], ...] = ((0.3, "workers"), (0.6, "checkpoint actor"))


@dataclass(frozen=True)
class Soaked:
    """A run that is over: how it was watched, how its command ended, what it counted."""

    watch: Watch
    run_dir: Path
    status: int
    summary: dict[str, float]

    @property
    def took_s(self) -> float:
        return self.watch.samples[-1].at_s


def soak(
    tasks: int,
    folder: Path,
    every_s: float = 1.0,
    kills: tuple[tuple[float, Victim], ...] = KILLS,
    *,
    with_pictures: bool = True,
) -> Soaked:
    """Run it in `folder`. Raises RuntimeError where the command breaks or counts nothing for STALL_S."""
    run_dir, told = folder / "run", folder / "driver.log"
    # Nobody's cluster is joined.
    environ = os.environ | {"RAY_ADDRESS": "local", "PYTHONUNBUFFERED": "1"}
    with served(SERVER) as server, told.open("w") as log:
        command = [sys.executable, "-c", DRIVER, str(run_dir), str(tasks), server.url, str(with_pictures)]
        with subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT) as process:
            due = [(int(share * tasks), victim) for share, victim in kills]
            watch = Watch(process.pid, run_dir, told, tasks, due)
            try:
                status = _watched(process, watch, every_s)
            finally:
                process.terminate()
    summary = run_dir / "summary.json"
    if not summary.exists() or not watch.run:
        raise RuntimeError(f"the run did not come to its end (exit {status}): {told.read_text()[-2000:]}")
    return Soaked(watch, run_dir, status, json_module.loads(summary.read_text()))


def _watched(process: subprocess.Popen[bytes], watch: Watch, every_s: float) -> int:
    """The driver's exit status."""
    while True:
        watch.look()
        if watch.still_s > STALL_S:
            raise RuntimeError(f"no result for {STALL_S:g} s after {watch.done} of {watch.tasks} tasks")
        try:
            return process.wait(every_s)
        except subprocess.TimeoutExpired:
            continue


def figures(soaked: Soaked) -> Iterator[Figure]:
    """All figures of a soak, in the order in which they are read."""
    yield from _accounting(soaked)
    yield from _memory(soaked.watch)
    yield from _opened(soaked.watch)
    yield from _log(soaked)
    yield from _speed(soaked)


def _accounting(soaked: Soaked) -> Iterator[Figure]:
    counts, tasks = soaked.summary, soaked.watch.tasks
    planned = planned_faults(tasks)
    lost = planned["raises"] + planned["refused"]
    results = events.results(soaked.run_dir).num_rows
    yield Figure("tasks planned", counts["planned"], "==", tasks)
    yield Figure("  with one result each in the log", results, "==", tasks)
    yield Figure("  ended well", counts["ok"], "==", tasks - lost)
    yield Figure("  failed, as they were made to", counts["failed"], "==", lost)
    yield Figure(
        "  limited, owed or pending", sum(counts[name] for name in ("limited", "owed", "pending")), "==", 0
    )
    yield Figure("tasks whose first attempt raised", planned["raises once"])
    meant = sum(call_fault(seed) is not None for seed in range(TURNS * tasks))
    yield Figure("calls that were to meet a fault", 100 * meant / (TURNS * tasks), unit="% of all")
    met = _faults_met(soaked.run_dir)
    yield Figure("  and have one in the log", sum(each.met for each in met))
    # A call that a kill cut off, or that was answered from the record, forgets what it met; no other does.
    whole = [each for each in met if each.attempt == 1]
    amiss = sum(each.met != _faults_meant(each.task) for each in whole)
    yield Figure("  tasks done at one attempt, whose calls met other than they were to", amiss, "==", 0)
    yield Figure("  kinds of fault", len(CALL_FAULTS))
    for kind in ("workers", "checkpoint actor"):
        yield Figure(f"SIGKILLs: {kind}", sum(kill.kind == kind for kill in soaked.watch.killed), ">=", 1)


class _Met(NamedTuple):
    """How many calls of a task ended well after something went wrong, and at which attempt it was done."""

    task: int
    attempt: int
    met: int


def _faults_met(run_dir: Path) -> list[_Met]:
    query = """
        select task_id::int, any_value(results.attempt), count(*) filter (calls.retries > 0)
        from results join events as calls using (task_id)
        where calls.kind = 'model_call' and calls.status = 'ok' group by task_id
    """
    with events.connect(run_dir) as log:
        return [_Met(*row) for row in log.execute(query).fetchall()]


def _faults_meant(task: int) -> int:
    return sum(call_fault(seed) is not None for seed in range(TURNS * task, TURNS * (task + 1)))


def _memory(watch: Watch) -> Iterator[Figure]:
    name = "RSS of driver, workers and checkpoint actor, end / at 20 %"
    yield Figure(name, watch.growth(rss(*HOLDING), SINCE), "<=", MOST_GROWTH)
    yield Figure("  at 20 %", watch.level(SINCE, rss(*HOLDING)) / MIB, unit="MiB")
    yield Figure("  at the end", watch.level(1.0, rss(*HOLDING)) / MIB, unit="MiB")
    late = [rss(*HOLDING)(one) for one in watch.run if one.done >= SINCE * watch.tasks]
    most = max(late, default=0.0) / watch.level(SINCE, rss(*HOLDING))
    yield Figure("  the most of a single sample after 20 %, over it", most)
    yield Figure("  anonymous memory alone", watch.growth(anonymous(*HOLDING), SINCE))
    yield Figure("  driver", watch.growth(rss("driver"), SINCE), "<=", MOST_GROWTH)
    yield Figure("  workers", watch.growth(rss("workers"), SINCE), "<=", MOST_GROWTH)
    yield Figure("  the worker that holds most", watch.growth(most_of_a_worker, SINCE), "<=", MOST_GROWTH)
    yield Figure(
        "  the worker that was never killed", watch.growth(oldest_worker("rss"), SINCE), "<=", MOST_GROWTH
    )
    yield Figure("  checkpoint actor", watch.growth(rss("checkpoint actor"), SINCE), "<=", MOST_GROWTH)
    for kind in ("driver", "workers", "checkpoint actor"):
        yield Figure(f"  {kind}, at the end", watch.level(1.0, rss(kind)) / MIB, unit="MiB")
    yield Figure("RSS of Ray's own, end / at 20 %: raylet", watch.growth(rss("raylet"), SINCE))
    yield Figure("  GCS", watch.growth(rss("GCS"), SINCE))
    yield Figure("  dashboard, agents and idle workers", watch.growth(rss("other"), SINCE))


def _opened(watch: Watch) -> Iterator[Figure]:
    name = "descriptors of driver, workers and checkpoint actor, end / at 20 %"
    yield Figure(name, watch.growth(descriptors(*HOLDING), SINCE), "<=", MOST_GROWTH)
    yield Figure("  at the end", watch.level(1.0, descriptors(*HOLDING)))
    for kind in HOLDING:
        yield Figure(f"  {kind}", watch.growth(descriptors(kind), SINCE), "<=", MOST_GROWTH)
    never = watch.growth(oldest_worker("descriptors"), SINCE)
    yield Figure("  the worker that was never killed", never, "<=", MOST_GROWTH)
    yield Figure("  threads", watch.growth(threads(*HOLDING), SINCE), "<=", MOST_GROWTH)
    yield Figure("  Ray's own (raylet, GCS)", watch.growth(descriptors("raylet", "GCS"), SINCE))


def _log(soaked: Soaked) -> Iterator[Figure]:
    samples, last = soaked.watch.samples, soaked.watch.samples[-1]
    yield Figure("log on disk at the end, a task", last.log_bytes / soaked.watch.tasks, unit="bytes")
    yield Figure(
        "  the most while it ran", max(one.log_bytes for one in samples) / soaked.watch.tasks, unit="bytes"
    )
    yield Figure("  files, the most while it ran", max(one.log_files for one in samples))
    yield Figure("  files at the end", last.log_files, "<=", 2)


def _speed(soaked: Soaked) -> Iterator[Figure]:
    watch, ran = soaked.watch, soaked.watch.run
    span_s = ran[-1].at_s - ran[0].at_s
    yield Figure("tasks a second", (ran[-1].done - ran[0].done) / span_s if span_s else 0.0, unit="1/s")
    end = watch.end
    yield Figure(
        "after the last result, to the command's end", end[-1].at_s - end[0].at_s if end else 0.0, unit="s"
    )
    most = max((rss("driver")(one) for one in end), default=0.0)
    yield Figure("  the driver's RSS meanwhile, at most", most / MIB, unit="MiB")
    yield Figure("the command, from its start to its end", soaked.took_s, unit="s")


def main(
    tasks: Annotated[int, typer.Option(min=100)] = 100_000,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep pictures, log and run here.")] = None,
    quick: Annotated[bool, typer.Option(help="2,000 tasks; judges no growth.")] = False,
) -> None:
    """Soak the system, and tell what it holds."""
    folder = out or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "run").exists():
        raise typer.BadParameter(f"--out {folder}: expected a folder without a run")
    tasks = min(tasks, 2000) if quick else tasks
    soaked = soak(tasks, folder, every_s=0.25 if quick else 1.0, kills=FEW_KILLS if quick else KILLS)
    found = [
        replace(one, op=None, target=None) if quick and one.target == MOST_GROWTH else one
        for one in figures(soaked)
    ]
    pictures = soak_picture.draw(soaked.watch, SINCE, folder / "soak")
    code = report(found, json)
    print("Pictures:", ", ".join(map(str, pictures)))
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
