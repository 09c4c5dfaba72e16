"""`--plan`: what a run would do and cost, and what it lacks, before anything is started.

Each endpoint is asked for its list of models and for a few tokens; what those cost is said.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app import events, object_store, outlook, planning, services
from ray_app.chat import Router, cost
from ray_app.config import BaseRun
from ray_app.driver import Job
from ray_app.ordering import NOTHING_ASKED, Asked
from ray_app.probe import Probe
from ray_app.records import Usage

# Of a call, without a run to learn from.
ASSUMED_USAGE = Usage(prompt_tokens=8000, completion_tokens=1000)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected model calls and US dollars of the tasks that are left, and where that comes from."""

    calls: float
    cost_usd: float
    basis: str


@dataclass(frozen=True, slots=True)
class RouteRow:
    """A name that calls are made under, the model and address behind it, and the probe's answer."""

    name: str
    model: str
    address: str
    problem: str
    notes: str = "answers"


@dataclass(frozen=True, slots=True)
class Probed:
    """The routes as they were found, and what asking them used."""

    rows: list[RouteRow]
    usage: Usage
    cost_usd: float

    @property
    def line(self) -> str:
        tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        if self.cost_usd > 0:
            return f"Nothing was started. Probing the routes used {tokens:,} tokens: ${self.cost_usd:.4f}."
        used = f" Probing the routes used {tokens:,} tokens, free of charge." if tokens else ""
        return f"Nothing was started or paid.{used}"


def show(job: Job, work: planning.Plan, console: Console, asked: Asked = NOTHING_ASKED) -> bool:
    """Print the plan. Returns whether everything that the run needs is there or can be started."""
    owed = _outcomes(job.run_dir).get("owed", 0)
    console.print(f"Run directory: {object_store.place(job.run_dir)}", soft_wrap=True, highlight=False)
    console.print(
        f"Tasks: {len(work.items)} to run ({owed} of them owed a verdict only), "
        f"{work.skipped} skipped as done{_later(work)}; {work.kept.line()}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(job.plan_line(), soft_wrap=True, highlight=False)
    probed = asyncio.run(_routes(job))
    console.print(_route_table(probed.rows))
    estimate = expected(job, len(work.items))
    console.print(
        f"Expected: about {estimate.calls:,.0f} model calls, ${estimate.cost_usd:,.2f} ({estimate.basis})",
        highlight=False,
    )
    for line in outlook.page(job, work, asked):
        console.print(line, markup=False, soft_wrap=True, highlight=False)
    for line in caveats(job.config):
        console.print(line, style="yellow", markup=False, soft_wrap=True, highlight=False)
    problems = [
        f"{row.name}: {row.problem}" for row in probed.rows if row.problem and not row.problem.startswith("(")
    ]
    for problem in problems:
        console.print(f"missing: {problem}", style="red", markup=False, soft_wrap=True, highlight=False)
    console.print(probed.line, soft_wrap=True, highlight=False)
    return not problems


def _later(work: planning.Plan) -> str:
    return f", {len(work.later)} left for after the pilot" if work.later else ""


def caveats(config: BaseRun) -> list[str]:
    """What the plan's figures leave out, a line each."""
    lines = []
    if unpriced := config.unpriced():
        lines.append(
            f"unpriced: {', '.join(unpriced)}; calls count as $0.00 (set models.*.price, 0 where it is free)"
        )
    if estimated := config.estimated():
        lines.append(
            f"tokens estimated: {', '.join(estimated)} (tokenizer: words), so a quarter of the context stays "
            "free; name a tokenizer.json or a hub id where there is one"
        )
    return lines


def _outcomes(run_dir: Path) -> Mapping[str, int]:
    if not (run_dir / "log").exists():
        return {}
    return Counter(events.results(run_dir)["outcome"].to_pylist())


def expected(job: Job, tasks: int) -> Estimate:
    """From the run's own finished tasks where there are any, else from the assumed call sizes."""
    if (job.run_dir / "log").exists():
        finished, calls, spent = _so_far(job.run_dir)
        if finished:
            share = tasks / finished
            return Estimate(calls * share, spent * share, f"from {finished} finished tasks of this run")
    assumed = job.config.expected_calls()
    per_task = sum(n * cost(ASSUMED_USAGE, job.config.models[model]) for model, n in assumed.items())
    basis = (
        f"assuming {sum(assumed.values()):g} calls a task, {ASSUMED_USAGE.prompt_tokens:,} tokens in and "
        f"{ASSUMED_USAGE.completion_tokens:,} out each"
    )
    return Estimate(tasks * sum(assumed.values()), tasks * per_task, basis)


def _so_far(run_dir: Path) -> tuple[int, int, float]:
    query = f"""
        select (select count(*) from results), count(*) filter (kind = 'model_call'),
               coalesce(sum(cost_usd), 0)
        from events where kind in ('model_call', 'retrieval', 'code') and not {events.SECOND_OPINION}
    """
    with events.connect(run_dir) as log:
        finished, calls, spent = log.execute(query).fetchall()[0]
    return finished, calls, spent


async def _routes(job: Job) -> Probed:
    """Every route of the run with a probe; "(...)" marks what the job itself will start."""
    config, urls = job.config, job.serve_config.urls()
    router = Router(config.models, urls)
    down = {
        name: await services.probe(f"{job.serve_config.root(name)}/health")
        for name in services.needed(config)
    }
    found: dict[str, list[Probe]] = {}
    for name in config.models_used():
        waiting = [item.service for item in config.models[name].endpoints if down.get(item.service or "")]
        if waiting:
            found[name] = [Probe("", f"(service {waiting[0]} will be started)")]
        else:
            found[name] = await router.examine(name, with_tools=name == config.routes()["orchestrator"])
    rows = [
        _row(_spoken(name), model, router.routes()[model], found[model])
        for name, model in config.routes().items()
    ]
    await router.close()
    used = [(probe.usage, config.models[name]) for name, probes in found.items() for probe in probes]
    usage = Usage(sum(one.prompt_tokens for one, _ in used), sum(one.completion_tokens for one, _ in used))
    paid = sum(cost(one, model) for one, model in used)
    return Probed([*rows, *await _retriever_row(job, down)], usage, paid)


def _row(name: str, model: str, urls: Sequence[str], probes: Sequence[Probe]) -> RouteRow:
    """One line for all endpoints: what is wrong with any of them, else what each of them showed."""
    problems = [f"{probe.url}: {probe.problem}" if probe.url else probe.problem for probe in probes]
    problem = "; ".join(line for line, probe in zip(problems, probes, strict=True) if probe.problem)
    return RouteRow(name, model, ", ".join(urls), problem, "\n".join(probe.line for probe in probes))


async def _retriever_row(job: Job, down: Mapping[str, Any]) -> list[RouteRow]:
    settings = job.config.retriever_used()
    if settings is None:
        return []
    if settings.url is not None:
        problem = await services.probe(f"{settings.url}/health")
        return [RouteRow("retriever", "", settings.url, problem)]
    name = settings.service or ""
    problem = "(will be started)" if down.get(name) else ""
    return [RouteRow("retriever", "", job.serve_config.root(name) or "", problem)]


def _spoken(key: str) -> str:
    return key.removeprefix("tools.").replace(".", " ")


def _route_table(rows: list[RouteRow]) -> Table:
    table = Table("route", "model", "address", "probe", title="Routes", title_justify="left")
    for row in rows:
        table.add_row(row.name, row.model, row.address, row.problem or row.notes)
    return table
