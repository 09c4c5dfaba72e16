"""How close tau2 runs come to ideal: `python -m benchmarks.tau2`.

Each simulation is the gold replay of its task by a model that answers over HTTP after 0.5 s, 48 in flight;
everything else is real: workers, environments, rewards, journal, event log. The clock runs from the first
call sent to the last result committed. The ideal is list scheduling of calls and own CPU (`tau2_load.py`).
Where tau2-bench is installed: retail, telecom and airline (278 tasks), and beside it tau2-bench's own
runner, a domain at a time, as shipped and with its connection cap lifted, each against the ideal of its
domains one after the other. Where it is not: the built-in service desk, repeated to as many simulations.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engine import session
from benchmarks.figures import Figure, report
from benchmarks.gold_model import gold_serving
from benchmarks.tau2_load import BUILT_IN, OFFICIAL, Load, Work, ideal_s, measured, read_load
from benchmarks.tau2_official import run_official
from benchmarks.tau2_runs import Ran, run_ours
from ray_app.tau2 import upstream

TARGET = 0.9
COMPARABLE = 278


@dataclass(frozen=True)
class Sizes:
    """How much is measured: tasks of each domain (None: all), simulations of the built-in one."""

    latency_s: float
    in_flight: int
    workers: int
    limit: int | None
    simulations: int


Figures = Iterator[Figure]


def measure(sizes: Sizes, folder: Path, *, is_official: bool) -> Figures:
    """All figures, in the order in which they are read."""
    load = read_load(
        OFFICIAL if is_official else BUILT_IN, sizes.limit, 0 if is_official else sizes.simulations
    )
    works = measured(load)
    yield from _own_work(load, works)
    with gold_serving(load.scripts(), sizes.latency_s, folder) as server:
        with session():
            ran = run_ours(load, folder / "ours", server.url, sizes.in_flight, sizes.workers, {server.pid})
        yield from _ours(sizes, load, works, ran)
        if is_official:
            for is_capped in (True, False):
                yield from _theirs(sizes, load, works, folder, server.url, is_capped=is_capped)


def _own_work(load: Load, works: Sequence[Work]) -> Figures:
    for domain in load.domains:
        own = [work for work in works if work.domain == domain]
        name = f"{domain}: {len(own)} tasks, own CPU of a simulation"
        yield Figure(name, 1000 * sum(work.cpu_s for work in own) / len(own), unit="ms")
        yield Figure("  model calls of a simulation", sum(work.calls for work in own) / len(own))
        solved = sum(work.reward == 1.0 for work in own) / len(own)
        yield Figure("  gold replays with reward 1", 100 * solved, "==", 100.0, "%")


def _ours(sizes: Sizes, load: Load, works: Sequence[Work], ran: Ran) -> Figures:
    ideal = ideal_s([*works] * load.trials, sizes.latency_s, sizes.in_flight)
    at = f"{load.simulations} simulations, {sizes.in_flight} in flight, {sizes.latency_s:g} s a call"
    yield Figure(f"ideal makespan / ours, {at}", ideal / ran.makespan_s, ">=", TARGET)
    yield Figure("  ours, from the first call sent to the last commit", ran.makespan_s, unit="s")
    yield Figure("  ideal", ideal, unit="s")
    yield Figure("  simulations with reward 1", 100 * ran.solved / load.simulations, "==", 100.0, "%")
    cpu_ms = 1000 * ran.cpu_s / load.simulations
    yield Figure("  CPU of a simulation, all processes of the session", cpu_ms, unit="ms")
    yield Figure("  model calls", ran.calls)


def _theirs(
    sizes: Sizes, load: Load, works: Sequence[Work], folder: Path, url: str, *, is_capped: bool
) -> Figures:
    tasks = {domain: load.of(domain) for domain in load.domains}
    place = folder / ("capped" if is_capped else "lifted")
    runs = run_official(tasks, place, url, sizes.in_flight, is_capped=is_capped)
    took_s = sum(run.took_s for run in runs)
    of_domains = [[work for work in works if work.domain == run.domain] for run in runs]
    ideal = sum(ideal_s(own, sizes.latency_s, sizes.in_flight) for own in of_domains)
    how = "as shipped" if is_capped else "its connection cap lifted"
    yield Figure(f"tau2-bench's run_tasks, {how}: ideal of its domains / it", ideal / took_s)
    yield Figure("  seconds, all domains", took_s, unit="s")
    for run in runs:
        yield Figure(f"  {run.domain}", run.took_s, unit="s")
    solved = sum(run.solved for run in runs)
    yield Figure("  simulations with reward 1", 100 * solved / load.simulations, unit="%")
    yield Figure("  CPU of a simulation", 1000 * sum(run.cpu_s for run in runs) / load.simulations, unit="ms")


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="Seconds; judges nothing.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 4,
    in_flight: Annotated[int, typer.Option(min=1)] = 48,
    built_in: Annotated[bool, typer.Option("--built-in", help="The service desk, in any case.")] = False,
) -> None:
    """Measure tau2 runs under a model that plays both sides by the gold actions."""
    is_official = not built_in and upstream.is_installed() and bool(os.environ.get(upstream.DATA_VARIABLE))
    if not is_official:
        print(f"The built-in domain only; for tau2-bench's: {upstream.HOW_TO_INSTALL}", file=sys.stderr)
    sizes = Sizes(0.5, in_flight, workers, None, COMPARABLE)
    if quick:
        sizes = replace(QUICK, workers=min(workers, QUICK.workers))
    figures = []
    with tempfile.TemporaryDirectory(prefix="bench-tau2-") as name:
        for figure in measure(sizes, Path(name), is_official=is_official):
            shown = replace(figure, op=None, target=None) if quick else figure
            print(shown.line, file=sys.stderr, flush=True)
            figures.append(shown)
    raise typer.Exit(report(figures, json))


QUICK = Sizes(0.1, 8, 2, 4, 20)

if __name__ == "__main__":
    typer.run(main)
