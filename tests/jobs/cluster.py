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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
READY_S = 300


@dataclass(frozen=True)
class Cluster:
    """Where the cluster is, and the environment in which users' commands find it."""

    gcs: str
    dashboard: str
    serve_config: Path
    folder: Path

    def environ(self, **extra: str) -> dict[str, str]:
        ours = {
            "RAY_ADDRESS": self.gcs,
            "RAY_AUTH_MODE": "token",
            "TOOLORCH_HOME": str(self.folder / "home"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "COLUMNS": "120",
        }
        return {**os.environ, **ours, **extra}

    def job(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        """`python jobs/hle.py` as a user types it, with its output on a pipe."""
        command = [str(BIN / "python"), "jobs/hle.py", "--set", f"services={self.serve_config}", *arguments]
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
    _share_indexes(folder / "home")
    gcs, dashboard, http, client, agent_1, agent_2 = free_ports(6)
    cluster = Cluster(
        f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", _serve_config(folder, http, latency_s), folder
    )
    head = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    # A folder of its own: `ray` in another terminal must not find this cluster, or its remains.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, for the paths of Ray's sockets
    head += [
        f"--temp-dir={temporary}",
        "--head",
        "--num-cpus=3",
        f"--dashboard-agent-listen-port={agent_1}",
        "--include-dashboard=true",
    ]
    second = [f"--address={cluster.gcs}", "--num-cpus=2", f"--dashboard-agent-listen-port={agent_2}"]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        stack.enter_context(_process(cluster, "head", [*RAY_START, *head]))
        _wait_for(f"{cluster.dashboard}/api/version")
        stack.enter_context(_process(cluster, "second", [*RAY_START, *second]))
        serve = [str(BIN / "serve"), "run", "--non-blocking", str(cluster.serve_config)]
        stack.enter_context(_process(cluster, "serve", serve))
        _wait_for(f"http://127.0.0.1:{http}/health")
        _wait_for(f"http://127.0.0.1:{http}/baseline/health")
        yield cluster


RAY_START = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]


def _share_indexes(home: Path) -> None:
    """Indexes are named by their content: one that an earlier test run built is used again."""
    shared = ROOT / ".pytest_cache" / "indexes"
    shared.mkdir(parents=True, exist_ok=True)
    home.mkdir()
    (home / "indexes").symlink_to(shared)


def _serve_config(folder: Path, port: int, latency_s: float) -> Path:
    values = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    values["http_options"]["port"] = port
    for app in values["applications"]:
        if app["name"] == "baseline":
            app["args"] = {"latency": {"mean_s": latency_s, "sigma": 0.1}}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@contextmanager
def _process(cluster: Cluster, name: str, command: list[str]) -> Iterator[None]:
    environ = cluster.environ()
    if name == "head":
        del environ["RAY_ADDRESS"]
    with (cluster.folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.kill()
        process.wait()


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
