"""What the event log keeps, whatever is cut and whoever reads: `python -m benchmarks.log`.

Two claims. A stream that is cut at any byte gives back each batch that was complete before the cut, to a
reader and to recovery. A reader at work while writers append and publish and two mergers merge sees every
row that was flushed before it began, each once, without holes, and never fewer than before.
`--quick` looks at fewer snapshots and cuts at every 97th byte, and judges nothing.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from benchmarks.figures import Figure, report
from ray_app import events
from ray_app.compaction import compact, merge, recover
from ray_app.event_writer import EventWriter
from ray_app.records import Event
from ray_app.table_files import COMPACTED, STREAM, log_files

Table = Literal["log", "payloads"]
TABLES: tuple[Table, Table] = ("log", "payloads")
BATCHES, ROWS = 3, 2  # of the stream that is cut
WRITERS, READERS, MERGERS = 3, 2, 2
FLUSH_ROWS = 3
# Not as fast as they can: the readers are to get their share of two cores.
WRITE_EVERY_S, PUBLISH_S, MERGE_EVERY_S, MIN_FILES = 0.05, 0.4, 0.4, 3
START_S = 60.0
PAYLOADS_EVERY = 25  # snapshots: reading bodies says little more, and takes as long again
Figures = Iterator[Figure]
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    snapshots: int
    rounds: int  # each with a log of its own, so that a snapshot stays small
    cut_every: int = 1


@dataclass(frozen=True)
class Whole:
    """A stream of `BATCHES` batches: its bytes, and of each batch the byte at which it ends and its keys."""

    table: Table
    data: bytes
    ends: tuple[int, ...]
    keys: tuple[frozenset[str], ...]

    def lost(self, cut: int, found: frozenset[str]) -> int:
        """Batches that were complete before `cut` and of which something is not in `found`."""
        complete = [keys for end, keys in zip(self.ends, self.keys, strict=True) if end <= cut]
        if extra := found - frozenset().union(*complete):
            raise RuntimeError(
                f"{self.table} cut at byte {cut}: rows that were not complete: {sorted(extra)}"
            )
        return sum(not keys <= found for keys in complete)


def write_whole(folder: Path, table: Table) -> Whole:
    """Writes a stream through the real writer, and notes its size after each flush."""
    writer = EventWriter(folder, "w", flush_s=3600.0)
    ends, keys = [], []
    for batch in range(BATCHES):
        own = set()
        for row in range(ROWS):
            key = writer.payload(f"[{batch}, {row}]")
            event_id = writer.append(Event("turn", 1.7e9, call_seq=row, payload_hash=key, detail="x" * row))
            own.add(key if table == "payloads" else event_id)
        writer.flush()
        keys.append(frozenset(own))
        stream = next((folder / table).glob(f"*{STREAM}"))
        ends.append(stream.stat().st_size)
    data = stream.read_bytes()
    writer.close()
    return Whole(table, data, tuple(ends), tuple(keys))


def cut_at(whole: Whole, cuts: Sequence[int]) -> Counter[str]:
    """Batches lost to the reader and to recovery, and the cuts made."""
    told = Counter(cuts=len(cuts))
    every = frozenset().union(*whole.keys)
    with tempfile.TemporaryDirectory(prefix="bench-log-", dir=_memory()) as name:
        for cut in cuts:
            run_dir = Path(name) / "run"
            for table in TABLES:
                (run_dir / table).mkdir(parents=True)
            (run_dir / whole.table / f"w-000000{STREAM}").write_bytes(whole.data[:cut])
            told["read"] += whole.lost(cut, _keys(run_dir, whole.table, every))
            recover(run_dir)
            if left := list((run_dir / whole.table).glob(f"*{STREAM}")):
                raise RuntimeError(f"recovery left {left}")
            told["recovered"] += whole.lost(cut, _keys(run_dir, whole.table, every))
            shutil.rmtree(run_dir)
    return told


def _keys(run_dir: Path, table: Table, every: frozenset[str]) -> frozenset[str]:
    if table == "payloads":
        return frozenset(events.read_payloads(run_dir, every))
    return frozenset(events.read(run_dir, ["event_id"]).read_all()["event_id"].to_pylist())


def _memory() -> str | None:
    """A folder in memory, where there is one: this is about bytes, not about disks."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def cut_everywhere(sizes: Sizes, folder: Path) -> Figures:
    """Each table's stream, cut at every byte from none to all."""
    told: Counter[str] = Counter()
    with ProcessPoolExecutor(READERS, mp_context=_SPAWN) as pool:
        parts = []
        for table in TABLES:
            whole = write_whole(folder / table, table)
            cuts = range(0, len(whole.data) + 1, sizes.cut_every)
            parts += [pool.submit(cut_at, whole, cuts[start :: 2 * READERS]) for start in range(2 * READERS)]
        for part in parts:
            told += part.result()
    lost = told["read"] + told["recovered"]
    yield Figure("a log truncated at any byte: flushed batches not recovered", lost, "==", 0)
    yield Figure("  cuts, each through the reader and through recovery", told["cuts"])


class Shared(NamedTuple):
    """What the processes of a round know of each other, by writer or merger, and whether it is over."""

    flushed: Any  # rows
    merges: Any
    is_over: Any


_shared: Shared  # of this process


def _join(shared: Shared) -> None:
    global _shared  # noqa: PLW0603  a semaphore can only be inherited
    _shared = shared


def append_rows(run_dir: Path, index: int) -> int:
    """A writer: notes each flush, and publishes every `PUBLISH_S`. Returns the rows written."""
    writer = EventWriter(run_dir, f"w{index}", flush_s=WRITE_EVERY_S, publish_s=PUBLISH_S)
    for number in count(1):
        key = writer.payload(f"[{index}, {number}]")
        writer.append(Event("turn", 1.7e9, call_seq=number, payload_hash=key))
        if number % FLUSH_ROWS == 0:
            writer.flush()
            _shared.flushed[index] = number
            if _shared.is_over.wait(WRITE_EVERY_S):
                break
    writer.close()
    return writer.taken


def merge_parts(run_dir: Path, index: int) -> None:
    """A merger. There are two of them, as when that of an old driver wakes up."""
    while not _shared.is_over.wait(MERGE_EVERY_S):
        _shared.merges[index] += merge(run_dir, name=f"e{index}", min_files=MIN_FILES)


@dataclass
class Reader:
    """Takes snapshots and compares each with what was flushed before and with the one before."""

    run_dir: Path
    flushed: Sequence[int]
    before: list[int] = field(default_factory=lambda: [0] * WRITERS)

    def look(self, with_payloads: bool = True) -> set[str]:
        """What is wrong with a snapshot: `lost`, `doubled`, `back`; nothing, as it should be."""
        flushed = list(self.flushed)
        rows = events.read(self.run_dir, ["event_id", "payload_hash"]).read_all()
        ids, keys = rows["event_id"].to_pylist(), set(rows["payload_hash"].to_pylist())
        found = numbers_of(ids)
        counts = [len(numbers) for numbers in found]
        wrong = set[str]()
        if len(set(ids)) < len(ids):
            wrong.add("doubled")
        if any(len(numbers) < least for numbers, least in zip(found, flushed, strict=True)):
            wrong.add("lost")
        if any(numbers and max(numbers) + 1 > len(numbers) for numbers in found):
            wrong.add("lost")  # a hole
        if any(now < before for now, before in zip(counts, self.before, strict=True)):
            wrong.add("back")
        if with_payloads and events.read_payloads(self.run_dir, keys).keys() != keys:
            wrong.add("lost")
        self.before = counts
        return wrong


def numbers_of(ids: Iterable[str]) -> list[set[int]]:
    """The numbers of event ids, by writer."""
    numbers: list[set[int]] = [set() for _ in range(WRITERS)]
    for event_id in ids:
        writer, _, number = event_id.partition("-")
        numbers[int(writer[1:])].add(int(number))
    return numbers


def read_snapshots(run_dir: Path, snapshots: int) -> Counter[str]:
    """A reader: how many snapshots it took, how many of them were wrong, and what went on meanwhile."""
    until = time.monotonic() + START_S
    while not (all(_shared.flushed) and any(_shared.merges)):
        if time.monotonic() > until:
            raise RuntimeError(f"writers and mergers did not start in {START_S:g} s")
        time.sleep(WRITE_EVERY_S)
    told, reader = Counter[str](), Reader(run_dir, _shared.flushed)
    for number in range(snapshots):
        before = log_files(run_dir / "log")
        wrong = reader.look(number % PAYLOADS_EVERY == 0)
        told.update([*wrong, "snapshots", *(["wrong"] if wrong else [])])
        told["with streams"] += any(path.suffix == STREAM for path in before)
        told["with merged files"] += any(path.name.startswith(COMPACTED) for path in before)
        told["amid changes"] += before != log_files(run_dir / "log")
    return told


def snapshot_round(run_dir: Path, snapshots: int) -> Counter[str]:
    """Writers, mergers and readers at work on one log; what they tell."""
    flushed, merges = (_SPAWN.Array("q", size, lock=False) for size in (WRITERS, MERGERS))
    shared = Shared(flushed, merges, _SPAWN.Event())
    with ProcessPoolExecutor(WRITERS + MERGERS + READERS, _SPAWN, _join, (shared,)) as pool:
        writers = [pool.submit(append_rows, run_dir, index) for index in range(WRITERS)]
        mergers = [pool.submit(merge_parts, run_dir, index) for index in range(MERGERS)]
        readers = [pool.submit(read_snapshots, run_dir, snapshots // READERS) for _ in range(READERS)]
        try:
            told = sum((reader.result() for reader in readers), Counter[str]())
        finally:
            shared.is_over.set()
        told["rows"] = sum(writer.result() for writer in writers)
        for merger in mergers:
            merger.result()
    told["merges"] = sum(shared.merges)
    # What stood in the log before the last snapshot stands there still, and after the end's compaction.
    wrong = Reader(run_dir, flushed).look()
    compact(run_dir)
    told["wrong"] += bool(wrong | Reader(run_dir, flushed).look())
    return told


def snapshots_during_a_run(sizes: Sizes, folder: Path) -> Figures:
    """Snapshots by several readers, shared out over rounds."""
    share = sizes.snapshots // sizes.rounds
    rounds = (snapshot_round(folder / f"round-{number}", share) for number in range(sizes.rounds))
    told = sum(rounds, Counter[str]())
    name = f"{sizes.snapshots:,} reader snapshots during a run that lose, double or go back"
    yield Figure(name, told["wrong"], "==", 0)
    for kind in ("lost", "doubled", "back"):
        yield Figure(f"  {kind}", told[kind])
    for kind in ("snapshots", "with streams", "with merged files", "amid changes"):
        yield Figure(f"  {kind}" if kind == "snapshots" else f"  of them {kind}", told[kind])
    yield Figure("  rows written", told["rows"])
    yield Figure("  merges", told["merges"])


def measure(sizes: Sizes) -> Figures:
    """All figures, in the order in which they are read."""
    with tempfile.TemporaryDirectory(prefix="bench-log-") as name:
        for part in (cut_everywhere, snapshots_during_a_run):
            yield from part(sizes, Path(name))


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option(help="Some seconds; judges nothing.")] = False,
) -> None:
    """Measure what the event log keeps."""
    figures = []
    for figure in measure(QUICK if quick else FULL):
        shown = replace(figure, op=None, target=None) if quick else figure
        print(shown.line, file=sys.stderr, flush=True)
        figures.append(shown)
    raise typer.Exit(report(figures, json))


FULL = Sizes(snapshots=10_000, rounds=5)
QUICK = Sizes(snapshots=200, rounds=1, cut_every=97)

if __name__ == "__main__":
    typer.run(main)
