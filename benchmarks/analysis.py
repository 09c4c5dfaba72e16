"""What `python -m analysis` takes on a run of a million events: `python -m benchmarks.analysis`.

The run is generated (`analysis_run.py`) in the real schema, as a run that ended (one compacted file), as one
that goes on (files, streams and doubles of eight workers), and as the text log that older systems would have
left of it. Each command runs in a process of its own, imports and all, with standard output going nowhere:
wall time and peak memory, and once more with pictures. Then, with imports warm in one process, the query
(everything `timing` shows, out of the log) beside regular expressions over the text log (`text_log.py`), in
turns; both must find the same. Last, the pages of two runs with texts: built cold, and opened in Chromium.
The first fits whole; of the second, which is larger than 20 MB can hold, it is told how much is left.
`--quick` is smaller and judges nothing.
"""

from __future__ import annotations

import codecs
import json as jsonlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from analysis.page_texts import CUT_BYTES
from benchmarks import text_log
from benchmarks.analysis_run import make_run, write_finished, write_live, write_text_log
from benchmarks.analysis_texts import write_texts
from benchmarks.chromium import chromium, time_page
from benchmarks.figures import Figure, report

# What is asked of each command; RUN stands for the run.
COMMANDS = {
    "summary": ("RUN",),
    "timing": ("RUN",),
    "usage": ("RUN",),
    "duration": ("RUN", "--tool", "search", "--model", "gpt-5"),
    "critical-path": ("RUN",),
    "compare": ("RUN", "RUN"),
    "show": ("RUN", f"{1:024x}"),
    "sql": ("select tool, model, count(*), avg(duration_s), sum(cost_usd) from events group by all", "RUN"),
    "watch": ("RUN", "--once"),
}
WITHOUT_PICTURES = ("show", "sql", "watch")
FIGURES_S, PICTURES_S, RSS_BYTES, FASTER = 3.0, 6.0, 1 << 30, 10.0
PAGE_MB, PAGE_S = 20.0, 2.0
# By which names the text log and the event log know the same quantity.
SAME = {
    ("tool", "search"): ("tool", "search"),
    ("tool", "enhance_reasoning"): ("tool", "enhance_reasoning"),
    ("tool", "answer"): ("tool", "answer"),
    ("stage", "retrieval_ms"): ("stage", "retrieval"),
    ("stage", "exec_ms"): ("stage", "code"),
    ("stage", "judge"): ("stage", "judge"),
    ("orchestrator", "prefill"): ("orchestrator", "prefill"),
    ("orchestrator", "decode"): ("orchestrator", "decode"),
    ("orchestrator", "inference"): ("orchestrator", "inference"),
    ("orchestrator", "prompt"): ("tokens", "prompt"),
    ("orchestrator", "completion"): ("tokens", "completion"),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured; each time is the median of `rounds`."""

    events: int
    tasks: int
    rounds: int
    page_events: tuple[int, int]
    page_tasks: int


class Cost(NamedTuple):
    """Of a process: wall and CPU seconds, and peak resident bytes."""

    wall_s: float
    cpu_s: float
    rss: int


# In a small process: on Linux the peak memory of a child counts what its parent held when it was started.
_LAUNCH = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall_s = time.perf_counter() - started
cost = wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
print(json.dumps([os.waitstatus_to_exitcode(status), cost]))
"""


def run_command(command: str, run_dir: Path, *options: str) -> Cost:
    """A cold process of one command. Raises RuntimeError where it fails."""
    words = [str(run_dir) if word == "RUN" else word for word in COMMANDS.get(command, ("RUN",))]
    arguments = [sys.executable, "-m", "analysis", command, *words, *options]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCH, *arguments], stdout=subprocess.PIPE, check=True
    )
    code, cost = jsonlib.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {code}")
    return Cost(*cost)


def commands(folder: Path, rounds: int) -> Iterator[Figure]:
    """Each command on the finished run and on the live one, with and without pictures."""
    for command in COMMANDS:
        plain, drawn, live = list[Cost](), list[Cost](), list[Cost]()
        for _ in range(rounds):
            plain.append(run_command(command, folder / "finished"))
            live.append(run_command(command, folder / "live"))
            if command not in WITHOUT_PICTURES:
                drawn.append(run_command(command, folder / "finished", "--out", str(folder / "pictures")))
        figures_s = _median(plain)
        yield Figure(f"{command}: figures, cold process", figures_s, "<=", FIGURES_S, "s")
        yield Figure("  CPU", statistics.median(cost.cpu_s for cost in plain), unit="s")
        yield Figure("  the same of the run while it goes on", _median(live), "<=", FIGURES_S, "s")
        if drawn:
            yield Figure("  pictures, beyond that", _median(drawn) - figures_s, "<=", PICTURES_S, "s")
        peak = max(cost.rss for cost in (*plain, *drawn, *live))
        yield Figure("  peak memory", peak / 2**20, "<=", RSS_BYTES / 2**20, "MiB")


def report_page(folder: Path, sizes: Sizes, *, is_larger: bool) -> Iterator[Figure]:
    """The page of a run with texts: built cold, and opened in Chromium where there is one."""
    run = make_run(sizes.page_events[is_larger], sizes.page_tasks)
    told = folder / f"told-{len(run.table)}"
    write_finished(run, told)
    characters = write_texts(run, told)
    page = folder / "page.html"
    cost = run_command("report", told, "--no-redact", "--out", str(page))
    body = page.read_bytes()
    markup = body.decode("utf-16" if body.startswith(codecs.BOM_UTF16) else "utf-8")
    held = re.search(r'"text_bytes":(\d+),"document_bytes":(\d+)', markup)
    if held is None:
        raise RuntimeError(f"{page} does not say how much it holds of each text")
    yield Figure("report: events of a run with texts", len(run.table))
    yield Figure("  tasks", run.tasks)
    yield Figure("  characters of its texts", characters / 1e6, unit="million")
    yield Figure("  build, cold process", cost.wall_s, unit="s")
    yield Figure("  peak memory", cost.rss / 2**20, "<=", RSS_BYTES / 2**20, "MiB")
    yield Figure("  size of the page", page.stat().st_size / 1e6, "<", PAGE_MB, "MB")
    yield Figure("  of each text at most", int(held[1]), ">=", CUT_BYTES, "bytes")
    document = Figure("  of each document at most", int(held[2]), unit="bytes")
    yield document if is_larger else replace(document, op=">=", target=CUT_BYTES)
    if chromium() is None:
        print("no Chromium here: how soon the page answers is not measured", file=sys.stderr)
        return
    openings = time_page(page, sizes.rounds)
    interactive_s = statistics.median(opening.interactive_s for opening in openings)
    task_s = statistics.median(opening.task_s for opening in openings)
    yield Figure("  interactive in Chromium", interactive_s, "<=", PAGE_S, "s")
    yield Figure("  its last task opened by keys", task_s, "<=", PAGE_S, "s")


def _median(costs: list[Cost]) -> float:
    return statistics.median(cost.wall_s for cost in costs)


def query(folder: Path, rounds: int) -> Iterator[Figure]:
    """The query beside the parse, in a process of its own."""
    arguments = [sys.executable, "-m", "benchmarks.analysis", "--query", str(folder), "--rounds", str(rounds)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True)
    times = jsonlib.loads(done.stdout)
    ours = times["query"]
    yield Figure("query of all that timing shows, imports warm", ours, unit="s")
    yield Figure("parse of the text log, a pattern a field / query", times["by_field"] / ours, ">=", FASTER)
    yield Figure("  parse of the text log, a pattern a line / query", times["by_line"] / ours)


def time_query(folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds of each way, in turns. Raises RuntimeError where they find different things."""
    from analysis.log import open_run
    from analysis.selection import LAST_SEGMENT
    from analysis.timing import COLUMNS, quantities

    log, text = folder / "finished", folder / "hle.log"

    def ours() -> dict[tuple[str, str], np.ndarray[tuple[int], np.dtype[np.float64]]]:
        found = quantities(open_run(log, LAST_SEGMENT, COLUMNS))
        return {(one.group, one.name): one.values for one in found}

    ways: dict[str, Callable[[], object]] = {
        "query": ours,
        "by_field": lambda: text_log.by_field(text),
        "by_line": lambda: text_log.by_line(text),
    }
    check(ours(), text_log.by_field(text))
    check(ours(), text_log.by_line(text))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def check(ours: dict, theirs: text_log.Found) -> None:  # type: ignore[type-arg]
    """The text log has two decimals of a millisecond; what it holds must be what the event log holds."""
    for name, own in SAME.items():
        unit = 1.0 if own[0] == "tokens" else 1000.0
        left, right = np.sort(ours[own]) * unit, np.sort(theirs[name])
        if len(left) != len(right) or np.abs(left - right).max() > 0.0151:
            raise RuntimeError(f"{own}: the event log and the text log differ")


def measure(sizes: Sizes, folder: Path) -> Iterator[Figure]:
    """All figures, in the order in which they are read."""
    run = make_run(sizes.events, sizes.tasks)
    write_finished(run, folder / "finished")
    write_live(run, folder / "live")
    lines = write_text_log(run, folder / "hle.log")
    yield Figure("events", len(run.table))
    yield Figure("  tasks", run.tasks)
    yield Figure("  lines of the text log", lines)
    del run
    yield from commands(folder, sizes.rounds)
    yield from query(folder, sizes.rounds)
    for is_larger in (False, True):
        yield from report_page(folder, sizes, is_larger=is_larger)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="Some seconds; judges nothing.")] = False,
    query: Annotated[Path | None, typer.Option(help="Only time the query on the run made here.")] = None,
    rounds: Annotated[int, typer.Option(help="Of the query.")] = 5,
) -> None:
    """Measure the commands of the analysis on a large run."""
    if query is not None:
        print(jsonlib.dumps(time_query(query, rounds)))
        return
    figures = []
    with tempfile.TemporaryDirectory(prefix="bench-analysis-") as name:
        for figure in measure(QUICK if quick else FULL, Path(name)):
            shown = replace(figure, op=None, target=None) if quick else figure
            print(shown.line, file=sys.stderr, flush=True)
            figures.append(shown)
    raise typer.Exit(report(figures, json))


FULL = Sizes(events=1_000_000, tasks=5000, rounds=5, page_events=(100_000, 160_000), page_tasks=2500)
QUICK = Sizes(events=20_000, tasks=200, rounds=1, page_events=(10_000, 12_000), page_tasks=200)

if __name__ == "__main__":
    typer.run(main)
