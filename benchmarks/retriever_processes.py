"""The processes of the retriever's benchmark: which are which, what they burn and hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

MIB = float(1 << 20)
_ENDED = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)


class Used:
    """CPU seconds so far of all processes below this one; `children` are those that the benchmark knows."""

    def __init__(self, children: Mapping[int, str]) -> None:
        self.cpu_s: dict[int, tuple[str, float]] = {}
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                kind = children.get(process.pid) or kind_of(process.cmdline())
                self.cpu_s[process.pid] = kind, times.user + times.system
            except _ENDED:
                continue

    def since(self, before: Used) -> dict[str, float]:
        """CPU seconds by kind that are in this and were not in `before`."""
        spent: dict[str, float] = {}
        for pid, (kind, used_s) in self.cpu_s.items():
            spent[kind] = spent.get(kind, 0.0) + used_s - before.cpu_s.get(pid, ("", 0.0))[1]
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


def rss_mib(pid: int) -> float:
    """What the process has in memory, files that it maps included."""
    return float(psutil.Process(pid).memory_info().rss) / MIB


def anonymous_bytes(pid: int) -> int:
    """RssAnon: memory that no file stands behind."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no RssAnon; expected Linux 4.5 or newer")
