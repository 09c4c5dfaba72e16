"""The simulations of a tau2 run on a page: coverage, pass^k, how they ended, the noise floor."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.simulations import MEAN, Coverage, DomainRow, Simulations
from analysis.tables import add_row, interval, table_of
from analysis.text import DASH, number, percent, plain
from analysis.trials import Noise, PassHatK

SHOWN_TRIALS = 8
PASS_HAT_METHOD = (
    "95%: Wilson's interval at the effective number of tasks, whose trials count as one; "
    "infrastructure errors are left out"
)
NOISE_METHOD = (
    "sd: standard deviation, in points, by chance alone; detectable: the smallest true difference to another "
    "such run found 4 times in 5 (alpha 5%)"
)


def simulations_page(found: Simulations) -> RenderableType:
    """All tables of a run, domains first and all tasks last."""
    if found.overall is None:
        return Text(found.note)
    rows = [*found.domains, *([found.overall] if len(found.domains) > 1 else [])]
    return Group(
        Text(plain(found.run, 120), style="bold"),
        Text(coverage_line(found.overall.coverage)),
        _pass_hat(rows, found.mean_of_domains),
        _coverage(rows),
        _reasons(rows),
        _noise(rows),
    )


def coverage_line(found: Coverage) -> str:
    """Where every planned simulation is."""
    of = f"{number(found.planned)} planned simulations" if found.planned is not None else "Simulations"
    parts = [
        f"{number(found.counted)} count",
        f"{number(found.infrastructure)} infrastructure errors left out",
    ]
    parts += [f"{number(found.owed)} rewards owed"]
    parts += [f"{number(found.pending)} pending"] if found.pending is not None else []
    return f"{of}: {', '.join(parts)}. Coverage {percent(found.share)}."


def _pass_hat(rows: Sequence[DomainRow], means: Sequence[PassHatK]) -> Table:
    table = table_of("pass^k", ["domain"], ["k", "tasks", "pass^k", "95% interval"])
    groups = [*((row.name, row.pass_hat) for row in rows), *([(MEAN, means)] if means else [])]
    for name, figures in groups:
        for place, each in enumerate(figures):
            cells = [number(each.k), number(each.tasks), percent(each.value), interval(each.interval)]
            add_row(table, ["" if place else name, *cells])
    table.caption, table.caption_justify = PASS_HAT_METHOD, "left"
    return table


def _coverage(rows: Sequence[DomainRow]) -> Table:
    names = ["tasks", "planned", "count", "infrastructure", "owed", "pending", "coverage"]
    table = table_of("Coverage", ["domain"], names)
    for row in rows:
        of = row.coverage
        counts = (row.tasks, of.planned, of.counted, of.infrastructure, of.owed, of.pending)
        add_row(table, [row.name, *map(number, counts), percent(of.share)])
    return table


def _reasons(rows: Sequence[DomainRow]) -> Table:
    names = list(dict.fromkeys(reason for row in reversed(rows) for reason in row.reasons))
    table = table_of("Termination reasons", ["domain"], names)
    for row in rows:
        add_row(table, [row.name, *(number(row.reasons.get(name, 0)) for name in names)])
    return table


def _noise(rows: Sequence[DomainRow]) -> Table:
    right = ["sd between trials", "sd of one trial", "sd of the mean", "detectable"]
    table = table_of("Noise floor of pass^1", ["domain", "by trial"], right)
    for row in rows:
        if row.noise is not None:
            add_row(table, [row.name, _by_trial(row.noise), *noise_cells(row.noise)])
    table.caption, table.caption_justify = NOISE_METHOD, "left"
    return table


def _by_trial(found: Noise) -> str:
    more = f" and {len(found.by_trial) - SHOWN_TRIALS} more" if len(found.by_trial) > SHOWN_TRIALS else ""
    return ", ".join(percent(value) for value in found.by_trial[:SHOWN_TRIALS]) + more


def noise_cells(found: Noise) -> list[str]:
    """The spread between trials, what chance does to one trial and to the mean, what difference is found."""
    most = "at most " if found.is_bound else ""
    spread = DASH if found.spread is None else f"{100 * found.spread:.1f}"
    values = (found.trial_sd, found.run_sd, found.detectable)
    shown = [f"{most}{100 * value:.1f}" for value in values]
    return [spread, *shown[:2], shown[2] if found.detectable <= 1 else DASH]
