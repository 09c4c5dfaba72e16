"""The stand on which retrievers are measured: their servers, their clients, and rounds between them.

Servers start when they are first asked for and stay; what idles costs next to nothing (it is printed), and
one is loaded at a time. Every comparison is of rounds that take turns, each beside its partner's.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from benchmarks.child import Child
from benchmarks.retriever_data import Data, Query
from benchmarks.stub_encoder import COST_VARIABLE, Cost

MIB = float(1 << 20)
# More than the clients that there are: what is refused would be no measurement.
WAITING = 2048
# What `paced` takes: about a hundred milliseconds for 64 queries of 64 tokens.
PACED_COST = Cost(20, 0.02)
WARM_UP = 128
ASKED_AT_ONCE = 50
# The stub of the web asks for no key, but our client must have one.
WEB_KEY_VARIABLE = "BENCH_WEB_KEY"
_ENDED = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)


class Used:
    """CPU seconds so far of the benchmark's processes, by what they are."""

    def __init__(self, children: Mapping[int, str]) -> None:
        self.cpu_s: dict[int, tuple[str, float]] = {}
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                kind = children.get(process.pid) or kind_of(process.cmdline())
                self.cpu_s[process.pid] = kind, times.user + times.system
            except _ENDED:
                continue

    def since(self, before: Used) -> Counter[str]:
        spent = Counter[str]()
        for pid, (kind, used_s) in self.cpu_s.items():
            spent[kind] += used_s - before.cpu_s.get(pid, ("", 0.0))[1]  # type: ignore[assignment]
        return spent


def kind_of(command: Sequence[str]) -> str:
    """What a process of Ray is to the retriever: a replica, HAProxy, or one of the others."""
    name = command[0].rpartition("/")[2] if command else ""
    for start, kind in (
        ("ray::ServeReplica", "replica"),
        ("haproxy", "HAProxy"),
        ("ray::HAProxyManager", "HAProxy's manager"),
        ("ray::ProxyActor", "Serve's proxy"),
    ):
        if name.startswith(start):
            return kind
    return "rest of Ray"


@dataclass(frozen=True)
class Target:
    """A server that can be loaded: its address (a URL, or an application's name) and its process."""

    name: str
    to: str
    pid: int
    stats: Callable[[], Mapping[str, Any]] = field(compare=False)

    @property
    def rss_mib(self) -> float:
        return psutil.Process(self.pid).memory_info().rss / MIB

    def anonymous_bytes(self) -> int:
        """RssAnon: memory that no file stands behind."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/{self.pid}/status has no RssAnon; expected Linux 4.5 or newer")


@dataclass(frozen=True)
class Ran:
    """One round: a closed loop of `clients` against one server."""

    target: Target
    clients: int
    seconds: float
    latencies_ms: list[float]
    extra_ms: list[float]
    kept: Mapping[int, list[int]]
    mean_batch: float
    cpu_s: Counter[str]

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
    def cpu_ms(self) -> Counter[str]:
        """CPU per request, by kind of process."""
        return Counter({kind: 1000 * used / len(self.latencies_ms) for kind, used in self.cpu_s.items()})


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; of fewer than a hundred values their largest, or near it."""
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


class Stand:
    """Data, servers and clients. A context manager: nothing outlives it."""

    def __init__(self, data: Data, threads: int, with_haproxy: bool = True) -> None:
        self.data, self.threads = data, threads
        self._with_haproxy = with_haproxy
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

    def over_http(self, app: str, **config: Any) -> Target:
        """Our application, deployed when first asked for, behind its HTTP port."""
        return self._ours(app, config)[0]

    def by_handle(self, app: str, **config: Any) -> Target:
        """The same application by handle."""
        return self._ours(app, config)[1]

    def web(self, search_s: float, page_s: float) -> str:
        """The address of a stub of the web search, which takes this long for a search and for a page."""
        given = {"search_s": search_s, "page_s": page_s}
        return str(self._child("web", "benchmarks.stub_web", given, {}).hello["url"])

    def delete(self, app: str) -> None:
        """Takes down one of our applications."""
        self._session.ask({"do": "delete", "app": app})

    @property
    def proxy(self) -> str:
        """What answers HTTP before our replicas."""
        return "HAProxy" if self._session.hello["haproxy"] else "Serve's own proxy"

    def run(self, target: Target, clients: int, count: int, **job: Any) -> Ran:
        """One round of `count` queries. Raises RuntimeError where a request fails."""
        if target not in self._warm:
            self._warm.add(target)
            self._load(target, min(clients, WARM_UP), WARM_UP, {})
        return self._load(target, clients, count, job)

    def ask_each(self, target: Target, queries: Sequence[tuple[str, str]]) -> None:
        """Asks these (text, question id), some at a time. Raises RuntimeError where one fails."""
        for start in range(0, len(queries), ASKED_AT_ONCE):
            job = {"to": target.to, "clients": 0, "count": 0, "start": 0}
            measured = self._clients.ask({**job, "extra": queries[start : start + ASKED_AT_ONCE]})
            self._check(target, measured)

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
        batches = now["batches"] - counted["batches"]
        return Ran(
            target,
            clients,
            measured["seconds"],
            [1000 * s for s in measured["latencies_s"]],
            [1000 * s for s in measured["extra_s"]],
            {int(number): ids for number, ids in measured["kept"].items()},
            (now["queries"] - counted["queries"]) / max(1, batches),
            spent,
        )

    def idle_cores(self, seconds: float) -> float:
        """Cores that all processes together use while nobody asks anything."""
        before = Used(self._children)
        time.sleep(seconds)
        return Used(self._children).since(before).total() / seconds

    def queries(self, numbers: Sequence[int]) -> list[Query]:
        """The queries that have these numbers in a round's answer."""
        return [self.data.queries[number % len(self.data.queries)] for number in numbers]

    def _child(self, kind: str, module: str, given: object, environ: Mapping[str, str]) -> Child:
        child = self._stack.enter_context(Child(module, given, environ))
        self._children[child.pid] = kind
        return child.started()

    def _http_server(self, name: str, module: str, encoder: str, given: Mapping[str, Any]) -> Target:
        key = (module, json.dumps(given))
        if key not in self._targets:
            child = self._child("server", module, given, {COST_VARIABLE: str(PACED_COST)})
            url = child.hello["url"]
            stats = lambda: self._clients.ask({"stats": url})  # noqa: E731
            self._targets[key] = Target(name, url, child.pid, stats)
        return self._targets[key]

    def _ours(self, app: str, config: Mapping[str, Any]) -> tuple[Target, Target]:
        if (app, "http") not in self._targets:
            settings = {
                "index_dir": str(self.data.folder),
                "examples": str(self.data.examples),
                "num_cpus": self.threads,
                "max_ongoing_requests": WAITING,
                "max_queued_requests": WAITING,
                **config,
            }
            answer = self._session.ask({"do": "deploy", "app": app, "config": settings})
            pid = replica_pid(app)
            stats = lambda: self._session.ask({"do": "stats", "app": app})  # noqa: E731
            self._targets[app, "http"] = Target("ours over HTTP", answer["url"], pid, stats)
            self._targets[app, "handle"] = Target("ours by handle", app, pid, stats)
        return self._targets[app, "http"], self._targets[app, "handle"]

    @cached_property
    def _session(self) -> Child:
        given = {"haproxy": self._with_haproxy}
        environ = {COST_VARIABLE: str(PACED_COST), WEB_KEY_VARIABLE: "unused"}
        return self._child("driver", "benchmarks.serve_retriever", given, environ)

    @cached_property
    def _clients(self) -> Child:
        given = {"folder": str(self.data.folder), "ray_address": self._session.hello["address"]}
        return self._child("clients", "benchmarks.retriever_load", given, self._session.hello["environ"])


def replica_pid(app: str) -> int:
    """The process of the only replica of one of our applications. Ray names it so."""
    wanted = f"ray::ServeReplica:{app}:retriever"
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            # Followed, while it runs one, by the name of a method.
            if (process.cmdline() or [""])[0].startswith(wanted):
                return process.pid
        except _ENDED:
            continue
    raise RuntimeError(f"no process is called {wanted!r}")


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
