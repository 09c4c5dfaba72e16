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
from benchmarks.retriever_data import EMPTY_EIDS, Query
from benchmarks.retriever_memory import measure_memory
from benchmarks.retriever_oracle import Oracle
from benchmarks.retriever_stand import WEB_KEY_VARIABLE, Ran, Stand, Target, median_ratio, p99, rounds
from benchmarks.stub_encoder import CHARS_PER_TOKEN, NOOP, PACED
from ray_app.retrieval.build import CORPUS
from ray_app.retrieval.corpus import Corpus
from ray_app.retrieval.encoder import BUNDLED, Encoder
from ray_app.retrieval.search import MIN_CHARS

SEARCH_S, PAGE_S = 1.0, 6.0
FALLBACKS = 3
LONG_TOKENS, SHORT_QUERIES = 30_000, 255
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
    stub: int
    slow_rounds: int
    slow: int
    lone_rounds: int
    lone: int
    judged: int
    beside_s: float
    beside_rounds: int
    beside_clients: int
    bursts: int
    documents: int
    winners: int


FULL = Sizes(
    encoder=BUNDLED,
    data=retriever_data.Sizes(),
    many=512,
    few=64,
    rounds=5,
    counted=1536,
    stub=4096,
    slow_rounds=3,
    slow=768,
    lone_rounds=60,
    lone=5,
    judged=256,
    beside_s=SEARCH_S + PAGE_S,
    beside_rounds=3,
    beside_clients=64,
    bursts=8,
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
    stub=64,
    slow_rounds=1,
    slow=16,
    lone_rounds=1,
    lone=4,
    judged=32,
    beside_s=0.5,
    beside_rounds=1,
    beside_clients=8,
    bursts=1,
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
        return self.stand.over_http(app, encoder=encoder), self.stand.by_handle(app, encoder=encoder)

    def throughput(self) -> Figures:
        """With MiniLM, against the plain server."""
        sizes, targets = self.sizes, [self.stand.plain(self.sizes.encoder), *self.ours(self.sizes.encoder)]
        name = f"cores that all servers together use while idle ({self.stand.proxy} before our replicas)"
        yield Figure(name, self.stand.idle_cores(self.sizes.beside_s))
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
                done = rounds(self.stand, targets, clients, self.sizes.stub, 3)
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
        """Against the design that ours replaces."""
        sizes, (http, handle) = self.sizes, self.ours(self.sizes.encoder)
        slow = [self.stand.reference(self.sizes.encoder, rows) for rows in ("datasets", "ids")]
        done = rounds(self.stand, [http, handle, *slow], sizes.many, sizes.slow, sizes.slow_rounds)
        name = "throughput against the reference design"
        for place, how, least in (
            (2, "reading rows through datasets", 5.0),
            (3, "with an in-memory id array", 2.0),
        ):
            ratio = median_ratio((ran[0].per_s, ran[place].per_s) for ran in done)
            yield Figure(f"{name} {how}", ratio, ">=", least)
            ratio = median_ratio((ran[1].per_s, ran[place].per_s) for ran in done)
            yield Figure("  the same, but ours by handle in place of HTTP", ratio)
        yield from table(self.sizes.encoder, [ran[2:] for ran in done])
        few = rounds(self.stand, slow, sizes.few, max(1, sizes.slow // 4), 1)
        yield from table(self.sizes.encoder, few)

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
        url = self.stand.web(self._scaled(SEARCH_S), self._scaled(PAGE_S))
        web = {
            "base_url": url,
            "api_key_env": WEB_KEY_VARIABLE,
            "cache_dir": str(self.stand.folder / "web"),
            "max_concurrency": 20 * FALLBACKS,
        }
        ours = [make("web", encoder=PACED, web=web) for make in (self.stand.over_http, self.stand.by_handle)]
        found = {target: self._beside_fallbacks(target, self.sizes.beside_rounds) for target in ours}
        name = "p99 of ordinary requests while three fallbacks of 7 s run, against none running"
        yield Figure(name, max(ratio for ratio, _ in found.values()), "<=", 1.3)
        reference = self.stand.reference(PACED, "ids", fallback_s=self._scaled(SEARCH_S + PAGE_S))
        found[reference] = self._beside_fallbacks(reference, 1)
        for target, (ratio, done) in found.items():
            yield Figure(f"  the same: {target.name}", ratio)
            for place, how in ((0, "with none"), (1, "with three")):
                p99_ms = statistics.median(pair[place].p99_ms for pair in done)
                yield Figure(f"  p99 of ordinary requests, {how}: {target.name}", p99_ms, unit="ms")
            took_ms = statistics.median(done[0][1].extra_ms)
            yield Figure(f"  a fallback takes: {target.name}", took_ms / 1000, unit="s")

    def _scaled(self, seconds: float) -> float:
        return seconds * self.sizes.beside_s / (SEARCH_S + PAGE_S)

    def _beside_fallbacks(self, target: Target, times: int) -> tuple[float, list[tuple[Ran, Ran]]]:
        clients, seconds = self.sizes.beside_clients, self.sizes.beside_s
        done = []
        for number in range(times):
            # Different each time: what the cache has is no fallback.
            asked = [(f"{target.name} {number} {eid}", eid) for eid in EMPTY_EIDS[:FALLBACKS]]
            alone = self.stand.run(target, clients, 100_000, seconds=seconds)
            beside = self.stand.run(target, clients, 100_000, seconds=seconds, extra=asked)
            done.append((alone, beside))
        return median_ratio((beside.p99_ms, alone.p99_ms) for alone, beside in done), done

    def long(self) -> Figures:
        """Short queries that come at once, with a very long one in their midst."""
        text = "word " * (LONG_TOKENS * CHARS_PER_TOKEN // 5)
        extra = [Query(text, self.stand.data.queries[0].eid)]
        name = "one 30,000-token query among 255 short ones: p99 of the short ones, against without it"
        found = {target: self._bursts(target, extra) for target in self.ours(PACED)}
        yield Figure(name, max(p99(beside) / p99(alone) for alone, beside, _ in found.values()), "<=", 1.5)
        plain = self.stand.plain(PACED)
        found[plain] = self._bursts(plain, extra)
        for target, (alone, beside, long_ms) in found.items():
            yield Figure(f"  the same: {target.name}", p99(beside) / p99(alone))
            yield Figure(f"  p99 of the short ones without it: {target.name}", p99(alone), unit="ms")
            yield Figure(f"  p99 of the short ones with it: {target.name}", p99(beside), unit="ms")
            yield Figure(f"  the long one takes: {target.name}", statistics.median(long_ms), unit="ms")

    def _bursts(self, target: Target, extra: Sequence[Query]) -> tuple[list[float], list[float], list[float]]:
        alone, beside, long_ms = list[float](), list[float](), list[float]()
        asked = [(query.text, query.eid) for query in extra]
        for _ in range(self.sizes.bursts):
            alone += self.stand.run(target, SHORT_QUERIES, SHORT_QUERIES).latencies_ms
            ran = self.stand.run(target, SHORT_QUERIES, SHORT_QUERIES, extra=asked)
            beside += ran.latencies_ms
            long_ms += ran.extra_ms
        return alone, beside, long_ms

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
        yield Figure(f"{head}: RSS of its process", ran[0].target.rss_mib, unit="MiB")
        for kind in sorted({kind for r in ran for kind in r.cpu_ms}):
            used_ms = statistics.median(r.cpu_ms[kind] for r in ran)
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
