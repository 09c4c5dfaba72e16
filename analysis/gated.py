"""Which runs are of a gated set, so that no text of theirs may stand in a page that others see.

A set is gated unless it is known to be open: a mistake must hide too much, never show too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPEN_BENCHMARKS = frozenset({"tau2", "frames"})
OPEN_DATASETS = frozenset({"sample"})


def gated_reason(facts: Mapping[str, Any]) -> str:
    """Why the texts of a run with these facts are withheld; empty where everybody may read them."""
    benchmark, dataset = str(facts.get("benchmark") or ""), str(facts.get("dataset") or "")
    if benchmark in OPEN_BENCHMARKS or dataset in OPEN_DATASETS:
        return ""
    if not benchmark:
        return "the log does not say of which benchmark this run is"
    return (
        f"questions of {benchmark} ({dataset or 'unknown dataset'}) are gated, and texts of a run repeat them"
    )
