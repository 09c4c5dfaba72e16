"""Tasks on slots, as arithmetic on arrays: who ran beside whom, what ran when, what waited for what.

Spans are given by their starts and ends, in seconds on one clock, each end no earlier than its start.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A slot that is free is taken within this time, by the clocks of two processes.
HANDOVER_S = 0.05


class Link(NamedTuple):
    """A span on the chain that ends last, by its position, and the seconds since its forerunner's end."""

    span: int
    gap_s: float


def peak(starts: ArrayLike, ends: ArrayLike) -> int:
    """The most spans that ran at once; one that ends as another starts makes room for it."""
    begins, stops = np.sort(np.asarray(starts, float)), np.sort(np.asarray(ends, float))
    if not begins.size:
        return 0
    running = np.arange(1, begins.size + 1) - np.searchsorted(stops, begins, side="right")
    return int(max(1, running.max()))


def busy_s(starts: ArrayLike, ends: ArrayLike, low: float, high: float) -> float:
    """Seconds of all spans between `low` and `high`, summed."""
    overlap = np.minimum(np.asarray(ends, float), high) - np.maximum(np.asarray(starts, float), low)
    return float(np.clip(overlap, 0.0, None).sum())


def chain(starts: ArrayLike, ends: ArrayLike) -> list[Link]:
    """The spans that set when the last one ended, first to last.

    From the last end backwards: a span could start when a slot came free, so its forerunner is the span that
    ended last before it started (or within HANDOVER_S after). The first link has no forerunner, its gap is 0.
    It is the critical path of list scheduling where spans need nothing but a slot.
    """
    begins, stops = np.asarray(starts, float), np.asarray(ends, float)
    if not begins.size:
        return []
    order = np.argsort(stops, kind="stable")
    ordered = stops[order]
    links, current = [], int(order[-1])
    while True:
        before = int(np.searchsorted(ordered, begins[current] + HANDOVER_S, side="right")) - 1
        # A clock's error must not lead in a circle.
        while before >= 0 and begins[order[before]] >= begins[current]:
            before -= 1
        if before < 0:
            links.append(Link(current, 0.0))
            return links[::-1]
        forerunner = int(order[before])
        links.append(Link(current, float(max(0.0, begins[current] - stops[forerunner]))))
        current = forerunner


def lanes(starts: ArrayLike, ends: ArrayLike) -> Ints:
    """A lane for each span so that none overlaps another in its lane; the fewest lanes, the lowest first."""
    begins, stops = np.asarray(starts, float), np.asarray(ends, float)
    found = np.zeros(begins.size, np.int64)
    free: list[int] = []
    taken: list[tuple[float, int]] = []
    for span in np.argsort(begins, kind="stable").tolist():
        while taken and taken[0][0] <= begins[span]:
            heapq.heappush(free, heapq.heappop(taken)[1])
        lane = heapq.heappop(free) if free else len(taken)
        found[span] = lane
        heapq.heappush(taken, (float(stops[span]), lane))
    return found


def occupancy(
    rows: ArrayLike, starts: ArrayLike, ends: ArrayLike, shape: tuple[int, int], low: float, high: float
) -> Floats:
    """How much of each of `shape[1]` equal time bins from `low` to `high` the spans of each row fill.

    `rows` names the row (0 to shape[0] - 1) of each span; spans of one row add up, so that two beside each
    other fill a bin with 2.
    """
    n, bins = shape
    width = (high - low) / bins
    begins = np.clip((np.asarray(starts, float) - low) / width, 0, bins)
    stops = np.clip((np.asarray(ends, float) - low) / width, 0, bins)
    first, last = np.minimum(begins.astype(np.int64), bins - 1), np.minimum(stops.astype(np.int64), bins - 1)
    base = np.asarray(rows, np.int64) * bins
    is_within = first == last
    size = n * bins
    filled = np.bincount(base + first, np.where(is_within, stops - begins, first + 1 - begins), size)
    long = ~is_within
    filled += np.bincount(base[long] + last[long], stops[long] - last[long], size)
    # Whole bins between the two ends, as differences that a running sum fills in.
    steps = np.zeros((n, bins + 1))
    flat = steps.reshape(-1)
    spread = np.asarray(rows, np.int64)[long] * (bins + 1)
    flat += np.bincount(spread + first[long] + 1, minlength=flat.size)[: flat.size]
    flat -= np.bincount(spread + last[long], minlength=flat.size)[: flat.size]
    found: Floats = filled.reshape(n, bins) + np.cumsum(steps, axis=1)[:, :bins]
    return found
