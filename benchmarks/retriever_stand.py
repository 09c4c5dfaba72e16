"""The stand on which retrievers are measured: their servers, their clients, and rounds between them.

Servers start when they are first asked for and stay; what idles costs next to nothing (it is printed), and
one is loaded at a time. Every comparison is of rounds that take turns, each beside its partner's.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.child import Child
from benchmarks.retriever_data import Data, Query
from benchmarks.retriever_processes import Used, rss_mib
from benchmarks.stub_encoder import COST_VARIABLE, Cost

# More than the clients that there are: what is refused would be no measurement.
WAITING = 2048
# What `paced` takes: about a hundred milliseconds for 64 queries of 64 tokens.
PACED_COST = Cost(20, 0.02)
WARM_UP = 128
ASKED_AT_ONCE = 50
# A round that takes less is no news.
TOLD_S = 1.0
# The stub of the web asks for no key, but our client must have one.
WEB_KEY_VARIABLE = "BENCH_WEB_KEY"


@dataclass(frozen=True)
class Target:
    """A server that can be loaded: its address (a URL, or an application's name) and its process."""

    name: str
    to: str
    pid: int
    stats: Callable[[], Mapping[str, Any]] = field(compare=False)


@dataclass(frozen=True)
class Ran:
    """One round: a closed loop of `clients` against one server.

    `extra_ms` and `extra_hits` are of the requests beside it, `kept` the ids of some answers by their number;
    `fallbacks` and `encode_s`, the time in the encoder, are 0 where a server does not count them.
    """

    target: Target
    clients: int
    seconds: float
    latencies_ms: list[float]
    extra_ms: list[float]
    extra_hits: list[int]
    kept: Mapping[int, list[int]]
    mean_batch: float
    fallbacks: int
    encode_s: float
    rss_mib: float
    cpu_s: Mapping[str, float]

    @property
    def per_s(self) -> float:
        return len(self.latencies_ms) / self.seconds

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.latencies_ms)

    @property
    def p99_ms(self) -> float:
        return p99(self.latencies_ms)

    @property
    def encode_ms(self) -> float:
        """Time in the encoder per request."""
        return 1000 * self.encode_s / len(self.latencies_ms)

    @property
    def cpu_ms(self) -> dict[str, float]:
        """CPU per request, by kind of process."""
        return {kind: 1000 * used / len(self.latencies_ms) for kind, used in self.cpu_s.items()}


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; of fewer than a hundred values their largest, or near it."""
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


def _nothing(line: str) -> None:
    pass


class Stand:
    """Data, servers and clients. A context manager: nothing outlives it. `say` is told what goes on."""

    def __init__(
        self, data: Data, threads: int, say: Callable[[str], None] = _nothing, with_haproxy: bool = True
    ) -> None:
        self.data, self.threads = data, threads
        self._say, self._with_haproxy = say, with_haproxy
        self._stack = ExitStack()
        self._children: dict[int, str] = {}
        self._targets: dict[tuple[str, ...], Target] = {}
        self._warm: set[Target] = set()
        self._next_query = 0

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-retriever-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def plain(self, encoder: str) -> Target:
        """The plain server."""
        given = {
            "folder": str(self.data.folder),
            "encoder": encoder,
            "threads": self.threads,
            "limits": {"waiting": WAITING},
        }
        return self._http_server("plain server", "benchmarks.plain_retriever", encoder, given)

    def reference(self, encoder: str, rows: str, depth: int = 1000, fallback_s: float = 0.0) -> Target:
        """The reference design with rows from "datasets" or "ids"."""
        given = {
            "folder": str(self.data.folder),
            "encoder": encoder,
            "threads": self.threads,
            "rows": rows,
            "knobs": {"depth": depth, "fallback_s": fallback_s},
            "cache_dir": str(self.folder / "datasets"),
        }
        name = f"reference, {rows}" + ("" if depth == 1000 else f", k={depth}")
        return self._http_server(name, "benchmarks.reference_retriever", encoder, given)

    def ours(self, app: str, **config: Any) -> tuple[Target, Target]:
        """Our application over HTTP and by handle; `config` deploys it when it is first asked for."""
        if (app, "http") not in self._targets:
            self._deploy(app, config)
        return self._targets[app, "http"], self._targets[app, "handle"]

    def web(self, search_s: float, page_s: float) -> str:
        """The address of a stub of the web search, which takes this long for a search and for a page."""
        given = {"search_s": search_s, "page_s": page_s}
        return str(self._child("web", "benchmarks.stub_web", given, {}).hello["url"])

    def delete(self, app: str) -> None:
        """Takes down one of our applications."""
        self._session.ask({"do": "delete", "app": app})

    @property
    def serve_mode(self) -> str:
        """How Serve runs, and what answers HTTP before our replicas."""
        proxy = "HAProxy" if self._session.hello["haproxy"] else "Serve's own proxy"
        return f"Serve in throughput mode behind {proxy}"

    def run(self, target: Target, clients: int, count: int, **job: Any) -> Ran:
        """One round of `count` queries. Raises RuntimeError where a request fails."""
        if target not in self._warm:
            self._warm.add(target)
            self._load(target, min(clients, WARM_UP), WARM_UP, {})
        return self._load(target, clients, count, job)

    def ask_each(self, target: Target, queries: Sequence[tuple[str, str]]) -> int:
        """Asks these (text, question id), some at a time: how many hits that gave.

        Raises RuntimeError where one fails.
        """
        hits = 0
        for start in range(0, len(queries), ASKED_AT_ONCE):
            job = {"to": target.to, "clients": 0, "count": 0, "start": 0}
            measured = self._clients.ask({**job, "extra": queries[start : start + ASKED_AT_ONCE]})
            self._check(target, measured)
            hits += sum(measured["extra_hits"])
        return hits

    @staticmethod
    def _check(target: Target, measured: Mapping[str, Any]) -> None:
        if measured["errors"]:
            raise RuntimeError(f"{target.name}: requests failed: {json.dumps(measured['errors'])[:500]}")

    def _load(self, target: Target, clients: int, count: int, job: Mapping[str, Any]) -> Ran:
        start = job.get("start", self._next_query)
        self._next_query += count
        counted, used = target.stats(), Used(self._children)
        asked = {"to": target.to, "clients": clients, "count": count, **job, "start": start}
        measured = self._clients.ask(asked)
        spent, now = Used(self._children).since(used), target.stats()
        self._check(target, measured)
        answered = len(measured["latencies_s"])
        if measured["seconds"] >= TOLD_S:
            self._say(f"{target.name}, {clients} clients: {answered} queries in {measured['seconds']:.1f} s")
        batches, queries, fallbacks, encode_s = (
            now.get(name, 0) - counted.get(name, 0)
            for name in ("batches", "queries", "fallbacks", "encode_s")
        )
        return Ran(
            target,
            clients,
            measured["seconds"],
            [1000 * s for s in measured["latencies_s"]],
            [1000 * s for s in measured["extra_s"]],
            measured["extra_hits"],
            {int(number): ids for number, ids in measured["kept"].items()},
            queries / max(1, batches),
            int(fallbacks),
            encode_s,
            rss_mib(target.pid),
            spent,
        )

    def idle_cores(self, seconds: float) -> float:
        """Cores that all processes together use while nobody asks anything."""
        before = Used(self._children)
        time.sleep(seconds)
        return sum(Used(self._children).since(before).values()) / seconds

    def queries(self, numbers: Sequence[int]) -> list[Query]:
        """The queries that have these numbers in a round's answer."""
        return [self.data.queries[number % len(self.data.queries)] for number in numbers]

    def _child(self, kind: str, module: str, given: object, environ: Mapping[str, str]) -> Child:
        self._say(f"starts {module}")
        child = self._stack.enter_context(Child(module, given, environ))
        self._children[child.pid] = kind
        return child.started()

    def _http_server(self, name: str, module: str, encoder: str, given: Mapping[str, Any]) -> Target:
        key = (module, json.dumps(given))
        if key not in self._targets:
            child = self._child("server", module, given, {COST_VARIABLE: str(PACED_COST)})
            url = child.hello["url"]
            stats = partial(self._clients.ask, {"stats": url})
            self._targets[key] = Target(name, url, child.pid, stats)
        return self._targets[key]

    def _deploy(self, app: str, config: Mapping[str, Any]) -> None:
        settings = {
            "index_dir": str(self.data.folder),
            "examples": str(self.data.examples),
            "num_cpus": self.threads,
            "max_ongoing_requests": WAITING,
            "max_queued_requests": WAITING,
            **config,
        }
        self._say(f"deploys {app}")
        answer = self._session.ask({"do": "deploy", "app": app, "config": settings})
        stats = partial(self._session.ask, {"do": "stats", "app": app})
        pid = int(stats()["pid"])
        self._targets[app, "http"] = Target("ours over HTTP", answer["url"], pid, stats)
        self._targets[app, "handle"] = Target("ours by handle", app, pid, stats)

    @cached_property
    def _session(self) -> Child:
        given = {"haproxy": self._with_haproxy}
        environ = {COST_VARIABLE: str(PACED_COST), WEB_KEY_VARIABLE: "unused"}
        return self._child("driver", "benchmarks.serve_retriever", given, environ)

    @cached_property
    def _clients(self) -> Child:
        given = {"folder": str(self.data.folder), "ray_address": self._session.hello["address"]}
        return self._child("clients", "benchmarks.retriever_load", given, self._session.hello["environ"])


def rounds(stand: Stand, targets: Sequence[Target], clients: int, count: int, times: int) -> list[list[Ran]]:
    """For each of `times` rounds, one run of each target; each round begins with another one."""
    done = []
    for number in range(times):
        first = number % len(targets)
        order = [*targets[first:], *targets[:first]]
        ran = {target: stand.run(target, clients, count) for target in order}
        done.append([ran[target] for target in targets])
    return done


def median_ratio(pairs: Iterator[tuple[float, float]]) -> float:
    """The median over rounds of one value to its partner in the same round."""
    return statistics.median(value / partner for value, partner in pairs)
