"""What a retrieval leaves in the record of its task, and what it costs there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.log import open_run
from analysis.summary import summarise
from ray_app import recorded
from ray_app.chat import ChatRequest
from ray_app.errors import LimitReached
from ray_app.hle import make_solver
from ray_app.journal import RETRIEVAL, Journal, Record
from ray_app.prompting import load_prompts
from ray_app.records import ChatReply, Event, Hit, Retrieval, Task
from tests.event_logs import make_writer
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
