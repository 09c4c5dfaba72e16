"""How close tau2 runs come to ideal: `python -m benchmarks.tau2`.

Each simulation is the gold replay of its task by a model that answers over HTTP after 0.5 s, 48 in flight;
everything else is real: workers, environments, rewards, journal, event log. The clock runs from the first
call sent, when the workers are up, to the last result committed. The ideal is list scheduling of calls and
own CPU (`tau2_load.py`), on what other processes left of the machine's cores meanwhile; what it is of an idle
machine stands beside it.
Where tau2-bench is installed: retail, telecom and airline (278 tasks), and beside it tau2-bench's own
runner, a domain at a time, as shipped and with its connection cap lifted, each against the ideal of its
domains one after the other, with the same own CPU in it: what tau2-bench takes beyond that is its own.
Where it is not: the built-in service desk, repeated to as many simulations.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engine import session
from benchmarks.figures import Figure, report
from benchmarks.gold_model import gold_serving
from benchmarks.session import clocked, cpu_s, share_left, snapshot
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
    parts: tuple[str, ...] = ("ours", "official")
    own_work: Path | None = None


Figures = Iterator[Figure]


def measure(sizes: Sizes, folder: Path, *, is_official: bool) -> Figures:
    """All figures, in the order in which they are read."""
    load = read_load(
        OFFICIAL if is_official else BUILT_IN, sizes.limit, 0 if is_official else sizes.simulations
    )
    works = known_work(load, sizes.own_work)
    yield from _own_work(load, works)
    with gold_serving(load.scripts(), sizes.latency_s, folder) as server:
        if "ours" in sizes.parts:
            with session():
                ran = run_ours(
                    load, folder / "ours", server.url, sizes.in_flight, sizes.workers, {server.pid}
                )
            yield from _ours(sizes, load, works, ran)
    if is_official and "official" in sizes.parts:
        with gold_serving(load.scripts(), sizes.latency_s, folder) as server:
            for is_capped in (True, False):
                yield from _theirs(sizes, load, works, folder, server.url, is_capped=is_capped)


def known_work(load: Load, kept: Path | None) -> list[Work]:
    """The own work of each task: what an earlier command kept in this file, or measured now and kept."""
    if kept is not None and kept.exists():
        return [Work(**each) for each in json.loads(kept.read_text())]
    works = measured(load)
    if kept is not None:
        kept.write_text(json.dumps([asdict(work) for work in works]))
    return works


def _own_work(load: Load, works: Sequence[Work]) -> Figures:
    for domain in load.domains:
        own = [work for work in works if work.domain == domain]
        name = f"{domain}: {len(own)} tasks, own CPU of a simulation"
        yield Figure(name, 1000 * sum(work.cpu_s for work in own) / len(own), unit="ms")
        yield Figure("  model calls of a simulation", sum(work.calls for work in own) / len(own))
        solved = sum(work.reward == 1.0 for work in own) / len(own)
        yield Figure("  gold replays with reward 1", 100 * solved, "==", 100.0, "%")


def _ours(sizes: Sizes, load: Load, works: Sequence[Work], ran: Ran) -> Figures:
    each = [*works] * load.trials
    idle = ideal_s(each, sizes.latency_s, sizes.in_flight)
    ideal = ideal_s(each, sizes.latency_s, sizes.in_flight, share=ran.share)
    at = f"{load.simulations} simulations, {sizes.in_flight} in flight, {sizes.latency_s:g} s a call"
    yield Figure(f"ideal makespan / ours, {at}", ideal / ran.makespan_s, ">=", TARGET)
    yield Figure("  ours, from the first call sent to the last commit", ran.makespan_s, unit="s")
    yield Figure("  ideal, on what others left of the cores", ideal, unit="s")
    yield Figure("  left by others", 100 * ran.share, unit="%")
    yield Figure("  ideal of an idle machine / ours", idle / ran.makespan_s)
    yield Figure("  simulations with reward 1", 100 * ran.solved / load.simulations, "==", 100.0, "%")
    cpu_ms = 1000 * ran.cpu_s / load.simulations
    yield Figure("  CPU of a simulation, all processes of the session", cpu_ms, unit="ms")
    yield Figure("  model calls", ran.calls)


def _theirs(
    sizes: Sizes, load: Load, works: Sequence[Work], folder: Path, url: str, *, is_capped: bool
) -> Figures:
    tasks = {domain: load.of(domain) for domain in load.domains}
    place = folder / ("capped" if is_capped else "lifted")
    begin, before = clocked(), snapshot()
    runs = run_official(tasks, place, url, sizes.in_flight, is_capped=is_capped)
    burned_s = cpu_s(before, snapshot()).total() + sum(run.all_cpu_s for run in runs[-1:])
    share = share_left(begin, clocked(), burned_s)
    took_s = sum(run.took_s for run in runs)
    of_domains = [[work for work in works if work.domain == run.domain] for run in runs]
    idle, ideal = (
        sum(ideal_s(own, sizes.latency_s, sizes.in_flight, share=of) for own in of_domains)
        for of in (1.0, share)
    )
    how = "as shipped" if is_capped else "its connection cap lifted"
    yield Figure(f"tau2-bench's run_tasks, {how}: ideal of its domains / it", ideal / took_s)
    yield Figure("  seconds, all domains", took_s, unit="s")
    yield Figure("  left by others", 100 * share, unit="%")
    yield Figure("  ideal of an idle machine / it", idle / took_s)
    for run in runs:
        yield Figure(f"  {run.domain}", run.took_s, unit="s")
    solved = sum(run.solved for run in runs)
    yield Figure("  simulations with reward 1", 100 * solved / load.simulations, unit="%")
    yield Figure("  CPU of a simulation", 1000 * sum(run.cpu_s for run in runs) / load.simulations, unit="ms")


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="Seconds; judges nothing.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 4,
    in_flight: Annotated[int, typer.Option(min=1)] = 48,
    part: Annotated[str | None, typer.Option(help="ours or official alone.")] = None,
    own_work: Annotated[
        Path | None, typer.Option(help="Keep the tasks' own work in this file, or take it from there.")
    ] = None,
    built_in: Annotated[bool, typer.Option("--built-in", help="The service desk, in any case.")] = False,
) -> None:
    """Measure tau2 runs under a model that plays both sides by the gold actions."""
    is_official = not built_in and upstream.is_installed() and bool(os.environ.get(upstream.DATA_VARIABLE))
    if not is_official:
        print(f"The built-in domain only; for tau2-bench's: {upstream.HOW_TO_INSTALL}", file=sys.stderr)
    parts = (part,) if part else Sizes.parts
    sizes = Sizes(0.5, in_flight, workers, None, COMPARABLE, parts, own_work)
    if quick:
        sizes = replace(QUICK, parts=parts)
    figures = []
    with tempfile.TemporaryDirectory(prefix="bench-tau2-") as name:
        for figure in measure(sizes, Path(name), is_official=is_official):
            shown = replace(figure, op=None, target=None) if quick else figure
            print(shown.line, file=sys.stderr, flush=True)
            figures.append(shown)
    raise typer.Exit(report(figures, json_path))


QUICK = Sizes(0.1, 8, 2, 4, 20)

if __name__ == "__main__":
    typer.run(main)
