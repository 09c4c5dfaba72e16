"""How numbers and names read."""

from __future__ import annotations

import pytest

from analysis.text import DASH, duration, number, percent, plain, short, usd


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH),
        (1234567, "1,234,567"),
        (0, "0"),
        (0.0, "0"),
        (12.345, "12.3"),
        (0.04567, "0.0457"),
        (1234.5, "1,230"),
        (0.0000123, "1.23e-05"),
        (2.0, "2"),
    ],
)
def test_numbers_keep_three_digits_and_counts_keep_all(value: float | None, text: str) -> None:
    assert number(value) == text


def test_units() -> None:
    assert (percent(0.31875), percent(None)) == ("31.9%", DASH)
    assert (usd(0.0), usd(0.0034), usd(0.6), usd(1234.5)) == ("$0.00", "$0.0034", "$0.60", "$1,234.50")
    assert (duration(3.21), duration(59.9), duration(307.2)) == ("3.21 s", "59.9 s", "5 min 7 s")
    assert (short(999), short(12_345), short(630e6), short(2.41e9)) == ("999", "12.3 k", "630 M", "2.41 G")
    assert duration(2 * 3600 + 59.6) == "2 h 1 min"


def test_a_name_becomes_one_printable_line() -> None:
    assert plain("a\x1b[31m\nb\u202e") == "a\ufffd[31m\ufffdb\ufffd"
    assert plain("x" * 100, 10) == "x" * 9 + "\u2026"
