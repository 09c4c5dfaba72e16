"""Joining the Ray cluster that runs, or starting one on this machine for this job."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.services import find_gcs_addresses  # by process, where the address file may be stale

from ray_app.errors import ConfigError
from ray_app.rundir import PACKAGE

# Our services and workers wait far more than they compute: more logical cores than real ones.
MIN_LOGICAL_CPUS = 4
PROBE_TIMEOUT_S = 3.0
# Ray ends a driver that has been a minute without the cluster's head, without a word. Tests shorten it.
LOST_S = float(os.environ.get("TOOLORCH_CLUSTER_LOST_S") or 45.0)
LOOK_S = 1.0
MAX_LOG_BYTES = 4 << 20
MAX_LOG_FILES = 50


def connect(say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> None:
    """Join the cluster of RAY_ADDRESS or the one that runs here; else start one that ends with this job.

    Raises ConfigError when RAY_ADDRESS names no cluster or several clusters run here.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        # A submitted job has its working directory; everyone else imports this checkout.
        settings["runtime_env"] = {"env_vars": {"PYTHONPATH": str(PACKAGE)}}
    address = running_cluster(environ)
    if address is None:
        cpus = max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)
        context = ray.init(address="local", num_cpus=cpus, include_dashboard=True, **settings)
        say(f"Ray: started on this machine; dashboard http://{context.dashboard_url}")
    else:
        ray.init(address=address, **settings)
        say(f"Ray: connected to {address}")


def running_cluster(environ: Mapping[str, str]) -> str | None:
    """The address (host:port) of the cluster to join; None where one is to be started."""
    asked = environ.get("RAY_ADDRESS") or "auto"
    if asked == "local":
        return None
    if asked != "auto":
        if not _answers(asked):
            raise ConfigError(
                f"RAY_ADDRESS {asked!r}: no Ray cluster answers there; expected host:port of its head, "
                "or unset it"
            )
        return asked
    found = sorted(address for address in find_gcs_addresses() if _answers(address))
    if len(found) > 1:
        raise ConfigError(f"Ray clusters at {', '.join(found)}: which one? Set RAY_ADDRESS to it")
    return found[0] if found else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


@contextmanager
def watched(lost: Callable[[str], None]) -> Iterator[None]:
    """Calls `lost`, from a thread, with one line once the cluster's head has refused connections for LOST_S.

    Only time in which this process looked counts: one that was stopped for an hour has seen nothing.
    """
    address, over = ray.get_runtime_context().gcs_address, threading.Event()

    def look() -> None:
        refused_s, looked = 0.0, time.monotonic()
        while not over.wait(LOOK_S):
            is_there, before, looked = _answers(address), looked, time.monotonic()
            refused_s = 0.0 if is_there else refused_s + min(looked - before, LOOK_S + PROBE_TIMEOUT_S)
            if refused_s >= LOST_S:
                lost(
                    f"the Ray cluster at {address} has not answered for {LOST_S:.0f} s; what was committed "
                    "is kept: start it again, and the same command goes on"
                )
                return

    threading.Thread(target=look, name="cluster-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def metrics_pages() -> list[str]:
    """The metrics page of each living node, where what our own engines say of themselves stands."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    ]


def head_address() -> str:
    """The address of the cluster's head node, where the Serve proxy answers."""
    for node in ray.nodes():
        if "node:__internal_head__" in node["Resources"]:
            return str(node["NodeManagerAddress"])
    return "127.0.0.1"


def keep_service_logs(run_dir: Path, since: float) -> None:
    """Copy the ends of this node's Serve logs that were written after `since` (Unix seconds).

    A log that vanishes meanwhile, or a full disk, is no reason to lose a result: errors are passed over.
    """
    node = ray._private.worker._global_node if ray.is_initialized() else None  # no public name for it
    if node is None:
        return
    try:
        found = [
            path
            for path in (Path(node.get_logs_dir_path()) / "serve").glob("*.log")
            if _is_newer(path, since)
        ]
        (run_dir / "logs").mkdir(exist_ok=True)
        for path in sorted(found)[:MAX_LOG_FILES]:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - MAX_LOG_BYTES))
                (run_dir / "logs" / path.name).write_bytes(file.read())
    except OSError:
        return


def _is_newer(path: Path, since: float) -> bool:
    return path.stat().st_mtime >= since
