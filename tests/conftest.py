"""Fixtures that several test files share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STATUS = pytest.StashKey[int]()
STARTS_RAY = re.compile(r"pytest\.mark\.cluster|ray_marks import RAY")


@pytest.fixture(scope="session", autouse=True)
def _own_cluster() -> Iterator[None]:
    """Tests never join a cluster that happens to run on this machine."""
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of the processes that share the tests, one gets all files of jobs, another all others that start Ray.

    So there are two clusters at most: one that the jobs are told of, and one in a test's own process.
    """
    from xdist.scheduler import LoadScopeScheduling

    with_ray = {
        path.relative_to(config.rootpath).as_posix()
        for path in Path(__file__).parent.rglob("test_*.py")
        if STARTS_RAY.search(path.read_text())
    }

    class FewClusters(LoadScopeScheduling):  # type: ignore[misc]  # untyped
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file not in with_ray:
                return file
            return "jobs" if file.startswith("tests/jobs/") else "ray"

    return FewClusters(config, log)


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
