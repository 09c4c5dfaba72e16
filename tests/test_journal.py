"""What calls leave in the record of their task, and what they cost there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.log import open_run
from analysis.summary import summarise
from ray_app import recorded
from ray_app.chat import ChatRequest, Router
from ray_app.engine import result_event
from ray_app.errors import (
    ContextOverflow,
    Diverged,
    EndpointError,
    EvalError,
    LimitReached,
    Refusal,
    ToolError,
    kind_of,
)
from ray_app.hle import make_solver, sandbox_of
from ray_app.journal import CHAT, RETRIEVAL, End, Journal, Record, RecordedCall, RecordedError
from ray_app.options import Options
from ray_app.planning import WorkItem
from ray_app.prompting import load_prompts
from ray_app.records import ChatReply, Event, Hit, Retrieval, Task, Usage
from ray_app.retrieval.index import UnknownScope
from ray_app.sandbox import available_isolation
from ray_app.worker import unfinished
from tests.event_logs import make_writer, read_rows
from tests.model_server import chunk, serving, usage
from tests.stand_ins import FixedRetriever, MemoryLog, ScriptedModel, chooses, config, journal, says

TASK = Task("q1", "What moves a glacier?", "ice", scope=(3, 1))
LOCAL, PAGE = Hit(3, "a local text", 0.5), Hit(-1, "a page of the web", -1.0, "tavily")
FOUND = Retrieval((LOCAL, PAGE), 0.012, 2, "1 web pages were not read in 30 s")


async def retrieved(own: Journal, found: Retrieval = FOUND) -> Retrieval:
    async def perform() -> Retrieval:
        return found

    return await own.call(RETRIEVAL, ["ice", "q1", 5], perform)


async def refused() -> Retrieval:
    raise AssertionError("a recorded call must not go out again")


@pytest.mark.parametrize("found", [FOUND, Retrieval(()), Retrieval((LOCAL,)), Retrieval((PAGE, PAGE), 0.0)])
async def test_a_recorded_retrieval_is_served_whole_and_costs_what_it_cost_once(found: Retrieval) -> None:
    log = MemoryLog()
    await retrieved(journal(TASK, log), found)
    resumed = journal(TASK, MemoryLog(), log.record())
    assert await resumed.call(RETRIEVAL, ["ice", "q1", 5], refused) == found
    assert (resumed.cost_usd, resumed.replayed) == (found.cost_usd, 1)


async def test_its_event_tells_where_the_hits_came_from_and_what_went_wrong() -> None:
    log = MemoryLog()
    own = journal(TASK, log)
    await retrieved(own)
    [event] = log.of("retrieval")
    assert (event.search_backend, event.local_hits, event.web_hits) == ("tavily_fallback", 1, 1)
    assert (event.cost_usd, event.detail, event.status) == (0.012, FOUND.web_error, "ok")
    assert own.cost_usd == 0.012


async def test_a_retrieval_without_the_web_is_local_and_free() -> None:
    log = MemoryLog()
    await retrieved(journal(TASK, log), Retrieval((LOCAL,)))
    [event] = log.of("retrieval")
    assert (event.search_backend, event.local_hits, event.web_hits) == ("local_only", 1, 0)
    assert (event.cost_usd, event.detail) == (0.0, "")


async def test_the_log_gives_back_what_was_recorded(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    base = Event("attempt", 0.0, task_id=TASK.task_id, rollout_key=TASK.rollout_key)
    own = Journal(TASK, writer, base)
    await retrieved(own)
    own.note("tool_call", tool="search")
    writer.close()
    key = (TASK.rollout_key, 0)
    record = recorded.records(tmp_path, {key})[key]
    resumed = Journal(TASK, MemoryLog(), base, record)
    assert await resumed.call(RETRIEVAL, ["ice", "q1", 5], refused) == FOUND
    assert summarise(open_run(tmp_path)).totals.cost_usd == FOUND.cost_usd


async def test_a_record_of_bare_hits_is_still_served() -> None:
    log = MemoryLog()
    await retrieved(journal(TASK, log))
    [call] = log.record().calls
    old = type(call)(call.call_seq, call.request_hash, json.dumps(json.loads(call.body)["hits"]), call.texts)
    resumed = journal(TASK, MemoryLog(), Record((old,)))
    assert await resumed.call(RETRIEVAL, ["ice", "q1", 5], refused) == Retrieval((LOCAL, PAGE))


async def test_the_spending_limit_of_a_task_counts_the_web() -> None:
    def script(request: ChatRequest) -> ChatReply:
        return chooses("search", "search-1") if request.tools else says("<query>moving ice</query>")

    settings = config(limits={"cost_usd": 0.03})
    source = FixedRetriever([LOCAL], cost_usd=0.02)
    solver = make_solver(settings, load_prompts(), ScriptedModel(script), source, None)
    own = journal(TASK, MemoryLog())
    with pytest.raises(LimitReached, match=r"\$0\.0400 spent"):
        await solver.solve(TASK, own)
    assert len(source.queries) == 2


def whole(log: MemoryLog, end: RecordedError | None = None) -> Record:
    return replace(log.record(), end=End(end))


async def test_a_call_that_is_not_in_a_whole_record_never_goes_out_and_says_where_it_parts() -> None:
    log, now = MemoryLog(), MemoryLog()
    own = journal(TASK, log)
    own.turn, own.tool, own.alias = 2, "search", "search-1"
    await retrieved(own)
    replay = journal(TASK, now, whole(log))
    replay.turn, replay.tool, replay.alias = 2, "search", "search-2"
    with pytest.raises(Diverged, match=r"turn 2, call 0, search/search-2 retrieval: recorded was .*-1"):
        await replay.call(RETRIEVAL, ["ice", "q1", 6], refused)
    replay.alias = "search-1"
    with pytest.raises(Diverged, match="it is asked otherwise than recorded"):
        await replay.call(RETRIEVAL, ["another query", "q1", 5], refused)
    row = now.of("retrieval")[0]
    assert (row.status, row.error_kind, row.is_replayed, replay.is_over) == ("error", "replay", True, True)
    replay = journal(TASK, MemoryLog(), whole(log))
    assert await replay.call(RETRIEVAL, ["ice", "q1", 5], refused) == FOUND
    assert (replay.cost_usd, replay.paid_usd) == (FOUND.cost_usd, 0.0)
    with pytest.raises(Diverged, match="call 1, retrieval: one call more than was recorded"):
        await replay.call(RETRIEVAL, ["ice", "q1", 5], refused)


async def test_where_time_ended_the_recorded_task_its_replay_ends_the_same() -> None:
    log, end = MemoryLog(), RecordedError("limit", "LimitReached", "no answer within 3 s (limits.wall_s)")
    await retrieved(journal(TASK, log))
    replay = journal(TASK, MemoryLog(), whole(log, end))
    await replay.call(RETRIEVAL, ["ice", "q1", 5], refused)
    with pytest.raises(LimitReached, match=r"limits\.wall_s"):
        await replay.call(RETRIEVAL, ["more", "q1", 5], refused)
    # But not before all that was recorded is asked again.
    with pytest.raises(Diverged):
        await journal(TASK, MemoryLog(), whole(log, end)).call(RETRIEVAL, ["more", "q1", 5], refused)


@pytest.mark.parametrize(
    "error",
    [
        ContextOverflow("too long"),
        ToolError("no such thing"),
        EndpointError("down"),
        UnknownScope("q1"),
        KeyError("x"),
    ],
)
async def test_a_recorded_failure_is_raised_again_as_what_it_was(error: Exception) -> None:
    log, now = MemoryLog(), MemoryLog()

    async def fails() -> Retrieval:
        raise error

    with pytest.raises(type(error)):
        await journal(TASK, log).call(RETRIEVAL, ["ice", "q1", 5], fails)
    (row,) = log.of("retrieval")
    failed = RecordedError(row.error_kind or "", row.error_type or "", row.error)
    record = Record((RecordedCall(0, row.request_hash, "", {}, "", failed),), end=End())
    with pytest.raises(EvalError) as raised:
        await journal(TASK, now, record).call(RETRIEVAL, ["ice", "q1", 5], refused)
    assert raised.value.kind == kind_of(error)
    assert type(raised.value) is type(error) or type(error) in (UnknownScope, KeyError)
    (again,) = now.of("retrieval")
    names = ("status", "error_kind", "error_type", "error", "request_hash", "call_seq")
    assert all(getattr(again, name) == getattr(row, name) for name in names) and again.is_replayed


PRICE = {"input": 1.25, "output": 10, "cached_input": 0.125}
COST = (
    600 * 1.25 + 400 * 0.125 + 50 * 10
) / 1e6  # of each reply: 1,000 tokens in, 400 of them cached, 50 out


def streamed(text: str = "", tool: str = "", alias: str = "", finish: str = "stop") -> list[str]:
    call = {"index": 0, "id": "c", "function": {"name": tool, "arguments": f'{{"model": "{alias}"}}'}}
    delta = {"tool_calls": [call]} if tool else {"content": text}
    return [chunk(delta), chunk({}, finish), usage(1000, 50, 400)]


async def test_events_task_and_run_cost_the_same_to_the_cent_through_failures_and_a_resume(
    tmp_path: Path,
) -> None:
    """Two attempts at one task against a real server; the first breaks at a call that was paid for."""
    replies = [
        streamed(tool="search", alias="search-1"),
        streamed("<query>moving ice</query>"),
        streamed(tool="enhance_reasoning", alias="reasoner-1"),
        streamed("```python\nprint(1)\n```"),
        streamed("half an", finish="content_filter"),  # paid for, and terminal for the attempt
        # The second attempt is served the four calls above, the web and the program.
        streamed(tool="answer", alias="answer-1"),
        streamed("<answer>frozen water</answer>"),
        streamed("<correct>perhaps</correct>"),  # no verdict: paid for, and owed
        streamed("<correct>True</correct>"),
    ]
    writer = make_writer(tmp_path)
    options, key = Options(tmp_path, "run", 1, 20, 2, 3), (TASK.rollout_key, 0)
    results = []
    async with serving(*replies) as server:
        model = {"endpoints": [{"base_url": server.url}], "price": PRICE}
        settings = config(models={"m": model}, code={"usd_per_s": 0.001})
        client = Router(settings.models, {})
        source = FixedRetriever([LOCAL, PAGE], cost_usd=0.02)
        solver = make_solver(
            settings, load_prompts(), client, source, sandbox_of(settings, available_isolation())
        )
        for attempt in (1, 2, 3):
            record = recorded.records(tmp_path, {key}).get(key, Record()) if attempt > 1 else Record()
            item = WorkItem(TASK, 0, attempt, record)
            base = Event("attempt", 0.0, attempt=attempt, task_id="q1", rollout_key=TASK.rollout_key)
            own = Journal(TASK, writer, base, record)
            try:
                solved = await solver.solve(TASK, own)
                result = unfinished(item, own)
                results.append(replace(result, outcome="ok" if solved.verdict else "owed"))
            except Refusal:
                results.append(replace(unfinished(item, own), error_kind="model"))
            writer.append(result_event(results[-1], options, writer))
            writer.flush()
        await client.close()
    writer.close()
    assert [result.outcome for result in results] == ["failed", "owed", "ok"]
    assert len(server.requests) == len(replies), "nothing that was answered is paid for twice"
    rows = [row for row in read_rows(tmp_path) if row["kind"] in ("model_call", "retrieval", "code")]
    by_kind = {
        kind: math.fsum(row["cost_usd"] or 0 for row in rows if row["kind"] == kind)
        for kind in ("model_call", "retrieval", "code")
    }
    [program] = [row for row in rows if row["kind"] == "code"]
    assert by_kind["model_call"] == pytest.approx(9 * COST)
    assert by_kind["retrieval"] == 0.02
    assert 0 < by_kind["code"] <= program["duration_s"] * 0.001
    paid = math.fsum(by_kind.values())
    assert results[0].cost_usd == pytest.approx(paid - 4 * COST)
    assert results[1].cost_usd == pytest.approx(paid - COST)
    assert results[2].cost_usd == pytest.approx(paid)
    run = summarise(open_run(tmp_path))
    assert run.totals.cost_usd == pytest.approx(paid) == run.totals.counted_cost_usd
    assert {row.kind: row.cost_usd for row in run.spending} == pytest.approx(
        {"models": by_kind["model_call"], "web": by_kind["retrieval"], "code": by_kind["code"]}
    )
    assert {(row.kind, row.calls) for row in run.spending} == {("models", 9), ("web", 1), ("code", 1)}
    assert run.task_cost.most_task == "q1" and run.task_cost.mean_usd == pytest.approx(paid)


async def test_what_a_failed_call_took_is_known_to_the_next_command(tmp_path: Path) -> None:
    refusal = Refusal("stopped by a filter")
    refusal.reply = ChatReply("half", usage=Usage(100, 10), cost_usd=0.5)

    async def perform() -> ChatReply:
        raise refusal

    writer = make_writer(tmp_path)
    own = Journal(TASK, writer, Event("attempt", 0.0, task_id="q1", rollout_key=TASK.rollout_key))
    with pytest.raises(Refusal):
        await own.call(CHAT, {"model": "m"}, perform)
    writer.close()
    key = (TASK.rollout_key, 0)
    assert recorded.touched(tmp_path) == {key}
    assert recorded.records(tmp_path, {key})[key] == Record(paid_usd=0.5)
    [row] = read_rows(tmp_path, "status", "completion_tokens", "cost_usd")
    assert row == {"status": "error", "completion_tokens": 10, "cost_usd": 0.5}
