"""Calibration errors against a plain loop over the definition, and by hand."""

from __future__ import annotations

import math
import random

import pytest

from analysis.calibration import Calibration, calibration


def by_definition(pairs: list[tuple[float, bool]], *, with_last: bool) -> float:
    """Bins of 100 by rising confidence, the last one with what is left over."""
    ordered = sorted(pairs, key=lambda pair: pair[0])
    bounds = [(start, start + 100) for start in range(0, len(ordered) // 100 * 100, 100)] or [(0, 0)]
    bounds[-1] = (bounds[-1][0], len(ordered))
    total = 0.0
    for low, high in bounds if with_last else bounds[:-1]:
        own = ordered[low:high]
        mean = math.fsum(sure for sure, _ in own) / len(own)
        accuracy = sum(right for _, right in own) / len(own)
        total += len(own) / len(ordered) * (mean - accuracy) ** 2
    return math.sqrt(total)


@pytest.mark.parametrize("n", [200, 299, 300, 1043, 2500])
def test_both_errors_agree_with_the_definition(n: int) -> None:
    chance = random.Random(n)
    # All different: where confidences tie, the definition does not say which comes first.
    pairs = [(number / n, chance.random() < number / n * 0.6) for number in range(n)]
    chance.shuffle(pairs)
    found = calibration([sure for sure, _ in pairs], [right for _, right in pairs])
    assert found.official == pytest.approx(by_definition(pairs, with_last=False), abs=1e-12)
    assert found.all_bins == pytest.approx(by_definition(pairs, with_last=True), abs=1e-12)
    assert (found.n, found.note) == (n, "")


def test_by_hand_the_last_bin_is_what_the_official_error_leaves_out() -> None:
    sure = [0.5] * 100 + [1.0] * 100
    right = [False] * 100 + [False] * 100
    found = calibration(sure, right)
    assert found.official == pytest.approx(math.sqrt(0.5 * 0.25))
    assert found.all_bins == pytest.approx(math.sqrt(0.5 * 0.25 + 0.5 * 1.0))


def test_the_official_error_is_refused_below_two_bins() -> None:
    found = calibration([0.9] * 199, [True] * 199)
    assert found.official is None
    assert found.all_bins == pytest.approx(0.1)
    assert "199 judged answers; it needs 200" in found.note


def test_without_confidences_there_is_a_sentence() -> None:
    assert calibration([], []) == Calibration(0, None, None, "No judged answer states a confidence.")
    with pytest.raises(ValueError, match="2 confidences for 1 verdicts"):
        calibration([0.1, 0.2], [True])
