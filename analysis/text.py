"""How numbers and names read in tables and pictures."""

from __future__ import annotations

from typing import Any

DASH = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """`value` with thousands separators and `digits` significant digits; a dash for None.

    Whole numbers of type int keep all their digits.
    """
    if value is None:
        return DASH
    if isinstance(value, int):
        return f"{value:,}"
    rounded = float(f"{value:.{digits}g}")
    if rounded != 0 and abs(rounded) < 1e-3:
        return f"{rounded:g}"
    text = f"{rounded:,.{digits + 2}f}"
    return text.rstrip("0").rstrip(".")


def short(count: float) -> str:
    """A large number with three significant digits and its power of ten: `630 M`, `12.3 k`."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= power:
            return f"{number(count / power)} {letter}"
    return number(count)


def percent(fraction: float | None) -> str:
    """A fraction as percent with one decimal; a dash for None."""
    return DASH if fraction is None else f"{100 * fraction:.1f}%"


def usd(value: float | None) -> str:
    """US dollars with cents, with four decimals below a cent."""
    if value is None:
        return DASH
    return f"${value:.4f}" if 0 < value < 0.01 else f"${value:,.2f}"


def duration(seconds: float) -> str:
    """Seconds as `12.3 s`, `5 min 7 s` or `3 h 12 min`."""
    if seconds < 60:
        return f"{number(float(seconds))} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    return f"{hours} h {rest_min} min" if hours else f"{minutes} min {rest_s} s"


def plain(value: Any, width: int = 80) -> str:
    """One printable line of at most `width` characters, whatever a model or a file put there."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))
    return text if len(text) <= width else text[: width - 1] + "…"
