"""Which part of a run is asked for: segments, and values that rows must have.

A segment is what one command of a job did between its `run_start` and its `run_end`: an epoch of the log.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

CallStatus = Literal["ok", "error", "invalid"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Names are compared whole; an empty tuple lets every row pass.

    `categories` and `trials` pick tasks, `benchmarks` runs, `tools`, `models` and `statuses` calls. Times
    and calls are those of the last segment unless `all_runs`.
    """

    all_runs: bool = False
    tools: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    trials: tuple[int, ...] = ()

    @property
    def line(self) -> str:
        """The filters in words; empty where there are none."""
        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in given.items() if values)


EVERYTHING = Selection(all_runs=True)
LAST_SEGMENT = Selection()
