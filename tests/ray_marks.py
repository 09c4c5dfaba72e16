"""Marks of the test modules in whose process Ray runs."""

from __future__ import annotations

import pytest

RAY = [
    pytest.mark.cluster,
    # Ray's own: fields declared in pydantic's old way, sockets and processes left to the collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
