"""`python -m ray_app.replay RUN`, asked by the client and the agent of a run, and by plain HTTP."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ray_app import recorded
from ray_app.chat import Router
from ray_app.errors import EvalError
from ray_app.hle import HleSolver, make_solver
from ray_app.journal import CHAT, RETRIEVAL
from ray_app.prompting import load_prompts
from ray_app.recording import COLUMNS, calls
from ray_app.records import ChatReply, Event, Retrieval, Task
from ray_app.retrieval.connect import HttpRetriever
from ray_app.tools.base import schema
from tests.replayed_runs import SETTINGS, Outside, journal_of, record_here
from tests.stand_ins import MemoryLog

NAMES = ("exact", "judged", "unsure", "long")
# The twins ask the same question, and get other answers.
TASKS = [Task(name, f"What is {name}?", "x", scope=(1,)) for name in NAMES]
TWINS = [Task(name, "What is twin?", "x", scope=(1,)) for name in ("twin/1", "twin/2")]


@dataclass(frozen=True)
class Served:
    url: str
    run_dir: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("recorded")
    outside = Outside(folder)
    solver = make_solver(SETTINGS, load_prompts(), outside, outside, None)
    asyncio.run(record_here(folder / "run", [*TASKS, *TWINS], solver))
    command = [sys.executable, "-m", "ray_app.replay", str(folder / "run"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        found = re.match(r"Replay of 6 tasks at (http://127\.0\.0\.1:\d+)/v1 \(models: m\)", greeting)
        assert found, greeting
        yield Served(found[1], folder / "run")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


def told(event: Event, body: str, texts: dict[str, str]) -> tuple[Any, ...]:
    """A call as its decision: all but where it went, and how long it took."""
    output: Any = None
    if body and event.kind == "model_call":
        output = replace(CHAT.decode(body, texts), endpoint="", queue_s=0.0, prefill_s=0.0, decode_s=0.0)
    elif body:
        output = RETRIEVAL.decode(body, texts)
    place = (event.kind, event.turn, event.tool, event.alias, event.call_seq)
    return (*place, event.request_hash, event.status, event.error_kind, output)


async def test_the_runs_own_agent_and_client_get_equal_replies(served: Served) -> None:
    model = SETTINGS.models["m"]
    endpoint = model.endpoints[0].model_copy(update={"base_url": f"{served.url}/v1"})
    models = {"m": model.model_copy(update={"endpoints": (endpoint,)})}
    settings = SETTINGS.model_copy(update={"models": models})
    router, retriever = Router(models, {}, environ={}), HttpRetriever(served.url, 10)
    solver = make_solver(settings, load_prompts(), router, retriever, None)
    try:
        assert await router.probe("m") == ""
        for task in (*TASKS, *TWINS):
            now = await now_of(task, solver)
            assert now == then(served.run_dir, task) and len(now) >= 4
    finally:
        await router.close()
        await retriever.close()


async def now_of(task: Task, solver: HleSolver) -> list[tuple[Any, ...]]:
    log = MemoryLog()
    try:
        await solver.solve(task, journal_of(task, log))
    except EvalError as error:
        assert task.task_id == "long" and error.kind == "model"
    calls = [event for event in log.events if event.call_seq >= 0]
    return [told(event, log.bodies.get(event.payload_hash, ""), log.bodies) for event in calls]


def then(run_dir: Path, task: Task) -> list[tuple[Any, ...]]:
    key = (task.rollout_key, 0)
    rows = sorted(calls(run_dir, [key])[key], key=lambda row: (row["call_seq"], row["status"] == "ok"))
    names = set(COLUMNS) - {"t_start"}
    return [
        told(Event(t_start=0.0, **{name: row[name] for name in names}), body or "", texts)
        for row, body, texts in recorded.with_bodies(run_dir, rows)
    ]


def first_request(served: Served, task: Task) -> dict[str, Any]:
    """What the orchestrator is asked about `task` in its first turn, as any client would send it."""
    prompts, outside = load_prompts(), Outside(served.run_dir)
    tools = make_solver(SETTINGS, prompts, outside, outside, None).agent.tools
    user = prompts.render("orchestrator", question=task.question, context="", feedback="")
    messages = [("system", prompts.render("orchestrator_system").strip()), ("user", user)]
    return {
        "model": "m",
        "messages": [{"role": role, "content": content} for role, content in messages],
        "tools": [schema(tool, SETTINGS.models) for tool in tools],
        "temperature": 1,
        "max_tokens": SETTINGS.orchestrator.sampling.max_tokens,
    }


def test_equal_requests_get_their_replies_in_order_and_each_session_its_own(served: Served) -> None:
    body = first_request(served, TWINS[0])

    def ask(session: str = "") -> str:
        headers = {"x-session-id": session} if session else {}
        reply = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers)
        message = reply.raise_for_status().json()["choices"][0]["message"]
        return str(message["tool_calls"][0]["id"])

    recorded_ids = []
    for twin in TWINS:
        output = then(served.run_dir, twin)[0][-1]
        assert isinstance(output, ChatReply)
        recorded_ids.append(output.tool_calls[0].call_id)
    assert recorded_ids[0] != recorded_ids[1]
    assert [ask(), ask(), ask()] == [*recorded_ids, recorded_ids[0]]
    assert [ask(TWINS[1].rollout_key) for _ in range(2)] == [recorded_ids[1]] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt"}, "no model 'gpt' in the run; it has m"),
        ({"temperature": 0.5}, "these messages are recorded with other sampling: {'temperature': 1.0"),
        (
            {"messages": [{"role": "user", "content": "hello"}]},
            "no recorded call of task 'twin/1' has these messages",
        ),
    ],
)
def test_what_was_not_recorded_is_a_404_that_names_what_is_nearest(
    served: Served, changes: dict[str, Any], message: str
) -> None:
    body = first_request(served, TWINS[0]) | changes
    headers = {"x-session-id": TWINS[0].rollout_key}
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers)
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (404, True), reply.text


def test_retrievals_are_served_in_the_retrievers_contract(served: Served) -> None:
    asked = next(out for out in then(served.run_dir, TASKS[0]) if isinstance(out[-1], Retrieval))
    (hit,) = asked[-1].hits
    log = [row for row in then(served.run_dir, TASKS[0]) if row[0] == "model_call" and row[2] == "search"]
    query = log[0][-1].content.removeprefix("<query>").removesuffix("</query>")
    body = {"queries": [query], "topk": SETTINGS.retriever.top_k, "return_scores": True, "eid": "exact"}
    reply = httpx.post(f"{served.url}/retrieve", json=body)
    assert reply.json() == [
        [{"document": {"id": 1, "content": hit.text}, "score": hit.score, "source": "local"}]
    ]
    other = httpx.post(f"{served.url}/retrieve", json=body | {"eid": "judged"})
    assert (other.status_code, "in question 'judged'" in other.json()["detail"]) == (404, True)
    assert httpx.post(f"{served.url}/retrieve", json={}).status_code == 422
