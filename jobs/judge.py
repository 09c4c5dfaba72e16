"""Judge a run again with another judge: `python jobs/judge.py RUN_DIR --set judge.model=X`.

Of a tau2 run, the recorded simulations are rewarded again: environments and evaluator as they are now.

No rollout call is made, and the run's own verdicts and score stay; the second verdicts are stored beside
them under a label. Needs no Ray: a judge that is a `service:` must be served already. Run the same
command again to resume. Exit codes: 0 complete, 1 the endpoint failed, 2 a mistake in what was asked,
3 verdicts owed, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    # A script's folder comes first on sys.path, where `jobs/` would hide packages of the same name.
    sys.path[0] = str(ROOT)

import typer
from rich.console import Console

from analysis.agreement import Agreement, Pair, agreement, agreement_page
from analysis.text import usd
from ray_app import driver, object_store, opinions, rejudge, rundir
from ray_app.errors import ConfigError, EvalError
from ray_app.tau2 import review


def main(
    run_dir: Annotated[Path, typer.Argument(help="The directory of the run, or its s3:// url.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key of the run's config: --set judge.model=X."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Folder of templates. Default: the run's.", metavar="DIR")
    ] = None,
    protocol: Annotated[
        Literal["toolorchestra", "hle-style"] | None, typer.Option(help="Default: the run's.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of this opinion. Default: judge model, protocol, prompt digest.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the final figures here.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Show work, route and cost; ask nothing.")
    ] = False,
) -> None:
    """Give every counted result of RUN_DIR a second verdict. The same command resumes."""
    console = driver.make_console()
    try:
        if json is not None and not json.absolute().parent.is_dir():
            raise ConfigError(f"--json {json}: no such folder; make it first")
        run_dir = object_store.local(run_dir)
        if opinions.benchmark_of(run_dir) == "tau2":
            if protocol is not None:
                raise ConfigError(f"--protocol {protocol}: of HLE's judges; a simulation has one reward")
            asked = review.read_pass(run_dir, set_ or (), prompts=prompts, label=label)
        else:
            asked = opinions.read_pass(run_dir, set_ or (), prompts=prompts, protocol=protocol, label=label)
        if plan:
            raise typer.Exit(_show_plan(asked, console))
        tally = rejudge.carry_out(asked, lambda line: _say(console, line))
        _report(asked, tally, console, json)
        raise typer.Exit(tally.exit_code)
    except EvalError as error:
        raise typer.Exit(driver.report_error(error, console)) from None


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _show_plan(asked: opinions.JudgePass, console: Console) -> int:
    work = opinions.plan(asked)
    calls = [item for item in work.left if opinions.needs_asking(item, asked)]
    _say(console, f"Run directory: {object_store.place(asked.job.run_dir)}")
    _say(console, f"Label: {asked.label}; protocol: {asked.job.protocol_label()}")
    _say(
        console,
        f"Results: {len(work.left)} to judge ({len(work.left) - len(calls)} of them need no call), "
        f"{len(work.items) - len(work.left)} stored, {work.skipped} without an answer",
    )
    _say(console, f"Expected: {len(calls)} judge calls, {usd(rejudge.expected_cost(asked, len(calls)))}")
    problem = asyncio.run(rejudge.route_problem(asked)) if calls else ""
    if problem:
        _say(console, f"missing: {problem}", style="red")
    _say(console, "Nothing was started or paid.")
    return 2 if problem else 0


def _report(asked: opinions.JudgePass, tally: rejudge.Tally, console: Console, json: Path | None) -> None:
    """The table, the accounting and the figures, from what is stored now."""
    work, spent = opinions.plan(asked), rejudge.spent(asked, tally.epoch)
    found = agreement(_pairs(asked, work))
    console.print(agreement_page(found, *asked.names))
    _say(console, "Over the results above, not over all that were planned: the run's score stays as it was.")
    changed = sum(item.has_other_reference for item in work.items)
    if changed:
        _say(
            console,
            f"Note: {changed} first verdicts are against another reference answer than now.",
            "yellow",
        )
    if work.skipped:
        _say(console, f"Not judged: {work.skipped} results without an answer.")
    _say(console, f"Accounting: {tally.line()}")
    if tally.last_error:
        _say(console, f"Last error: {' '.join(tally.last_error.split())}", "red")
    _say(
        console,
        f"Judge calls: {spent.calls} by this command ({usd(spent.cost_usd)}), {spent.calls_total} under "
        f"{asked.label!r} so far ({usd(spent.cost_usd_total)}); no rollout call",
    )
    if json is not None:
        rundir.write_json(json, _figures(asked, tally, found, spent) | {"without_answer": work.skipped})


def _pairs(asked: opinions.JudgePass, work: opinions.Work) -> list[Pair]:
    many = asked.own.trials > 1
    return [
        Pair(f"{item.task.task_id}#{item.trial}" if many else item.task.task_id, item.first, item.second)
        for item in work.items
        if item.first is not None and item.second is not None
    ]


def _figures(
    asked: opinions.JudgePass, tally: rejudge.Tally, found: Agreement, spent: rejudge.Spent
) -> dict[str, Any]:
    first, second, n = found.first_interval, found.second_interval, found.n
    return {
        "label": asked.label,
        **asked.settings,
        "protocol": asked.job.protocol_label(),
        "n": n,
        "first_accuracy": found.first_correct / n if n else None,
        "first_interval": [first.low, first.high],
        "second_accuracy": found.second_correct / n if n else None,
        "second_interval": [second.low, second.high],
        "agreement": found.share,
        "kappa": found.kappa,
        "wrong_then_right": list(found.to_right),
        "right_then_wrong": list(found.to_wrong),
        "judged": tally.judged,
        "owed": tally.owed,
        "failed": tally.failed,
        "model_calls": spent.calls,
        "model_calls_total": spent.calls_total,
        "cost_usd": spent.cost_usd,
        "cost_usd_total": spent.cost_usd_total,
        "exit_code": tally.exit_code,
        "run_dir": str(asked.job.run_dir),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
