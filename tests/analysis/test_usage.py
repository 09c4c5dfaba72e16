"""Who was called how often, with which success, for how much: worked out by hand from a few events."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from analysis import tables
from analysis.log import RunLog, open_run
from analysis.selection import Selection
from analysis.summary import summarise
from analysis.usage import ToolRow, tool_table, usage
from ray_app.errors import RunDirError
from ray_app.records import Event
from tests.analysis.runs import event, model_call, tool_call, write_run


def expert_call(**columns: Any) -> Event:
    return model_call("expert", tool="search", model="m", **columns)


def opened(tmp_path: Path, *rows: Event) -> RunLog:
    return open_run(write_run(tmp_path / "run", rows))


def rows_by_name(log: RunLog) -> dict[str, ToolRow]:
    return {row.name: row for row in tool_table(log)}


def test_a_failed_call_counts_as_an_error_and_not_as_a_fast_call(tmp_path: Path) -> None:
    log = opened(
        tmp_path,
        tool_call("search", 2.0),
        tool_call("search", 4.0),
        tool_call("search", 0.001, status="error"),
        tool_call("answer", 9.0),
    )
    search = rows_by_name(log)["search"]
    assert (search.calls, search.errors, search.share) == (3, 1, 0.75)
    assert (search.mean_s, search.p50_s) == (3.0, 3.0)
    assert search.p90_s == pytest.approx(3.8)
    assert search.p99_s == pytest.approx(3.98)
    assert usage(log).rows[0].success == pytest.approx(2 / 3)


def test_a_tool_whose_calls_all_failed_has_no_times(tmp_path: Path) -> None:
    row = rows_by_name(opened(tmp_path, tool_call("search", 1.0, status="error")))["search"]
    assert (row.errors, row.mean_s, row.p99_s) == (1, None, None)


def test_tokens_that_no_endpoint_told_are_said_to_be_estimated(tmp_path: Path) -> None:
    told: dict[str, Any] = {"prompt_tokens": 20, "completion_tokens": 10, "cost_usd": 0.5}
    log = opened(tmp_path, expert_call(**told), expert_call(**told), expert_call(**told, is_estimated=True))
    found = usage(log)
    assert [(row.tokens, row.estimated_tokens) for row in found.rows] == [(90, 30)]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(tables.usage_page(found), tables.summary_page(summarise(log)))
    page = console.export_text()
    assert "Tokens in all: 90; 33.3% of them estimated, with their cost" in page
    assert "60 prompt (0 cached), 30 completion; 33.3% of them estimated, with their cost" in page
    without = usage(opened(tmp_path / "other", expert_call(**told)))
    console.print(tables.usage_page(without))
    assert "estimated" not in console.export_text()


def test_replayed_rows_count_nowhere(tmp_path: Path) -> None:
    spent: dict[str, Any] = {"prompt_tokens": 10, "completion_tokens": 5, "cost_usd": 0.5}
    once = [tool_call("search", 2.0, model="m"), expert_call(**spent)]
    again = [tool_call("search", 0.0, model="m", is_replayed=True)]
    again.append(expert_call(**spent, is_replayed=True))
    log = opened(tmp_path, *once, *again)
    row = rows_by_name(log)["search"]
    assert (row.calls, row.mean_s, row.tokens, row.cost_usd) == (1, 2.0, 15, 0.5)
    assert [(use.calls, use.tokens) for use in usage(log).rows] == [(1, 15)]


def test_each_kind_of_work_has_its_row_in_a_fixed_order(tmp_path: Path) -> None:
    log = opened(
        tmp_path,
        event("code", task="a", duration_s=0.5, exit_status=1, tool="enhance_reasoning"),
        event("code", task="a", duration_s=0.7, exit_status=0, tool="enhance_reasoning"),
        event("retrieval", task="a", duration_s=0.2, tool="search", cost_usd=0.008),
        model_call("judge", 3.0, prompt_tokens=100, completion_tokens=1),
        model_call("orchestrator", 1.5),
        tool_call("book_flight", 1.0),
        tool_call("answer", 1.0),
        tool_call("enhance_reasoning", 1.0),
    )
    rows = tool_table(log)
    tools = ["enhance_reasoning", "answer", "book_flight"]
    assert [row.name for row in rows] == [*tools, "orchestrator", "judge", "retrieval", "code"]
    assert [row.share is None for row in rows] == [False] * 3 + [True] * 4
    by_name = rows_by_name(log)
    assert (by_name["code"].calls, by_name["code"].errors, by_name["code"].mean_s) == (2, 1, 0.7)
    assert by_name["judge"].tokens == 101
    assert by_name["retrieval"].cost_usd == 0.008
    assert sum(row.cost_usd or 0.0 for row in usage(log).rows) == 0.008


def test_an_experts_tokens_belong_to_its_tool_even_if_the_tool_call_never_ended(tmp_path: Path) -> None:
    log = opened(tmp_path, expert_call(prompt_tokens=7, cost_usd=0.25))
    (row,) = tool_table(log)
    assert (row.name, row.calls, row.share, row.tokens, row.cost_usd) == ("search", 0, 0.0, 7, 0.25)
    (use,) = usage(log).rows
    assert (use.tool, use.model, use.calls, use.share, use.success) == ("search", "m", 0, 0.0, None)
    assert use.cost_usd == 0.25


def test_model_names_are_compared_whole(tmp_path: Path) -> None:
    calls = [("search", "gpt-5-mini")] * 1 + [("search", "gpt-5")] * 3 + [("answer", "gpt-5")]
    log = opened(tmp_path, *(tool_call(tool, 1.0, model=model) for tool, model in calls))
    found = [(row.tool, row.model, row.calls, row.share, row.share_of_all) for row in usage(log).rows]
    assert found == [
        ("search", "gpt-5", 3, 0.75, 0.6),
        ("search", "gpt-5-mini", 1, 0.25, 0.2),
        ("answer", "gpt-5", 1, 1.0, 0.2),
    ]
    only = usage(open_run(tmp_path / "run", Selection(models=("gpt-5",)))).rows
    assert [(row.tool, row.calls) for row in only] == [("search", 3), ("answer", 1)]


def test_questions_see_one_snapshot_while_the_run_goes_on(tmp_path: Path) -> None:
    log = opened(tmp_path, tool_call("search", 1.0))
    write_run(tmp_path / "run", [tool_call("search", 1.0)], writer_id="later")
    assert rows_by_name(log)["search"].calls == 1
    assert rows_by_name(open_run(tmp_path / "run"))["search"].calls == 2


def test_a_folder_that_is_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="expected a run directory"):
        open_run(tmp_path)
