"""A real cluster of two raylets with `serve run` on it, in processes of its own, for the job tests."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
READY_S = 300


@dataclass(frozen=True)
class Cluster:
    """Where the cluster is, and the environment in which users' commands find it.

    `extra` is set for all processes and for those of jobs, `own` for those of single nodes. `parents` are the
    processes of `ray start --block`, by node; all else of a node descends from its one.
    """

    gcs: str
    dashboard: str
    http: str
    serve_config: Path
    folder: Path
    temporary: Path
    extra: Mapping[str, str] = field(default_factory=dict)
    own: dict[str, Mapping[str, str]] = field(default_factory=dict)
    parents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        """Two raylets, and the services on the head; returns when those answer."""
        self.start_head(num_cpus=3)
        self._run_in_background(
            "serve", [str(BIN / "serve"), "run", "--non-blocking", str(self.serve_config)]
        )
        _wait_for(f"{self.http}/health")
        _wait_for(f"{self.http}/baseline/health")
        # Last, so that no replica is there, whose loss with the node would cost 10 to 30 s.
        self.join("second")

    def start_head(self, num_cpus: int) -> None:
        """The first raylet; returns when its dashboard answers. Nothing is served."""
        dashboard = ["--include-dashboard=true", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        port, client = self.gcs.rpartition(":")[2], *free_ports(1)
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", *dashboard]
        self._start_node("head", [*head, f"--temp-dir={self.temporary}", f"--num-cpus={num_cpus}"])
        _wait_for(f"{self.dashboard}/api/version")

    def join(self, name: str) -> None:
        """Adds a raylet; returns when it has joined."""
        agent = self._start_node(name, [f"--address={self.gcs}", "--num-cpus=2"])
        _wait_for(f"{agent}/api/local_raylet_healthz")

    def processes(self, *names: str) -> list[psutil.Process]:
        """All processes of these nodes; without names, of the whole cluster."""
        found = []
        for name in names or self.parents:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(self.parents[name].pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def kill(self, *names: str) -> None:
        """SIGKILL, at once, of everything on these nodes; without names, of the whole cluster."""
        for process in self.processes(*names):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for name in names or list(self.parents):
            self.parents.pop(name).wait()

    def _start_node(self, name: str, arguments: list[str]) -> str:
        (agent,) = free_ports(1)
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += ["--disable-usage-stats", f"--dashboard-agent-listen-port={agent}"]
        self._run_in_background(name, [*command, *arguments])
        return f"http://127.0.0.1:{agent}"

    def _run_in_background(self, name: str, command: list[str]) -> None:
        # A node that is gone is found out in 2 s, not 20.
        quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
        environ = self.environ(**quick, **self.own.get(name, {}))
        if "--head" in command:
            del environ["RAY_ADDRESS"]
        with (self.folder / f"{name}.log").open("a") as log:
            self.parents[name] = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT
            )

    def environ(self, **extra: str) -> dict[str, str]:
        ours = {
            "RAY_ADDRESS": self.gcs,
            "RAY_AUTH_MODE": "token",
            "TOOLORCH_HOME": str(self.folder / "home"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "COLUMNS": "120",
        }
        return {**os.environ, **ours, **self.extra, **extra}

    def job(self, *arguments: str, script: str = "jobs/hle.py", **extra: str) -> subprocess.Popen[str]:
        """`python jobs/hle.py`, or another script, as a user types it, with its output on a pipe; pictures,
        which take seconds, only where they are asked for."""
        command = [str(BIN / "python"), script, "--set", f"services={self.serve_config}", *arguments]
        if "--pictures" not in arguments:
            command.append("--no-pictures")
        return self._start(command, **extra)

    def submit(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, waited for."""
        environ = self.environ(RAY_API_SERVER_ADDRESS=self.dashboard, **extra)
        return subprocess.run(
            [str(BIN / "ray"), "job", "submit", *arguments],
            cwd=ROOT,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=READY_S,
            check=False,
        )

    def _start(self, command: list[str], **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environ(**extra),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


def finished(process: subprocess.Popen[str]) -> str:
    """The rest of the output of a job that is left to end by itself."""
    try:
        output, _ = process.communicate(timeout=READY_S)
    finally:
        process.kill()
    return output


def until(process: subprocess.Popen[str], pattern: str, times: int = 1) -> list[str]:
    """Read lines until `times` of them match `pattern`."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        times -= bool(re.search(pattern, line))
        if times <= 0:
            return lines
    raise AssertionError(f"ended with {process.wait()} before {pattern!r}:\n{''.join(lines)}")


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def running(folder: Path, latency_s: float) -> Iterator[Cluster]:
    """Two raylets on loopback, the sample retriever and the baseline served by `serve run`."""
    values = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    for app in values["applications"]:
        if app["name"] == "baseline":
            app["args"] = {"latency": {"mean_s": latency_s, "sigma": 0.1}}
    with made(folder, values) as cluster:
        cluster.start()
        yield cluster


@contextmanager
def made(
    folder: Path, serve_config: dict[str, Any], extra: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """A cluster that the caller starts, with this Serve config on ports of its own; killed at the end.

    `extra` is set for its processes and for those of its jobs.
    """
    folder.mkdir(exist_ok=True)
    _share_indexes(folder / "home")
    gcs, dashboard, http = free_ports(3)
    serve_config["http_options"]["port"] = http
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(serve_config))
    # A folder of its own: `ray` in another terminal must not find this cluster, or its remains.
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for the paths of Ray's sockets
    cluster = Cluster(
        f"127.0.0.1:{gcs}",
        f"http://127.0.0.1:{dashboard}",
        f"http://127.0.0.1:{http}",
        path,
        folder,
        temporary,
        extra or {},
    )
    try:
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def _share_indexes(home: Path) -> None:
    """Indexes are named by their content: one that an earlier test run built is used again."""
    shared = ROOT / ".pytest_cache" / "indexes"
    shared.mkdir(parents=True, exist_ok=True)
    home.mkdir()
    (home / "indexes").symlink_to(shared)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as error:
            if getattr(error, "code", 0) == 401:  # up, and it wants the token that Ray's own client sends
                return
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
