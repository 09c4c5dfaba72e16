"""The run on one page: where every planned task is, how right, how long, how dear.

Every score travels with the facts of the run (protocol, judge model, prompt digest) from its
`run_start` event; what the log does not say, or says oddly, becomes a note and never an exception.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from analysis.numbers import Accounting, Counted, Interval, accounting, wilson_interval
from analysis.queries import RunLog
from ray_app import object_store

State = Literal["empty", "not ended", "ended"]


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Counted results of one category or answer type; accuracy is over all `n` of them."""

    name: str
    n: int
    ok: int
    failed: int
    limited: int
    owed: int
    correct: int
    accuracy: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Totals:
    """Work done by the whole run, repeats included.

    `invalid_turns` are those in which the orchestrator called no tool that it was offered.
    `repeated_calls` are model calls that succeeded before and were made again, as after a crash.
    `counted_cost_usd` is the part of `cost_usd` that the tasks with a counted result took, in all their
    attempts. `cut_prompts` had no room for all that was gathered; `overflows` were prompts that an endpoint
    called too long although they had been counted. `wall_s` adds up the time that each epoch was at work, so
    that the pause before a resume is no part of it.
    """

    epochs: int = 0
    attempts: int = 0
    turns: int = 0
    invalid_turns: int = 0
    model_calls: int = 0
    repeated_calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    counted_cost_usd: float = 0.0
    cut_prompts: int = 0
    overflows: int = 0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SpendRow:
    """What one kind of work (`models`, `web`, `code`) cost, the dearest first; models as endpoints name them.

    `calls` are paid web calls where the kind is `web`. Failed and repeated calls are in.
    """

    kind: str
    model: str
    calls: int
    tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class TaskCost:
    """US dollars of the counted results: a mean one, a middle one, the dearest and its task."""

    mean_usd: float = 0.0
    p50_usd: float = 0.0
    most_usd: float = 0.0
    most_task: str = ""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `python -m analysis summary` prints."""

    run_dir: str
    state: State
    facts: dict[str, Any]
    accounting: Accounting
    by_category: list[GroupRow]
    by_answer_type: list[GroupRow]
    failures: dict[str, int]
    totals: Totals
    spending: list[SpendRow]
    task_cost: TaskCost
    notes: list[str]


# A result's duration is that of its task and says nothing of when it was committed, hence the case.
_TOTALS = """
with epochs as (
    select min(epoch_us(t_start)) / 1e6 as began,
           max(epoch_us(t_start) / 1e6 + case when kind in ('result', 'run_start', 'run_end') then 0
                                              else duration_s end) as ended
    from live group by epoch
), answered as (
    select count(*) - count(distinct (rollout_key, judge_key, trial, call_seq)) as repeated
    from calls where kind = 'model_call' and not is_error and call_seq >= 0
)
select (select count(*) from epochs),
       count(*) filter (kind = 'attempt'), count(*) filter (kind = 'turn'),
       count(*) filter (kind = 'turn' and status = 'invalid'),
       count(*) filter (kind = 'model_call'), (select repeated from answered),
       coalesce(sum(retries) filter (kind = 'model_call'), 0)::bigint,
       coalesce(sum(prompt_tokens) filter (kind = 'model_call'), 0)::bigint,
       coalesce(sum(cached_tokens) filter (kind = 'model_call'), 0)::bigint,
       coalesce(sum(completion_tokens) filter (kind = 'model_call'), 0)::bigint,
       coalesce(sum(cost_usd) filter (kind in ('model_call', 'retrieval', 'code')), 0.0),
       (select coalesce(sum(cost_usd), 0.0) from results),
       count(*) filter (kind = 'model_call' and context_cut > 0), count(*) filter (kind = 'overflow'),
       (select coalesce(sum(ended - began), 0.0) from epochs)
from live
"""
_SPENDING = """
select case kind when 'model_call' then 'models' when 'retrieval' then 'web' else 'code' end,
       case when kind = 'model_call' then coalesce(model, '') else '' end,
       coalesce(sum(case when kind = 'retrieval' then web_calls else 1 end), 0)::bigint,
       coalesce(sum(tokens), 0)::bigint, coalesce(sum(cost_usd), 0.0)
from calls where kind <> 'tool_call' group by 1, 2 order by 5 desc, 1, 2
"""
_TASK_COST = """
select avg(cost_usd), median(cost_usd), max(cost_usd), coalesce(arg_max(task_id, cost_usd), '')
from results having count(cost_usd) > 0
"""
_NEWEST_START = """
select detail from events where kind = 'run_start' order by epoch desc, t_start desc limit 1
"""
_GROUPS = """
select coalesce({column}, ''), count(*),
       count(*) filter (outcome = 'ok'), count(*) filter (outcome = 'failed'),
       count(*) filter (outcome = 'limited'), count(*) filter (outcome = 'owed'),
       count(*) filter (outcome = 'ok' and is_correct)
from results group by 1 order by 2 desc, 1
"""
_FAILURES = """
select coalesce(error_kind, 'unknown'), count(*) from results where outcome = 'failed'
group by 1 order by 2 desc, 1
"""


def summarise(log: RunLog) -> RunSummary:
    """Outcomes, accuracy, work, cost and time of the run."""
    facts = _facts(log)
    account, notes = _account(log, facts)
    return RunSummary(
        run_dir=object_store.place(log.run_dir),
        state=_state(log),
        facts=facts,
        accounting=account,
        by_category=_groups(log, "category"),
        by_answer_type=_groups(log, "answer_type"),
        failures=dict(log.ask(_FAILURES)),
        totals=Totals(*log.ask(_TOTALS)[0]),
        spending=[SpendRow(*row) for row in log.ask(_SPENDING)],
        task_cost=TaskCost(*(log.ask(_TASK_COST) or [()])[0]),
        notes=notes,
    )


def _facts(log: RunLog) -> dict[str, Any]:
    """What the newest `run_start` says of the run; empty where there is none to read."""
    rows = log.ask(_NEWEST_START)
    try:
        facts = json.loads(rows[0][0]) if rows else {}
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _account(log: RunLog, facts: dict[str, Any]) -> tuple[Accounting, list[str]]:
    rows = [Counted(*row) for row in log.ask("select outcome, is_correct from results")]
    planned = facts.get("planned")
    if isinstance(planned, int) and planned >= len(rows):
        return accounting(rows, planned), []
    if not isinstance(planned, int):
        note = "How many tasks were planned is not in the log: accuracy is over the results."
    else:
        note = f"The log holds {len(rows)} results for {planned} planned tasks: accuracy is over the results."
    return accounting(rows, len(rows)), [note]


def _state(log: RunLog) -> State:
    epoch, ended = log.ask("select max(epoch), max(epoch) filter (kind = 'run_end') from events")[0]
    if epoch is None:
        return "empty"
    return "ended" if ended == epoch else "not ended"


def _groups(log: RunLog, column: Literal["category", "answer_type"]) -> list[GroupRow]:
    return [_group(*row) for row in log.ask(_GROUPS.format(column=column))]


def _group(name: str, n: int, ok: int, failed: int, limited: int, owed: int, correct: int) -> GroupRow:
    interval = wilson_interval(correct, n)
    return GroupRow(name or "(none)", n, ok, failed, limited, owed, correct, correct / n, interval)
