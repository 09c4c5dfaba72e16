"""How well stated confidence fits what turns out to be right: pure functions over judged answers.

Both figures are root mean squares over bins of equal count, by rising confidence. Answers of one confidence
keep their order here, where the reference implementation leaves the order of ties open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BIN = 100
LEAST_JUDGED = 2 * BIN


@dataclass(frozen=True, slots=True)
class Calibration:
    """Errors as fractions, over `n` judged answers with a confidence; None where one says nothing.

    `note` says why `official` is missing.
    """

    n: int
    official: float | None
    all_bins: float | None
    note: str = ""


def calibration(confidence: ArrayLike, correct: ArrayLike) -> Calibration:
    """Both errors of answers with these confidences (0 to 1), of which `correct` are right."""
    sure = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if sure.shape != right.shape:
        raise ValueError(f"{sure.size} confidences for {right.size} verdicts; expected one for each")
    if not sure.size:
        return Calibration(0, None, None, "No judged answer states a confidence.")
    note, official = "", None
    if sure.size < LEAST_JUDGED:
        note = (
            f"The official computation leaves the last bin of {BIN} out, so it says nothing of "
            f"{sure.size} judged answers; it needs {LEAST_JUDGED}."
        )
    else:
        official = rms_error(sure, right, with_last=False)
    return Calibration(int(sure.size), official, rms_error(sure, right), note)


def rms_error(
    confidence: NDArray[np.float64], correct: NDArray[np.float64], *, with_last: bool = True, size: int = BIN
) -> float:
    """sqrt(sum over bins of n_bin / n * (mean confidence - accuracy)^2).

    Bins hold `size` answers each, by rising confidence; the last one also what is left over. The official
    computation of Humanity's Last Exam (`with_last=False`) never reaches that last bin, but counts its
    answers in n. Source: D. Hendrycks, M. Mazeika, T. Dietterich, "Deep anomaly detection with outlier
    exposure" (2019), whose calibration code that benchmark's evaluation uses with beta = 100, p = 2.
    """
    order = np.argsort(confidence, kind="stable")
    starts = np.arange(max(1, len(order) // size)) * size
    sums = [np.add.reduceat(values[order], starts) for values in (confidence, correct)]
    counts = np.diff(np.append(starts, len(order)))
    squares = counts / len(order) * ((sums[0] - sums[1]) / counts) ** 2
    return float(np.sqrt(squares[: None if with_last else -1].sum()))
