"""Two verdicts on the same results: how right each finds them, where they part, and by how much.

Pure: pairs in, numbers and a table out. Says nothing of which verdict is the better one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from analysis.numbers import Interval, wilson_interval
from analysis.text import number, percent, plain

SHOWN_FLIPS = 20


@dataclass(frozen=True, slots=True)
class Pair:
    """One result under two judges; `name` is what people find it by."""

    name: str
    first: bool
    second: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """`to_right` are the names that only the second judge finds right, `to_wrong` only the first."""

    n: int
    first_correct: int
    second_correct: int
    to_right: tuple[str, ...]
    to_wrong: tuple[str, ...]

    @property
    def first_interval(self) -> Interval:
        return wilson_interval(self.first_correct, self.n)

    @property
    def second_interval(self) -> Interval:
        return wilson_interval(self.second_correct, self.n)

    @property
    def share(self) -> float | None:
        """The fraction of pairs that agree; None without pairs."""
        return (self.n - len(self.to_right) - len(self.to_wrong)) / self.n if self.n else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa; None where chance alone would agree on everything, or without pairs.

        Source: J. Cohen, "A coefficient of agreement for nominal scales", Educ. Psychol. Meas. 20 (1960).
        """
        n, first, second = self.n, self.first_correct, self.second_correct
        by_chance = first * second + (n - first) * (n - second)  # over n squared
        if self.share is None or by_chance == n * n:
            return None
        return (self.share - by_chance / n**2) / (1 - by_chance / n**2)


def agreement(pairs: Iterable[Pair]) -> Agreement:
    """The figures of `pairs`; flips keep their order."""
    rows = list(pairs)
    return Agreement(
        n=len(rows),
        first_correct=sum(row.first for row in rows),
        second_correct=sum(row.second for row in rows),
        to_right=tuple(row.name for row in rows if row.second and not row.first),
        to_wrong=tuple(row.name for row in rows if row.first and not row.second),
    )


def agreement_page(found: Agreement, first: str, second: str) -> Table:
    """The pairs as a small table; `first` and `second` name the judges."""
    table = Table("", "", title="Two judges on the same results", title_justify="left", show_header=False)
    table.add_row("results with both verdicts", number(found.n))
    table.add_row(
        f"right by the first: {plain(first)}", _score(found.first_correct, found.first_interval, found.n)
    )
    table.add_row(
        f"right by the second: {plain(second)}", _score(found.second_correct, found.second_interval, found.n)
    )
    table.add_row("agreement", percent(found.share))
    table.add_row("Cohen's kappa", number(found.kappa))
    table.add_row(f"wrong, then right: {len(found.to_right)}", _names(found.to_right))
    table.add_row(f"right, then wrong: {len(found.to_wrong)}", _names(found.to_wrong))
    return table


def _score(correct: int, interval: Interval, n: int) -> str:
    share = percent(correct / n if n else None)
    return f"{number(correct)} = {share} ({percent(interval.low)} to {percent(interval.high)}, Wilson 95%)"


def _names(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN_FLIPS} more" if len(names) > SHOWN_FLIPS else ""
    return ", ".join(plain(name) for name in names[:SHOWN_FLIPS]) + more
