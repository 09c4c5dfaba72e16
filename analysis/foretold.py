"""What a command foretold of its tasks when it started, beside what came of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.log import RunLog


@dataclass(frozen=True, slots=True)
class Foretold:
    """One command's forecast: 90 % intervals as [low, middle, high], of the `left` tasks that it was to do.

    `wall_s` is from the first attempt's start to the last result, `cost_usd` what the tasks' results cost.
    What came is None where the command did not finish what it was to do.
    """

    epoch: int
    left: int
    done: int
    wall_s: list[float]
    cost_usd: list[float]
    actual_wall_s: float | None
    actual_cost_usd: float | None
    basis: str


def foretold(log: RunLog) -> list[Foretold]:
    """Of each command that made a forecast; one that cannot be read is left out."""
    details = log.words("detail")
    rows = np.flatnonzero(log.live & log.kind("run_start"))
    found = [_forecast(details.names[code]) for code in details.codes[rows].tolist()]
    return [
        _beside(log, int(epoch), told)
        for epoch, told in zip(log.ints("epoch")[rows].tolist(), found, strict=True)
        if told is not None
    ]


def _forecast(detail: str) -> dict[str, Any] | None:
    try:
        told = json.loads(detail).get("forecast")
        if told is None:
            return None
        ranges = {name: [float(value) for value in told[name]] for name in ("wall_s", "cost_usd")}
        is_whole = all(len(each) == 3 and np.isfinite(each).all() for each in ranges.values())
        return {"left": int(told["left"]), "basis": str(told["basis"]), **ranges} if is_whole else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _beside(log: RunLog, epoch: int, told: dict[str, Any]) -> Foretold:
    results = log.results
    own = results.ints("epoch") == epoch
    done = int(own.sum())
    attempts = log.live & log.kind("attempt") & (log.ints("epoch") == epoch)
    wall_s = cost_usd = None
    if done >= told["left"] > 0 and attempts.any():
        wall_s = float(results.ints("t_start")[own].max() - log.ints("t_start")[attempts].min()) / 1e6
        cost_usd = float(np.nansum(results.numbers("cost_usd")[own]))
    return Foretold(epoch=epoch, done=done, actual_wall_s=wall_s, actual_cost_usd=cost_usd, **told)
