"""The processes of this driver's Ray session: what they burn and what they hold.

Sees the processes of this machine that descend from this one; what a process burned that ended between
two snapshots is not counted.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

import psutil
import ray

MIB = float(1 << 20)
HOLDING = ("driver", "workers", "checkpoint actor")
_ENDED = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)


class Process(NamedTuple):
    """One process at one moment: CPU seconds since it started, resident bytes."""

    kind: str
    cpu_s: float
    rss: int


Snapshot = Mapping[int, Process]


def snapshot(without: Collection[int] = ()) -> Snapshot:
    """This process and its descendants, by process id."""
    me = psutil.Process()
    found = {}
    for process in [me, *me.children(recursive=True)]:
        if process.pid not in without:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    used = times.user + times.system
                    found[process.pid] = Process(kind(process, os.getpid()), used, process.memory_info().rss)
            except _ENDED:
                continue
    return found


def kind(process: psutil.Process, driver: int) -> str:
    """What a process of the session that `driver` started is."""
    if process.pid == driver:
        return "driver"
    command = (process.cmdline() or [""])[0].rpartition("/")[2]
    if command.startswith("ray::Worker"):  # the engine's actor; Ray names its agents in the same manner
        return "workers"
    if command.startswith("ray::Checkpoint"):
        return "checkpoint actor"
    return {"raylet": "raylet", "gcs_server": "GCS"}.get(command, "other")


def cpu_s(before: Snapshot, after: Snapshot) -> Counter[str]:
    """CPU seconds between two snapshots, by kind of process."""
    spent = Counter[str]()
    for pid, process in after.items():
        spent[process.kind] += process.cpu_s - (before[pid].cpu_s if pid in before else 0.0)  # type: ignore[assignment]
    return spent


class Clocked(NamedTuple):
    """A moment (Unix seconds), and the CPU seconds that this machine's cores had been busy by then."""

    at: float
    busy_s: float


def clocked() -> Clocked:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted as user too
    return Clocked(time.time(), sum(times) - idle - guests)


def share_left(begin: Clocked, end: Clocked, own_cpu_s: float) -> float:
    """The share of this machine's cores that others left to whom `own_cpu_s` was burned for; 1 where idle."""
    others_s = max(0.0, end.busy_s - begin.busy_s - own_cpu_s)
    return max(0.01, 1 - others_s / ((end.at - begin.at) * (psutil.cpu_count() or 1)))


def held_bytes(now: Snapshot) -> int:
    """Resident bytes of driver, workers and checkpoint actor, and what lies in the object store."""
    resident = sum(process.rss for process in now.values() if process.kind in HOLDING)
    name = "object_store_memory"
    stored = ray.cluster_resources().get(name, 0) - ray.available_resources().get(name, 0)
    return int(resident + max(0.0, stored))
