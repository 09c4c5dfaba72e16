"""Arithmetic of tasks on slots, against plain loops and by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from analysis import schedule

Spans = list[tuple[float, float]]


def random_spans(seed: int, n: int = 120) -> Spans:
    chance = random.Random(seed)
    return [(start, start + chance.expovariate(0.2)) for start in (chance.uniform(0, 60) for _ in range(n))]


def split(spans: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [start for start, _ in spans], [end for _, end in spans]


def running(spans: Spans, at: float) -> int:
    return sum(start <= at < end for start, end in spans)


@pytest.mark.parametrize("seed", range(4))
def test_peak_and_lanes_agree_with_counting(seed: int) -> None:
    spans = random_spans(seed)
    most = max(running(spans, start) for start, _ in spans)
    assert schedule.peak(*split(spans)) == most
    lanes = schedule.lanes(*split(spans)).tolist()
    assert max(lanes) + 1 == most  # the fewest that can be
    for lane in set(lanes):
        own = sorted(span for span, its in zip(spans, lanes, strict=True) if its == lane)
        assert all(before[1] <= after[0] for before, after in pairwise(own))


def test_a_span_that_starts_as_another_ends_takes_its_place() -> None:
    assert schedule.peak([0, 1], [1, 2]) == 1
    assert schedule.lanes([0, 1], [1, 2]).tolist() == [0, 0]
    assert schedule.peak([], []) == 0


def test_busy_seconds_are_clipped_to_the_window() -> None:
    assert schedule.busy_s([0, 2, 9], [3, 4, 20], 1.0, 10.0) == 2 + 2 + 1


@pytest.mark.parametrize("seed", range(3))
def test_occupancy_agrees_with_a_loop_over_bins(seed: int) -> None:
    spans = random_spans(seed, 60)
    rows = [number % 3 for number in range(len(spans))]
    low, high, bins = 5.0, 65.0, 13
    found = schedule.occupancy(rows, *split(spans), (3, bins), low, high)
    width = (high - low) / bins
    for row in range(3):
        own = [span for span, its in zip(spans, rows, strict=True) if its == row]
        for bin_ in range(bins):
            left = low + bin_ * width
            expected = sum(max(0.0, min(end, left + width) - max(start, left)) for start, end in own) / width
            assert found[row, bin_] == pytest.approx(expected, abs=1e-9)


def test_the_chain_is_what_the_last_end_waited_for() -> None:
    # Two slots: a then c on one, b then d on the other; d ends last, and waited for b.
    starts, ends = [0, 0, 4, 6.01], [4, 6, 7, 12]
    links = schedule.chain(starts, ends)
    assert [link.span for link in links] == [1, 3]
    assert links[0].gap_s == 0.0
    assert links[1].gap_s == pytest.approx(0.01)
    assert schedule.chain([], []) == []


def test_a_forerunner_whose_clock_is_a_little_ahead_is_still_one() -> None:
    assert [link.span for link in schedule.chain([0, 5], [5.02, 9])] == [0, 1]
    # Spans of no length must not lead in a circle.
    assert [link.span for link in schedule.chain([1, 1, 1], [1, 1, 1])] == [2]


def test_the_chain_of_list_scheduling_has_no_gaps_and_its_spans_make_the_makespan() -> None:
    chance = np.random.default_rng(5)
    spans, free, starts = chance.exponential(3, 200), [0.0] * 7, []
    for span in spans.tolist():
        slot = int(np.argmin(free))
        starts.append(free[slot])
        free[slot] += span
    links = schedule.chain(starts, np.array(starts) + spans)
    assert sum(link.gap_s for link in links) == pytest.approx(0, abs=1e-9)
    # Each link starts within the handover of its forerunner's end, which may overlap by as much.
    assert sum(float(spans[link.span]) for link in links) == pytest.approx(
        max(free), abs=len(links) * schedule.HANDOVER_S
    )
