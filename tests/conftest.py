"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cluster() -> Iterator[None]:
    """Tests never join a cluster that happens to run on this machine."""
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    yield
