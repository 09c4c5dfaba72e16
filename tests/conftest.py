"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

STATUS = pytest.StashKey[int]()


@pytest.fixture(scope="session", autouse=True)
def _own_cluster() -> Iterator[None]:
    """Tests never join a cluster that happens to run on this machine."""
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    yield


@pytest.hookimpl(tryfirst=True)  # before the distributor reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, one of them gets all that start Ray: one cluster at a time."""
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int | pytest.ExitCode) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process here, with everything told, where Ray was in it.

    Ray, torch and FAISS in one process now and then crash when the interpreter takes them apart, minutes
    after Ray was shut down: 1,205 tests passed, and the exit code said 139.
    """
    ray = sys.modules.get("ray")
    if ray is None or STATUS not in config.stash:
        return
    ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash[STATUS])
