"""Questions to a run's event log, answered as small frozen rows.

Durations are over calls that succeeded, failures are a column of their own: a fast failure is no fast
call. Rows served from the journal on resume are left out of every count, time and cost. Names of
tools, models and categories are compared whole, never by prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from ray_app import events

TOOLS = ("enhance_reasoning", "search", "answer")
OTHER_WORK = ("orchestrator", "user", "judge", "retrieval", "code")


@dataclass(frozen=True, slots=True)
class RunLog:
    """One snapshot of a run: every question is asked of the same rows, however long the run goes on."""

    run_dir: Path
    sql: duckdb.DuckDBPyConnection

    def ask(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that the query gives."""
        return self.sql.execute(query, parameters).fetchall()


@dataclass(frozen=True, slots=True)
class ToolRow:
    """Calls of one tool, or of one other kind of work (then `share` is None: it is no tool call).

    `share` is of all tool calls. Times are whole calls that succeeded, in seconds, None where none did.
    `tokens` (prompt and completion) and `cost_usd` include failed calls, which are paid for too.
    """

    name: str
    calls: int
    share: float | None
    errors: int
    mean_s: float | None
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Calls of one tool with one model; `share` is of the calls of that tool."""

    tool: str
    model: str
    calls: int
    share: float
    errors: int
    tokens: int
    cost_usd: float


_COLUMNS = [
    *("kind", "epoch", "rollout_key", "judge_key", "trial", "call_seq", "role", "tool", "alias", "model"),
    *("status", "exit_status", "is_replayed", "t_start", "duration_s", "prefill_s", "decode_s"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd", "retries", "detail"),
    *("web_calls", "context_cut"),
]
# `work` is what a call's time counts as, `payer` where its tokens and cost are shown: an expert's time
# is inside its tool call, its tokens belong to the tool. A program that ends badly has status ok,
# because the sandbox did its part; in the tables it is an error.
_CALLS = """
create temp view calls as
select *,
       status <> 'ok' or coalesce(exit_status, 0) <> 0 as is_error,
       case kind when 'tool_call' then tool when 'model_call' then role else kind end as work,
       case when kind = 'model_call' and role = 'expert' then tool else work end as payer,
       kind = 'tool_call' or (kind = 'model_call' and role = 'expert') as is_tool,
       coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0) as tokens
from live
where kind in ('model_call', 'tool_call', 'retrieval', 'code')
"""
_TOOL_TABLE = """
with timed as (
    select is_tool, work as name, count(*) as calls, count(*) filter (is_error) as errors,
           avg(duration_s) filter (not is_error) as mean_s,
           quantile_cont(duration_s, [0.5, 0.9, 0.99]) filter (not is_error) as points
    from calls where work <> 'expert' group by all
), spent as (
    select is_tool, payer as name, sum(tokens)::bigint as tokens, sum(cost_usd) as cost_usd
    from calls where kind <> 'tool_call' group by all
)
select name, coalesce(calls, 0),
       case when is_tool then coalesce(calls / sum(calls) filter (is_tool) over (), 0.0) end,
       coalesce(errors, 0), mean_s, points[1], points[2], points[3],
       coalesce(tokens, 0), coalesce(cost_usd, 0.0)
from timed full join spent using (is_tool, name)
"""
_USAGE_TABLE = """
with used as (
    select tool, model, count(*) as calls, count(*) filter (is_error) as errors
    from calls where kind = 'tool_call' group by all
), spent as (
    select tool, model, sum(tokens)::bigint as tokens, sum(cost_usd) as cost_usd
    from calls where role = 'expert' group by all
)
select tool, model, coalesce(calls, 0), coalesce(calls / sum(calls) over (partition by tool), 0.0),
       coalesce(errors, 0), coalesce(tokens, 0), coalesce(cost_usd, 0.0)
from used full join spent using (tool, model)
"""


def open_run(run_dir: Path) -> RunLog:
    """A snapshot of the run in `run_dir`. Raises RunDirError where there is no run."""
    # DuckDB would wrap the reader's errors, so Arrow reads and DuckDB only asks.
    snapshot = events.read(run_dir, _COLUMNS).read_all()
    counted = events.results(run_dir)
    sql = duckdb.connect()
    sql.register("snapshot", snapshot)
    sql.execute(f"create temp view events as select * from snapshot where not {events.SECOND_OPINION}")
    sql.register("results", counted)
    sql.execute("create temp view live as select * from events where not coalesce(is_replayed, false)")
    sql.execute(_CALLS)
    return RunLog(run_dir, sql)


def tool_table(log: RunLog) -> list[ToolRow]:
    """The tools, unknown ones after the known, then the models by role, retrieval and code."""
    rows = [ToolRow(*row) for row in log.ask(_TOOL_TABLE)]
    return sorted(rows, key=lambda row: (row.share is None, _place(row.name)))


def usage_table(log: RunLog) -> list[UsageRow]:
    """Tool by model: tools in the order of `tool_table`, the most used model first."""
    rows = [UsageRow(*row) for row in log.ask(_USAGE_TABLE)]
    return sorted(rows, key=lambda row: (_place(row.tool), -row.calls, row.model))


def _place(name: str) -> tuple[int, str]:
    known = (*TOOLS, *OTHER_WORK)
    return (known.index(name), "") if name in known else (len(known), name)
