"""A Ray of the tests' own with Serve on it, and what the tests of deployments share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(num_cpus: int) -> Iterator[str]:
    """Serve over HTTP on a free port of loopback; the address."""
    import ray  # warns at its import, and warnings of a test module's import are errors
    from ray import serve

    root, port = str(Path(__file__).parents[2]), free_port()
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}},
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


async def until(is_so: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():  # noqa: ASYNC110  (another process sets no event)
            await asyncio.sleep(0.005)
