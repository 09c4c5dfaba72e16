"""Rich tables for the command line: rows in, renderables out. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from analysis.duration import Duration
from analysis.foretold import Foretold
from analysis.numbers import PERCENTILES, Histogram, Interval
from analysis.report import sentence
from analysis.spending import SpendRow, TaskCost
from analysis.summary import GroupRow, RunSummary, Segment
from analysis.text import DASH, duration, number, percent, plain, usd
from analysis.timing import GROUPS, PARTS, Components, Timing, TimingRow
from analysis.usage import OTHER_WORK, ToolRow, Usage

MIN_NAME_WIDTH = 17
_UNBOUNDED = 10_000
_FEW = ("mean", "std", "p50", "p90", "p99", "max")
_ALL = ("mean", "std", "min", *(f"p{percent}" for percent in PERCENTILES), "max")


class Fitting:
    """The first of two renderables where the terminal has room for it, else the second."""

    def __init__(self, wide: RenderableType, narrow: RenderableType) -> None:
        self._wide, self._narrow = wide, narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update_width(_UNBOUNDED), self._wide).maximum
        yield self._wide if needed <= options.max_width else self._narrow


def summary_page(run: RunSummary) -> RenderableType:
    """The run on one page."""
    if run.state == "empty":
        return Text(sentence(run))
    parts: list[RenderableType] = [_overview(run)]
    if run.by_category:
        parts += [_groups("category", run.by_category), _groups("answer type", run.by_answer_type)]
    if len(run.segments) > 1:
        parts.append(_segments(run.segments))
    if run.totals.cost_usd:
        parts.append(_spending(run.spending))
    if run.foretold:
        parts.append(_foretold(run.foretold))
    parts += [Text(f"Note: {plain(note, 200)}", style="yellow") for note in run.notes]
    return Group(*parts)


def timing_page(found: Timing) -> RenderableType:
    """Every series described, group by group, then where a mean call goes."""
    if not found.rows:
        return Text(found.note)
    groups = {name: [row for row in found.rows if row.group == name] for name in GROUPS}
    shown = [(GROUPS[name], rows) for name, rows in groups.items() if rows]
    pages = (
        Group(*(_timed(title, rows, columns) for title, rows in shown), _components(found.components))
        for columns in (_ALL, _FEW)
    )
    return Group(Text(plain(found.run, 120), style="bold"), Fitting(*pages))


def usage_page(found: Usage) -> RenderableType:
    """Calls per tool and model."""
    if not found.rows:
        return Text(found.note)
    right = ["calls", "of the tool", "of all", "success", "prompt", "cached", "completion", "cost"]
    table = table_of("Tool by model", ["tool", "model"], right)
    before = ""
    for row in found.rows:
        if before and row.tool != before and (row.tool not in OTHER_WORK or before not in OTHER_WORK):
            table.add_section()
        shares = [DASH if row.tool in OTHER_WORK else percent(row.share), percent(row.share_of_all)]
        tokens = [number(value) for value in (row.prompt_tokens, row.cached_tokens, row.completion_tokens)]
        cells = [number(row.calls), *shares, percent(row.success), *tokens, usd(row.cost_usd)]
        add_row(table, [row.tool if row.tool != before else "", row.model or DASH, *cells])
        before = row.tool
    costs = [row.cost_usd for row in found.rows if row.cost_usd is not None]
    all_tokens = sum(row.tokens for row in found.rows)
    estimated = _estimated(sum(row.estimated_tokens for row in found.rows), all_tokens)
    lines = Text(
        f"Cost in all: {usd(sum(costs) if costs else None)}\nTokens in all: {number(all_tokens)}{estimated}"
    )
    return Group(Text(plain(found.run, 120), style="bold"), table, lines)


def duration_page(found: Duration) -> RenderableType:
    """One pair: its percentiles, both histograms and the parts of the mean call."""
    if found.note:
        return Text(found.note)
    stats = found.row.stats
    head = [("n", number(stats.n)), ("errors", number(found.row.errors))]
    head += [(name, f"{number(getattr(stats, name))} s") for name in ("mean", "std", "min")]
    head += [(name, f"{number(value)} s") for name, value in found.percentiles.items()]
    head += [("max", f"{number(stats.max)} s"), ("under 5 s", percent(stats.share_under_5s))]
    facts = Table(box=None, show_header=False, title=Text(found.title, style="bold"), title_justify="left")
    for name, value in head:
        facts.add_row(Text(name, style="bold"), Text(value, justify="right"))
    histograms = [
        _histogram(name, histogram)
        for name, histogram in (("Linear bins", found.row.hist_linear), ("Log bins", found.row.hist_log))
        if histogram is not None
    ]
    parts = [_components(found.components)] if found.components else []
    return Group(facts, *histograms, *parts)


def _histogram(title: str, found: Histogram) -> Table:
    table = table_of(title, [], ["from s", "to s", "calls", "share"])
    table.add_column("", no_wrap=True)
    most = max(found.percent)
    for (low, high), count, share in zip(pairwise(found.edges), found.counts, found.percent, strict=True):
        bar = "\N{FULL BLOCK}" * round(40 * share / most)
        add_row(table, [number(low), number(high), number(count), percent(share / 100), bar])
    return table


def _overview(run: RunSummary) -> Table:
    title = Text(plain(run.run_dir, 120), style="bold")
    table = Table(box=None, show_header=False, title=title, title_justify="left")
    for name, value in overview_rows(run):
        table.add_row(Text(plain(name.replace("_", " ")), style="bold"), Text(value))
    return table


def overview_rows(run: RunSummary) -> list[tuple[str, str]]:
    """The run in names and values: where its tasks are, how right, how sure, how long, how dear."""
    account, totals = run.accounting, run.totals
    facts = [
        (name, _fact(value))
        for name, value in run.facts.items()
        if value and name not in ("planned", "forecast")
    ]
    parts = [f"{getattr(account, name)} {name}" for name in ("ok", "failed", "limited", "owed", "pending")]
    return [
        ("state", run.state + (f", {totals.epochs} segments" if totals.epochs > 1 else "")),
        *facts,
        *([("only", plain(run.filters, 120))] if run.filters else []),
        ("planned", f"{account.planned} = {' + '.join(parts)}"),
        ("accuracy", f"{percent(account.accuracy)} of all planned ({account.correct} correct)"),
        ("95% interval", f"{interval(account.interval)} (Wilson); {interval(account.wald)} (Wald)"),
        ("judged", _judged(run)),
        ("calibration", _calibration(run)),
        ("failures", _kinds(run.failures)),
        *([("limits", _kinds(run.limits))] if run.limits else []),
        ("cost", _cost(run)),
        *([("cost of a task", _task_cost(run.task_cost))] if totals.cost_usd else []),
        ("tokens", _tokens(run)),
        ("prompts cut", f"{number(totals.cut_prompts)} ({totals.overflows} too long for the endpoint)"),
        ("time at work", duration(totals.wall_s)),
        ("attempts", number(totals.attempts)),
        ("turns", f"{number(totals.turns)} ({totals.invalid_turns} invalid)"),
        ("model calls", f"{number(totals.model_calls)} ({totals.repeated_calls} repeated)"),
        ("retries", number(totals.retries)),
    ]


def _foretold(found: Sequence[Foretold]) -> Table:
    table = table_of(
        "Foretold, with 90% intervals, and what came",
        ["segment"],
        ["tasks", "wall clock", "from", "to", "came", "cost", "from", "to", "came"],
    )
    for row in found:
        came_s, came_usd = row.actual_wall_s, row.actual_cost_usd
        wall = [duration(row.wall_s[place]) for place in (1, 0, 2)]
        cost = [usd(row.cost_usd[place]) for place in (1, 0, 2)]
        wall.append(DASH if came_s is None else duration(came_s))
        cost.append(DASH if came_usd is None else usd(came_usd))
        tasks = number(row.left) if row.done >= row.left else f"{row.done} of {row.left} done"
        add_row(table, [str(row.epoch), tasks, *wall, *cost])
    return table


def _cost(run: RunSummary) -> str:
    totals = run.totals
    if run.facts.get("imported") and not totals.cost_usd:
        return f"{DASH} The imported logs tell none."
    return f"{usd(totals.cost_usd)}, of which counted results {usd(totals.counted_cost_usd)}"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return plain(", ".join(f"{number(count)} {name}" for name, count in value.items()), 100)
    return plain(value, 100)


def _judged(run: RunSummary) -> str:
    found = run.coverage
    how = [
        f"{count} {name}" for count, name in ((found.by_judge, "by the judge"), (found.exact, "exact match"))
    ]
    if rest := found.judged - found.by_judge - found.exact - found.empty:
        how = [part for part in how if not part.startswith("0 ")] + [f"{rest} by reward"]
    how += [f"{found.empty} empty"] if found.empty else []
    return f"{percent(found.share)} of all planned ({found.judged}: {', '.join(how)})"


def _calibration(run: RunSummary) -> str:
    found = run.calibration
    if found.all_bins is None:
        return f"{DASH} {found.note}"
    official = (
        f"{percent(found.official)} official (last bin left out), " if found.official is not None else ""
    )
    note = f" {found.note}" if found.note else ""
    return f"error {official}{percent(found.all_bins)} over all bins (n = {found.n}).{note}"


def _kinds(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {plain(kind)}" for kind, count in kinds.items()) or "none"


def _groups(label: str, groups: Sequence[GroupRow]) -> Table:
    counts = ["n", "correct", "failed", "limited", "owed", "accuracy", "95% Wilson", "95% Wald"]
    table = table_of(f"By {label}", [label], counts)
    for row in groups:
        outcomes = [number(value) for value in (row.n, row.correct, row.failed, row.limited, row.owed)]
        bounds = [interval(row.interval), interval(row.wald)]
        add_row(table, [row.name, *outcomes, percent(row.accuracy), *bounds])
    return table


def _segments(segments: Sequence[Segment]) -> Table:
    table = table_of(
        "Segments", ["epoch", "began (UTC)"], ["at work", "results", "calls", "tokens", "cost", "end"]
    )
    for row in segments:
        began = datetime.fromtimestamp(row.began, UTC).strftime("%Y-%m-%d %H:%M:%S")
        work = [number(value) for value in (row.results, row.model_calls, row.tokens)]
        end = "ended" if row.is_ended else "none seen"
        add_row(table, [str(row.epoch), began, duration(row.wall_s), *work, usd(row.cost_usd), end])
    return table


def _spending(rows: Sequence[SpendRow]) -> Table:
    table = table_of("Cost by kind and model", ["kind", "model"], ["calls", "tokens", "cost"])
    for row in rows:
        add_row(
            table, [row.kind, row.model or DASH, number(row.calls), number(row.tokens), usd(row.cost_usd)]
        )
    return table


def _task_cost(cost: TaskCost) -> str:
    dearest = f" ({plain(cost.most_task, 40)})" if cost.most_usd else ""
    return f"{usd(cost.mean_usd)} mean, {usd(cost.p50_usd)} median, {usd(cost.most_usd)} most{dearest}"


def tools_page(rows: Sequence[ToolRow]) -> Table:
    """Calls, times, errors and cost per tool and other kind of work."""
    numbers = ["calls", "share", "errors", "mean s", "p50 s", "p90 s", "p99 s", "tokens", "cost"]
    table = table_of("Time per call (successful calls)", ["tool"], numbers)
    for row in rows:
        counts = [number(row.calls), percent(row.share), number(row.errors)]
        times = [number(value) for value in (row.mean_s, row.p50_s, row.p90_s, row.p99_s)]
        add_row(table, [row.name, *counts, *times, number(row.tokens), usd(row.cost_usd)])
    return table


def _timed(title: str, rows: Sequence[TimingRow], columns: Sequence[str]) -> Table:
    has_times = rows[0].unit == "s"
    more = ["errors", "<5 s"] if has_times else []
    table = table_of(f"{title} ({'seconds' if has_times else 'tokens'})", ["name"], ["n", *columns, *more])
    for row in rows:
        values = [_seconds(getattr(row.stats, column)) for column in columns]
        rest = [number(row.errors), percent(row.stats.share_under_5s)] if has_times else []
        add_row(table, [row.name, number(row.stats.n), *values, *rest])
    return table


def _components(rows: Sequence[Components]) -> Table:
    used = [part for part in PARTS if any(part in row.parts for row in rows)]
    table = table_of("Where a mean call goes (seconds)", ["call"], ["n", "mean", *used])
    for row in rows:
        parts = [_seconds(row.parts.get(part)) for part in used]
        add_row(table, [row.name, number(row.calls), _seconds(row.mean_s), *parts])
    return table


def _seconds(value: float | None) -> str:
    """Seconds to a tenth of a millisecond: a table of many columns has no room for more."""
    return number(None if value is None else round(value, 4))


def table_of(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with columns of names and columns of numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in left:
        # Without a least width a narrow terminal would take it all from the names.
        table.add_column(name, overflow="fold", min_width=MIN_NAME_WIDTH)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_row(table: Table, cells: Iterable[str]) -> None:
    """A row of cells as they are: a name with square brackets is no markup."""
    table.add_row(*(Text(plain(cell)) for cell in cells))


def interval(found: Interval | None) -> str:
    """An interval of a proportion, in percent."""
    return DASH if found is None else f"{percent(found.low)} to {percent(found.high)}"


def _tokens(run: RunSummary) -> str:
    totals = run.totals
    prompt, cached = number(totals.prompt_tokens), number(totals.cached_tokens)
    told = f"{prompt} prompt ({cached} cached), {number(totals.completion_tokens)} completion"
    return told + _estimated(totals.estimated_tokens, totals.prompt_tokens + totals.completion_tokens)


def _estimated(part: int, whole: int) -> str:
    return f"; {percent(part / whole)} of them estimated, with their cost" if part else ""
