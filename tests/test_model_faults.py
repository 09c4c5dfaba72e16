"""The real engine, agent, judge and client over HTTP against two endpoints that misbehave in every way.

Which fault a question meets stands in its text, so each task has one right ending; what the endpoints did is
counted on their side and must be what the log says.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
from aiohttp import web

from ray_app import chat, engine, events, lease, planning
from ray_app.chat import Router
from ray_app.config import Endpoint, RunConfig
from ray_app.governor import Governor
from ray_app.hle import HleSolver, make_solver
from ray_app.options import Options
from ray_app.planning import Tally
from ray_app.prompting import load_prompts
from ray_app.records import Task
from tests.engine_runs import Seen
from tests.model_server import chunk, usage
from tests.ray_marks import RAY
from tests.stand_ins import FixedRetriever, config

pytestmark = RAY

# Each met twice by the first call of a task, which then goes well.
PASSING = ("429", "503", "500", "hang", "stall", "reset", "malformed", "empty", "truncated", "error", "none")
# The name in the log where it is not the fault's own.
NAMED = {"hang": "timeout", "none": ""}
# What lasts, and how a task ends that meets it: outcome and class of failure.
LASTING = {
    "wrong tool once": ("ok", None),
    "wrong tool": ("limited", "limit"),
    "too long": ("failed", "model"),
    "filtered": ("failed", "model"),
    "denied": ("failed", "infrastructure"),
    "down": ("failed", "infrastructure"),
    "silent judge": ("owed", "judge"),
}
MAX_ROUNDS = 3


def work() -> list[Task]:
    kinds = [f"{kind}/{place}" for kind in PASSING for place in ("orchestrator", "expert")]
    return [Task(kind, f"What is [{kind}]?", "42") for kind in [*kinds, *LASTING]]


@dataclass
class Endpoints:
    """Two addresses of one misbehaving model, and what came there and was answered."""

    urls: list[str] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)  # by question and model
    requests: Counter[int] = field(default_factory=Counter)  # by port
    complete: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert request.transport is not None
        self.requests[request.transport.get_extra_info("sockname")[1]] += 1
        found = re.search(r"\[([^\]]+)\]", body["messages"][-1]["content"])
        assert found is not None
        kind, _, place = found[1].partition("/")
        self.asked[f"{found[1]} {body['model']}"] += 1
        times = self.asked[f"{found[1]} {body['model']}"]
        if kind in LASTING:
            return await self._lasting(request, kind, body["model"], times)
        if place == body["model"] and times <= 2 and kind != "none":
            return await self._misbehave(request, kind)
        return await self._answer(request, body["model"])

    async def _lasting(self, request: web.Request, kind: str, model: str, times: int) -> web.StreamResponse:
        if kind == "too long":
            said = {"message": "the maximum context length is 10 tokens", "code": 400}
            return web.json_response({"error": said}, status=400)
        if kind == "denied":
            return web.json_response({"error": {"message": "no such key"}}, status=403)
        if kind == "down":
            return web.json_response({"error": {"message": "out of memory"}}, status=500)
        if kind == "filtered":
            return await self._stream(request, [chunk({"content": "I"}), chunk({}, "content_filter")])
        if kind == "silent judge":
            says = "It is hard to say." if model == "judge" else "<answer>43</answer>"
            return await self._answer(request, model, says)
        tool = "teleport" if kind == "wrong tool" or times == 1 else "answer"
        return await self._answer(request, model, tool=tool)

    async def _misbehave(self, request: web.Request, kind: str) -> web.StreamResponse:
        begun = chunk({"role": "assistant", "content": "I "})
        if kind.isdecimal():
            headers = {"retry-after": "0"} if kind == "429" else {}
            return web.json_response({"error": {"message": "not now"}}, status=int(kind), headers=headers)
        lines = {
            "hang": ["hang"],
            "stall": [begun, "hang"],
            "reset": [begun, "reset"],
            "malformed": [begun, '{"choices": [{"delta"'],
            "empty": [usage(1, 0)],
            "truncated": [begun],
            "error": [begun, '{"error": {"message": "worker died", "code": "internal"}}'],
        }
        return await self._stream(request, lines[kind])

    async def _answer(
        self, request: web.Request, model: str, says: str = "<answer>42</answer>", tool: str = "answer"
    ) -> web.StreamResponse:
        called = {"name": tool, "arguments": '{"model": "answer-1"}'}
        call = {"index": 0, "id": "t", "type": "function", "function": called}
        delta = {"tool_calls": [call]} if model == "orchestrator" else {"content": says}
        return await self._stream(request, [chunk(delta), chunk({}, "stop"), usage(100, 10)])

    async def _stream(self, request: web.Request, lines: list[str]) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for line in lines:
            if line == "hang":
                await asyncio.Event().wait()
            if line == "reset":
                assert request.transport is not None
                request.transport.abort()
                return reply
            await reply.write(f"data: {line}\n\n".encode())
        await reply.write(b"data: [DONE]\n\n")
        self.complete += '"finish_reason": "stop"' in "".join(lines)
        return reply


@asynccontextmanager
async def misbehaving() -> AsyncIterator[Endpoints]:
    endpoints = Endpoints()
    async with AsyncExitStack() as stack:
        for _ in range(2):
            app = web.Application()
            app.router.add_post("/v1/chat/completions", endpoints.handle)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            endpoints.urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        yield endpoints


@dataclass(frozen=True)
class MakeSolver:
    """What a worker of a real run makes, less the retriever and the sandbox."""

    config: RunConfig

    def __call__(self) -> HleSolver:
        chat.BACKOFF_S = 0.02  # of this worker: the faults are many, and none is cured by waiting
        router = Router(self.config.models, {}, environ={})
        return make_solver(self.config, load_prompts(None), router, FixedRetriever([]), None)


def settings(urls: list[str]) -> RunConfig:
    endpoints = [{"base_url": url} for url in urls]
    model = {"endpoints": endpoints, "timeout_s": 20.0, "first_token_s": 0.4, "stall_s": 0.4}
    return config(
        models=dict.fromkeys(("orchestrator", "expert", "judge"), model),
        orchestrator={"model": "orchestrator"},
        judge={"model": "judge"},
        tools={"answer": {"answer-1": {"model": "expert"}}},
        limits={"max_rounds": MAX_ROUNDS},
    )


async def drive(
    run_dir: Path, settings: RunConfig, tasks: list[Task], governor: Governor | None = None
) -> tuple[Tally, Seen]:
    held, seen = lease.take(run_dir), Seen()
    options = Options(run_dir, "run", held.epoch, concurrency=len(tasks), workers=2, attempts=1)
    log = options.writer("driver")
    try:
        tally = await engine.run(
            planning.plan(tasks, 1, []),
            MakeSolver(settings),
            options,
            log=log,
            lease=held,
            watcher=seen,
            stop=asyncio.Event(),
            governor=governor,
        )
    finally:
        held.release()
        await asyncio.to_thread(log.close)
    return tally, seen


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


async def test_every_fault_ends_in_its_class_and_no_call_is_lost(cluster: None, tmp_path: Path) -> None:
    tasks = work()
    async with misbehaving() as endpoints, asyncio.timeout(60):
        tally, seen = await drive(tmp_path / "run", settings(endpoints.urls), tasks)
    ended = {result.task_id: (result.outcome, result.error_kind) for result in seen.results}
    expected = {task.task_id: LASTING.get(task.task_id, ("ok", None)) for task in tasks}
    assert ended == expected, {name: (ended[name], expected[name]) for name in ended if ended != expected}
    assert (tally.planned, tally.pending) == (len(tasks), 0)
    assert sum(tally.counts.values()) == len(tasks)
    calls = events.read(tmp_path / "run", where={"kind": {"model_call"}}).read_all().to_pylist()
    # Each request that came to an endpoint is an attempt in the log, and the other way about. A prompt that
    # is too long is shortened and asked again, which is a row of its own.
    cut = events.read(tmp_path / "run", where={"kind": {"overflow"}}).read_all().to_pylist()
    attempts = sum(row["retries"] + 1 for row in [*calls, *cut])
    assert attempts == sum(endpoints.requests.values()) == sum(endpoints.asked.values())
    # Each complete answer, too: one that the agent or the judge could not use is an error all the same.
    whole = [row for row in calls if row["status"] == "ok" or row["error_kind"] == "judge"]
    assert len(whole) == endpoints.complete
    assert {row["endpoint"] for row in [*calls, *cut]} == set(endpoints.urls)
    met = {(row["task_id"], row["role"]): row["detail"] for row in calls if row["detail"]}
    for kind in PASSING:
        name = NAMED.get(kind, kind)
        for place in ("orchestrator", "expert"):
            assert met.get((f"{kind}/{place}", place), "") == (f"{name},{name}" if name else "")
    rounds = [row for row in calls if row["task_id"] == "wrong tool"]
    assert len(rounds) == MAX_ROUNDS
    assert next(row["detail"] for row in calls if row["task_id"] == "down") == ",".join(["500"] * 5)


async def test_an_endpoint_that_stays_away_ends_the_run_and_fails_no_task(
    cluster: None, tmp_path: Path
) -> None:
    tasks = [Task(f"t{number}", "What is [none]?", "42") for number in range(6)]
    governor = Governor(workers=2)
    async with misbehaving() as endpoints, asyncio.timeout(60):
        config = settings(endpoints.urls)
        nobody = config.models["expert"].model_copy(
            update={"endpoints": (Endpoint(base_url="http://127.0.0.1:9/v1"),), "patience_s": 0.5}
        )
        away = config.model_copy(update={"models": config.models | {"expert": nobody}})
        tally, seen = await drive(tmp_path / "run", away, tasks, governor)
    assert tally.pending == len(tasks) and seen.results == []
    assert "model expert: http://127.0.0.1:9/v1 answered nothing for 0.5 s" in governor.stopped_for
    assert "the same command goes on" in governor.stopped_for
    # What was asked before is kept: one call of the orchestrator a task.
    assert endpoints.asked == {"none orchestrator": len(tasks)}
