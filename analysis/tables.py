"""Rich tables for the command line: rows in, renderables out. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.metrics import MetricReport
from analysis.numbers import Interval
from analysis.queries import ToolRow, UsageRow
from analysis.report import sentence
from analysis.summary import GroupRow, RunSummary, SpendRow, TaskCost
from analysis.text import DASH, duration, number, percent, plain, usd

MIN_NAME_WIDTH = 17


def summary_page(run: RunSummary) -> RenderableType:
    """The run on one page."""
    if run.state == "empty":
        return Text(sentence(run))
    parts: list[RenderableType] = [_overview(run)]
    if run.by_category:
        parts += [_groups("category", run.by_category), _groups("answer type", run.by_answer_type)]
    if run.totals.cost_usd:
        parts.append(_spending(run.spending))
    parts += [Text(f"Note: {plain(note, 200)}", style="yellow") for note in run.notes]
    return Group(*parts)


def timing_page(tools: Sequence[ToolRow], metrics: dict[str, MetricReport]) -> RenderableType:
    """Times, errors and cost per tool, then every metric described."""
    return Group(tools_page(tools), _metrics(metrics)) if tools else Text("No call is in the log yet.")


def usage_page(rows: Sequence[UsageRow]) -> RenderableType:
    """Calls per tool and model."""
    if not rows:
        return Text("No tool call is in the log yet.")
    table = _table("Tool by model", ["tool", "model"], ["calls", "of the tool", "errors", "tokens", "cost"])
    for row in rows:
        counts = [number(row.calls), percent(row.share), number(row.errors)]
        _add(table, [row.tool, row.model, *counts, number(row.tokens), usd(row.cost_usd)])
    return table


def _overview(run: RunSummary) -> Table:
    account, totals = run.accounting, run.totals
    facts = [(name, plain(value, 100)) for name, value in run.facts.items() if value and name != "planned"]
    parts = [f"{getattr(account, name)} {name}" for name in ("ok", "failed", "limited", "owed", "pending")]
    failures = ", ".join(f"{count} {kind}" for kind, count in run.failures.items())
    rows = [
        ("state", run.state + (f", {totals.epochs} epochs" if totals.epochs > 1 else "")),
        *facts,
        ("planned", f"{account.planned} = {' + '.join(parts)}"),
        ("accuracy", f"{percent(account.accuracy)} of all planned ({account.correct} correct)"),
        ("95% interval", f"{_interval(account.interval)} (Wilson)"),
        ("failures", failures or "none"),
        ("cost", f"{usd(totals.cost_usd)}, of which counted results {usd(totals.counted_cost_usd)}"),
        *([("cost of a task", _task_cost(run.task_cost))] if totals.cost_usd else []),
        ("tokens", _tokens(run)),
        ("prompts cut", f"{number(totals.cut_prompts)} ({totals.overflows} too long for the endpoint)"),
        ("time at work", duration(totals.wall_s)),
        ("attempts", number(totals.attempts)),
        ("turns", f"{number(totals.turns)} ({totals.invalid_turns} invalid)"),
        ("model calls", f"{number(totals.model_calls)} ({totals.repeated_calls} repeated)"),
        ("retries", number(totals.retries)),
    ]
    title = Text(plain(run.run_dir, 120), style="bold")
    table = Table(box=None, show_header=False, title=title, title_justify="left")
    for name, value in rows:
        table.add_row(Text(plain(name.replace("_", " ")), style="bold"), Text(value))
    return table


def _groups(label: str, groups: Sequence[GroupRow]) -> Table:
    counts = ["n", "correct", "failed", "limited", "owed", "accuracy", "95% interval"]
    table = _table(f"By {label}", [label], counts)
    for row in groups:
        outcomes = [number(value) for value in (row.n, row.correct, row.failed, row.limited, row.owed)]
        _add(table, [row.name, *outcomes, percent(row.accuracy), _interval(row.interval)])
    return table


def _spending(rows: Sequence[SpendRow]) -> Table:
    table = _table("Cost by kind and model", ["kind", "model"], ["calls", "tokens", "cost"])
    for row in rows:
        _add(table, [row.kind, row.model or DASH, number(row.calls), number(row.tokens), usd(row.cost_usd)])
    return table


def _task_cost(cost: TaskCost) -> str:
    dearest = f" ({plain(cost.most_task, 40)})" if cost.most_usd else ""
    return f"{usd(cost.mean_usd)} mean, {usd(cost.p50_usd)} median, {usd(cost.most_usd)} most{dearest}"


def tools_page(rows: Sequence[ToolRow]) -> Table:
    """Calls, times, errors and cost per tool and other kind of work."""
    numbers = ["calls", "share", "errors", "mean s", "p50 s", "p90 s", "p99 s", "tokens", "cost"]
    table = _table("Time per call (successful calls)", ["tool"], numbers)
    for row in rows:
        counts = [number(row.calls), percent(row.share), number(row.errors)]
        times = [number(value) for value in (row.mean_s, row.p50_s, row.p90_s, row.p99_s)]
        _add(table, [row.name, *counts, *times, number(row.tokens), usd(row.cost_usd)])
    return table


def _metrics(metrics: dict[str, MetricReport]) -> Table:
    columns = ["n", "mean", "std", "min", "p50", "p90", "p99", "max", "<5 s"]
    table = _table("Metrics", ["metric", "unit"], columns)
    for name, report in metrics.items():
        values = [number(getattr(report.stats, column)) for column in columns[:-1]]
        _add(table, [name, report.unit, *values, percent(report.stats.share_under_5s)])
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
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


def _add(table: Table, cells: Iterable[str]) -> None:
    # Text, not str: a name with square brackets is no markup.
    table.add_row(*(Text(plain(cell)) for cell in cells))


def _interval(interval: Interval | None) -> str:
    return DASH if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def _tokens(run: RunSummary) -> str:
    totals = run.totals
    prompt, cached = number(totals.prompt_tokens), number(totals.cached_tokens)
    return f"{prompt} prompt ({cached} cached), {number(totals.completion_tokens)} completion"
