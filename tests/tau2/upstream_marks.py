"""The mark of tests that need tau2-bench itself: skipped, with the reason, where it is not installed."""

from __future__ import annotations

import pytest

from ray_app.tau2 import upstream


def _why_not() -> str:
    if not upstream.is_installed():
        return "tau2-bench is not installed (the registry's `tau2` is another project)"
    return "" if upstream.data_folder() else f"{upstream.DATA_VARIABLE} names no data folder"


REASON = _why_not()
UPSTREAM = [
    pytest.mark.tau2,
    pytest.mark.skipif(bool(REASON), reason=REASON or "tau2-bench is here"),
    # Of tau2-bench and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
