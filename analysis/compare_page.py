"""A comparison on a terminal page: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from analysis.compare import Comparison, Flip, Group, Label, Pairing, RatioRow
from analysis.numbers import Interval
from analysis.paired import Ratio
from analysis.text import DASH, number, percent, plain
from analysis.trials import Noise

SHOWN_FLIPS = 20
_STYLES = {"better": "bold green", "worse": "bold red", "cannot tell": "bold yellow"}


def comparison_page(found: Comparison) -> RenderableType:
    """Verdict, labels, pairs, accuracy, categories, flips, ratios."""
    parts: list[RenderableType] = [
        Text(f"B is {found.verdict}: {found.reason}", style=_STYLES[found.verdict])
        if found.verdict != "cannot tell"
        else Text(f"Cannot tell: {found.reason}", style=_STYLES[found.verdict]),
        Text(f"A  {plain(found.first, 200)}\nB  {plain(found.second, 200)}"),
    ]
    if differing := [label for label in found.labels if label.agrees is False]:
        names = ", ".join(label.name.replace("_", " ").upper() for label in differing)
        words = f"NOT COMPARABLE: {names} DIFFER. The two scores mean different things."
        parts.append(Text(words, style="bold white on red"))
    if any(label.first or label.second for label in (*found.labels, *found.other_facts)):
        parts.append(_labels([*found.labels, *found.other_facts]))
    parts += [Text(line) for line in _pairing_lines(found.pairing)]
    if found.overall.difference.n:
        parts.append(_accuracy(found))
        parts += [_groups(found.by_category)] if found.by_category else []
        parts += [
            _flips("wrong in A, right in B", found.to_right),
            _flips("right in A, wrong in B", found.to_wrong),
        ]
        parts.append(_ratios(found.ratios))
    return Lines(*parts)


def _labels(labels: Sequence[Label]) -> Table:
    table = _table("", "A", "B", "")
    words = {True: "", False: "DIFFERS", None: "not said by both"}
    for label in labels:
        if label.first or label.second:
            cells = (label.name.replace("_", " "), label.first, label.second, words[label.agrees])
            table.add_row(
                *(Text(plain(cell, 60)) for cell in cells), style="red" if label.agrees is False else ""
            )
    return table


def _pairing_lines(pairing: Pairing) -> list[str]:
    left_out = {
        "only in A": pairing.only_first,
        "only in B": pairing.only_second,
        "failed or owed in one of them": pairing.unsettled,
        "asked otherwise (question, images or documents)": pairing.asked_otherwise,
        "judged against another reference answer": pairing.judged_otherwise,
    }
    others = ", ".join(f"{number(count)} {reason}" for reason, count in left_out.items() if count)
    lines = [
        f"{number(pairing.pairs)} tasks pair; " + (f"left out: {others}" if others else "none is left out")
    ]
    if pairing.by_id_alone:
        lines.append(
            "Paired by id alone: whether the same was asked, and against the same answer, is not known."
        )
    return lines


def _accuracy(comparison: Comparison) -> Table:
    group, floors = comparison.overall, comparison.noise
    found = group.difference
    table = Table(
        box=None,
        show_header=False,
        title="Accuracy over the pairs",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    rows = [
        ("A", percent(group.first)),
        ("B", percent(group.second)),
        ("B - A", f"{points(found.mean)} ({_points_interval(found.interval)}, 95% by Bonett and Price)"),
        ("p of no difference", f"{number(found.p_value)} (exact randomisation; McNemar's at one trial)"),
        ("tasks that differ", percent(found.discordance)),
        (
            "detectable at 80% power",
            points(found.detectable) if found.detectable else "nothing: too few differ",
        ),
        *(
            (f"noise floor of {name}", _floor(floor))
            for name, floor in zip("AB", floors, strict=True)
            if floor
        ),
        ("  detectable on these tasks", _repeatable(comparison)),
    ]
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _floor(found: Noise) -> str:
    """What a repetition of the run would change by chance alone."""
    most = "at most " if found.is_bound else ""
    spread = (
        "one trial"
        if found.spread is None
        else f"sd between {len(found.by_trial)} trials {100 * found.spread:.1f}"
    )
    return f"sd {most}{100 * found.run_sd:.1f} points by chance alone ({spread})"


def _repeatable(comparison: Comparison) -> str:
    if comparison.repeatable is None:
        return DASH
    is_bound = any(floor.is_bound for floor in comparison.noise if floor)
    return f"{'at most ' if is_bound else ''}{points(comparison.repeatable)} at 80% power"


def _groups(groups: Sequence[Group]) -> Table:
    table = _table(
        "By category (no verdict: each is a look of its own)",
        "n",
        "A",
        "B",
        "B - A",
        "95% interval",
        right=True,
    )
    for group in groups:
        found = group.difference
        cells = [number(found.n), percent(group.first), percent(group.second), points(found.mean)]
        table.add_row(Text(plain(group.name, 40)), *map(Text, (*cells, _points_interval(found.interval))))
    return table


def _flips(title: str, flips: Sequence[Flip]) -> Text:
    shown = ", ".join(_flip(flip) for flip in flips[:SHOWN_FLIPS])
    more = f" and {len(flips) - SHOWN_FLIPS:,} more (--json has all)" if len(flips) > SHOWN_FLIPS else ""
    return Text(f"{title}: {len(flips):,}  {shown}{more}")


def _flip(flip: Flip) -> str:
    is_plain = {flip.first, flip.second} == {"0/1", "1/1"}
    return (
        plain(flip.task_id, 60) if is_plain else f"{plain(flip.task_id, 60)} ({flip.first} to {flip.second})"
    )


def _ratios(rows: Sequence[RatioRow]) -> Table:
    table = _table(
        "B over A", "A", "B", "typical task", "95% interval", "totals", "95% interval", "n", right=True
    )
    for row in rows:
        cells = [number(row.first), number(row.second), *_ratio(row.typical), *_ratio(row.total)]
        table.add_row(*map(Text, (row.name, *cells, number(row.typical.n))))
    table.caption = (
        "typical: geometric mean of the tasks' ratios; totals: ratio of the sums; tasks with both above 0"
    )
    table.caption_justify = "left"
    return table


def _ratio(found: Ratio) -> tuple[str, str]:
    interval = found.interval
    words = DASH if interval is None else f"{number(interval.low)} to {number(interval.high)}"
    return number(found.ratio), words


def points(value: float | None) -> str:
    """A difference of fractions in percentage points."""
    return DASH if value is None else f"{100 * value:+.1f} points"


def _points_interval(interval: Interval | None) -> str:
    return DASH if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _table(first: str, *names: str, right: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if right:
        table.title, table.title_justify, table.title_style = first, "left", "bold"
    table.add_column("" if right else first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right" if right else "left", no_wrap=right)
    return table
