"""The parts of the retriever's benchmark: what is measured, and the figures that come of it.

Where a figure could be taken over HTTP or by handle and the table asks for one, it is the worse of both;
against the reference design, which has HTTP alone, it is HTTP's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks import retriever_data
from benchmarks.figures import Figure
from benchmarks.retriever_disturbed import fallbacks, long_query
from benchmarks.retriever_memory import measure_memory
from benchmarks.retriever_oracle import Oracle
from benchmarks.retriever_stand import Ran, Stand, Target, median_ratio, rounds
from benchmarks.stub_encoder import NOOP, PACED
from ray_app.retrieval.build import CORPUS
from ray_app.retrieval.corpus import Corpus
from ray_app.retrieval.encoder import BUNDLED, Encoder
from ray_app.retrieval.search import MIN_CHARS

ENCODERS = {BUNDLED: "MiniLM", PACED: "stub of 20 ms + 0.02 ms a padded token", NOOP: "no-op encoder"}

Figures = Iterator[Figure]


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `many` and `few` are clients, `counted`, `stub`, `slow`, `lone` and `judged`
    queries of one round: with `encoder`, with a stub, beside the reference, one at a time, for the recall.
    """

    encoder: str
    data: retriever_data.Sizes
    many: int
    few: int
    rounds: int
    counted: int
    stub_rounds: int
    stub: int
    slow: int
    lone_rounds: int
    lone: int
    judged: int
    beside_s: float
    beside_rounds: int
    beside_clients: int
    bursts: int
    each: int
    documents: int
    winners: int


FULL = Sizes(
    encoder=BUNDLED,
    data=retriever_data.Sizes(),
    many=512,
    few=64,
    rounds=5,
    counted=1024,
    stub_rounds=3,
    stub=2048,
    slow=512,
    lone_rounds=60,
    lone=5,
    judged=256,
    beside_s=7.0,
    beside_rounds=5,
    beside_clients=64,
    bursts=8,
    each=8,
    documents=1_000_000,
    winners=20_000,
)
# A stub in MiniLM's place: each server that loads a model takes seconds.
SMALL = Sizes(
    encoder=NOOP,
    data=retriever_data.Sizes(rows=2000, questions=40, queries=512),
    many=16,
    few=4,
    rounds=1,
    counted=32,
    stub_rounds=1,
    stub=64,
    slow=16,
    lone_rounds=1,
    lone=4,
    judged=32,
    beside_s=0.5,
    beside_rounds=1,
    beside_clients=8,
    bursts=1,
    each=2,
    documents=5000,
    winners=500,
)


@dataclass(frozen=True)
class Bench:
    """The sections, each a part of the table with what explains it."""

    stand: Stand
    sizes: Sizes
    encoder: Encoder

    def ours(self, encoder: str) -> tuple[Target, Target]:
        """Over HTTP, by handle."""
        app = next(name for name in (BUNDLED, "paced", "noop") if encoder.endswith(name))
        return self.stand.ours(app, encoder=encoder)

    def throughput(self) -> Figures:
        """With MiniLM, against the plain server."""
        sizes = self.sizes
        targets = [self.stand.plain(sizes.encoder), *self.ours(sizes.encoder)]
        yield Figure("cores that all servers together use while idle", self.stand.idle_cores(sizes.beside_s))
        many = rounds(self.stand, targets, sizes.many, sizes.counted, sizes.rounds)
        at = f"{ENCODERS[sizes.encoder]}, 64-token queries, {sizes.many} clients"
        name = f"throughput against a plain server, {at}"
        for place, how in ((2, "by handle"), (1, "over HTTP")):
            ratio = median_ratio((ran[place].per_s, ran[0].per_s) for ran in many)
            yield Figure(f"{name}: {how}", ratio, ">=", 0.9)
        batches = {
            how: median_ratio((ran[place].mean_batch, ran[0].mean_batch) for ran in many)
            for place, how in ((2, "by handle"), (1, "over HTTP"))
        }
        name = "mean batch against the plain server's in the same conditions"
        yield from worst_of(Figure(name, min(batches.values()), ">=", 0.9), batches)
        yield from table(self.sizes.encoder, many)
        few = rounds(self.stand, targets, sizes.few, max(1, sizes.counted // 4), 2)
        yield from table(self.sizes.encoder, few)

    def transport(self) -> Figures:
        """What is left where the encoder costs nothing, or what a GPU's would."""
        for encoder in (NOOP, PACED):
            targets = [self.stand.plain(encoder), *self.ours(encoder)]
            for clients in (self.sizes.many, self.sizes.few):
                done = rounds(self.stand, targets, clients, self.sizes.stub, self.sizes.stub_rounds)
                for place, how in ((2, "by handle"), (1, "over HTTP")):
                    ratio = median_ratio((ran[place].per_s, ran[0].per_s) for ran in done)
                    name = f"throughput against a plain server, {ENCODERS[encoder]}, {clients} clients"
                    yield Figure(f"{name}: {how}", ratio)
                yield from table(encoder, done)

    def lone(self) -> Figures:
        """One request at a time."""
        for encoder in dict.fromkeys((self.sizes.encoder, NOOP)):
            targets = [self.stand.plain(encoder), *self.ours(encoder)]
            done = rounds(self.stand, targets, 1, self.sizes.lone, self.sizes.lone_rounds)
            for place, how, most in ((2, "by handle", 1.1), (1, "over HTTP", 1.2)):
                ratio = median_ratio((ran[place].p50_ms, ran[0].p50_ms) for ran in done)
                row = Figure(f"latency of a lone request against the plain server: {how}", ratio, "<=", most)
                told = replace(row, name=f"  {row.name}, {ENCODERS[encoder]}", op=None, target=None)
                yield row if encoder == self.sizes.encoder else told
            yield from table(encoder, done)

    def reference(self) -> Figures:
        """Against the design that ours replaces: where the encoder leaves the cores to others, and where not.

        Judged is the former, as beside a GPU. MiniLM on the same two cores takes most of every design's time:
        what it alone would reach is below the first target, and stands beside what was reached.
        """
        for encoder in dict.fromkeys((PACED, self.sizes.encoder)):
            yield from self._reference(encoder)

    def _reference(self, encoder: str) -> Figures:
        sizes = self.sizes
        slow = [self.stand.reference(encoder, rows) for rows in ("datasets", "ids")]
        done = rounds(self.stand, [self.ours(encoder)[0], *slow], sizes.many, sizes.slow, sizes.rounds)
        name = "throughput against the reference design"
        for place, how, least in (
            (1, "reading rows through datasets", 5.0),
            (2, "with an in-memory id array", 2.0),
        ):
            ratio = median_ratio((ran[0].per_s, ran[place].per_s) for ran in done)
            row = Figure(f"{name} {how}, {ENCODERS[encoder]}", ratio, ">=", least)
            yield row if encoder == PACED else replace(row, name=f"  {row.name}", op=None, target=None)
            limit = median_ratio(
                (len(ran[0].latencies_ms) / ran[0].encode_s, ran[place].per_s) for ran in done
            )
            yield Figure("  what the encoder alone would reach, without any server around it", limit)
        yield from table(encoder, done)
        few = rounds(self.stand, slow, sizes.few, max(1, sizes.slow // 4), 1)
        yield from table(encoder, few)

    def recall(self) -> Figures:
        """What is found of what should be, by every server for the same queries."""
        judge = self._oracle()
        http, handle = self.ours(self.sizes.encoder)
        others = [
            self.stand.plain(self.sizes.encoder),
            self.stand.reference(self.sizes.encoder, "datasets"),
            self.stand.reference(self.sizes.encoder, "ids"),
            self.stand.reference(self.sizes.encoder, "ids", depth=min(100, self.sizes.data.rows)),
        ]
        recalls = {target.name: self._recall(judge, target) for target in (http, handle, *others)}
        ours = min(recalls[http.name], recalls[handle.name])
        yield Figure("recall@50 in scope", ours, "==", 1.0)
        for name, value in recalls.items():
            yield Figure(f"  recall@50 in scope: {name}", value)

    def _recall(self, judge: Oracle, target: Target) -> float:
        count = self.sizes.judged
        ran = self.stand.run(target, min(count, 64), count, start=0, keep=count)
        numbers = sorted(ran.kept)
        queries = self.stand.queries(numbers)
        vectors = self.encoder.encode(self.encoder.tokenize([query.text for query in queries]))
        return judge.recall(queries, vectors, [ran.kept[number] for number in numbers])

    def _oracle(self) -> Oracle:
        data, corpus = self.stand.data, Corpus.open(self.stand.data.folder / CORPUS)
        vectors = np.load(data.vectors, mmap_mode="r")
        return Oracle(vectors, corpus.ids, corpus.chars > MIN_CHARS, data.scope_rows())

    def fallback(self) -> Figures:
        """Ordinary requests while others wait for the web."""
        sizes = self.sizes
        yield from fallbacks(self.stand, sizes.beside_clients, sizes.beside_s, sizes.beside_rounds)

    def long(self) -> Figures:
        """Short queries with a very long one in their midst."""
        yield from long_query(self.stand, self.sizes.bursts, self.sizes.each)

    def memory(self) -> Figures:
        """What a replica holds of many documents."""
        yield from measure_memory(self.stand, self.sizes.documents, self.sizes.winners)


def worst_of(judged: Figure, values: Mapping[str, float]) -> Figures:
    """A figure that is judged by the worst of several values, and these."""
    yield judged
    for how, value in values.items():
        yield Figure(f"  {judged.name}: {how}", value)


def table(encoder: str, done: Sequence[Sequence[Ran]]) -> Figures:
    """The medians over the rounds of what each server did."""
    for ran in zip(*done, strict=True):
        head = f"  {ENCODERS[encoder]}, {ran[0].clients} clients, {ran[0].target.name}"
        yield Figure(f"{head}: throughput", statistics.median(r.per_s for r in ran), unit="1/s")
        yield Figure(f"{head}: p50", statistics.median(r.p50_ms for r in ran), unit="ms")
        yield Figure(f"{head}: p99", statistics.median(r.p99_ms for r in ran), unit="ms")
        yield Figure(f"{head}: mean batch", statistics.median(r.mean_batch for r in ran))
        if any(r.encode_s for r in ran):
            encode_ms = statistics.median(r.encode_ms for r in ran)
            yield Figure(f"{head}: time in the encoder per request", encode_ms, unit="ms")
        yield Figure(f"{head}: RSS of its process", ran[-1].rss_mib, unit="MiB")
        for kind in sorted({kind for r in ran for kind in r.cpu_ms}):
            used_ms = statistics.median(r.cpu_ms.get(kind, 0.0) for r in ran)
            if used_ms >= 0.02:
                yield Figure(f"{head}: CPU per request, {kind}", used_ms, unit="ms")


# In the order in which they are read.
SECTIONS: dict[str, Callable[[Bench], Figures]] = {
    "throughput": Bench.throughput,
    "transport": Bench.transport,
    "lone": Bench.lone,
    "reference": Bench.reference,
    "recall": Bench.recall,
    "fallback": Bench.fallback,
    "long": Bench.long,
    "memory": Bench.memory,
}
