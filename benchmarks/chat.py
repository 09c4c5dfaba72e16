"""What the chat client costs: `python -m benchmarks.chat` (about 3 min).

Streamed calls (32 chunks, each in its own packet, 8 kB prompt) at 512 in flight against a stub in a process
of its own: ours (`Router.complete`), bare aiohttp (the same session, body and JSON parser; reads events and
joins the text, nothing else) and the openai SDK on plain httpx. They take turns; CPU is this process's. First
20,000 calls of ours, over which descriptors and memory are watched. `--quick` is smaller and judges nothing.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.figures import Figure, report
from benchmarks.stub_model import MODEL, Behaviour, serving
from ray_app.chat import ChatRequest, Router
from ray_app.config import Endpoint, ModelConfig, Sampling
from ray_app.connections import new_session
from ray_app.records import Message

PROMPT = "What is asked of the model, at some length. " * 186  # 8 kB
MAX_TOKENS = 500
TURNS = 8  # calls of one session
# Descriptors of the process besides its connections: event loop, pipes, files of libraries.
OTHER_DESCRIPTORS = 64
SAMPLE_S = 0.1

Ask = Callable[[int], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    in_flight: int = 512
    soak_calls: int = 20_000
    rounds: int = 5
    calls: int = 2_048  # of ours and of bare aiohttp in a round
    sdk_calls: int = 1_024
    behaviour: Behaviour = Behaviour(0.3, 640, chunks=32, is_gradual=True)  # noqa: RUF009  (frozen)


QUICK = Size(16, 96, 2, 32, 32, Behaviour(0.02, 640, chunks=32, is_gradual=True))


@dataclass(frozen=True, slots=True)
class Round:
    """Calls that ran together: CPU milliseconds a call, calls a second."""

    cpu_ms: float
    rate: float


@dataclass
class Watch:
    """Descriptors and resident bytes of this process, over some calls."""

    descriptors: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)

    def look(self) -> None:
        self.descriptors.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208  (thousands of times)
        self.rss.append(psutil.Process().memory_info().rss)

    async def go_on(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(SAMPLE_S)


@asynccontextmanager
async def ours(url: str, pool: int) -> AsyncIterator[Ask]:
    model = ModelConfig(endpoints=(Endpoint(base_url=url),))
    router = Router({MODEL: model}, {}, environ={}, max_connections=pool)

    async def ask(number: int) -> str:
        sampling = Sampling(max_tokens=MAX_TOKENS, seed=number)
        session = str(number // TURNS)
        return (
            await router.complete(ChatRequest(MODEL, (Message("user", PROMPT),), sampling, session=session))
        ).content

    try:
        yield ask
    finally:
        await router.close()


@asynccontextmanager
async def bare(url: str, pool: int) -> AsyncIterator[Ask]:
    """The same session and parser, and no more than it takes to read the text and the usage."""
    session = new_session(pool)
    address, headers = f"{url}/chat/completions", {"content-type": "application/json"}

    async def ask(number: int) -> str:
        body = json.dumps(_body(number)).encode()
        text, rest, usage = [], b"", None
        async with session.post(address, data=body, headers=headers) as reply:
            reply.raise_for_status()
            while packet := await reply.content.readany():
                *lines, rest = (rest + packet).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: ") and line != b"data: [DONE]":
                        chunk = json.loads(line[6:])
                        usage = chunk.get("usage") or usage
                        text += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
        assert usage is not None
        return "".join(text)

    async with session:
        yield ask


@asynccontextmanager
async def sdk(url: str, pool: int) -> AsyncIterator[Ask]:
    import httpx2  # the SDK's httpx; only compared with, and not loaded while memory is watched
    import openai

    limits = httpx2.Limits(max_connections=pool, max_keepalive_connections=pool)
    http = openai.DefaultAsyncHttpxClient(limits=limits, trust_env=False)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)

    async def ask(number: int) -> str:
        text = []
        stream = await client.chat.completions.create(**_body(number))
        async with stream:
            async for chunk in stream:
                text += [choice.delta.content or "" for choice in chunk.choices]
        return "".join(text)

    async with client:
        yield ask


WAYS = {"ours": ours, "bare aiohttp": bare, "openai SDK on httpx": sdk}


def _body(number: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": MAX_TOKENS,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _all(ask: Ask, size: Size, calls: int, expected: Sequence[str]) -> None:
    """Every number asked once, `in_flight` at a time. Raises where an answer is not the stub's."""
    numbers = iter(range(calls))

    async def caller() -> None:
        for number in numbers:
            if await ask(number) != expected[number]:
                raise RuntimeError(f"call {number}: another text than the stub sent")

    await asyncio.gather(*(caller() for _ in range(size.in_flight)))


async def measured(way: str, url: str, size: Size, expected: Sequence[str]) -> Round:
    """One round of one way, connections warm."""
    calls = size.sdk_calls if way.startswith("openai") else size.calls
    async with WAYS[way](url, size.in_flight) as ask:
        await _all(ask, size, size.in_flight, expected)
        gc.collect()
        cpu, started = time.process_time(), time.monotonic()
        await _all(ask, size, calls, expected)
        spent, took = time.process_time() - cpu, time.monotonic() - started
    return Round(1000 * spent / calls, calls / took)


async def soaked(url: str, size: Size, expected: Sequence[str]) -> Watch:
    """Ours, for long; the watch begins after a tenth of the calls."""
    watch = Watch()
    async with ours(url, size.in_flight) as ask:
        await _all(ask, size, size.soak_calls // 10, expected)
        gc.collect()
        watching = asyncio.create_task(watch.go_on())
        await _all(ask, size, size.soak_calls, expected)
        watching.cancel()
        gc.collect()
        watch.look()
    return watch


async def measure(url: str, size: Size) -> list[Figure]:
    expected = [size.behaviour.text(number) for number in range(size.soak_calls)]
    watch = await soaked(url, size, expected)
    seen: dict[str, list[Round]] = {way: [] for way in WAYS}
    for _ in range(size.rounds):
        for way in WAYS:
            seen[way].append(await measured(way, url, size, expected))
    return [*_cost(seen), *_held(watch, size)]


def _cost(seen: dict[str, list[Round]]) -> Iterator[Figure]:
    for other, op, target in (("bare aiohttp", "<=", 2.0), ("openai SDK on httpx", None, None)):
        ratios = [mine.cpu_ms / its.cpu_ms for mine, its in zip(seen["ours"], seen[other], strict=True)]
        name = f"CPU per streamed call, ours / {other}"
        yield Figure(name, statistics.median(ratios), op, target)  # type: ignore[arg-type]
    for way, rounds in seen.items():
        yield Figure(f"  CPU per call, {way}", statistics.median(one.cpu_ms for one in rounds), unit="ms")
        yield Figure(f"  calls, {way}", statistics.median(one.rate for one in rounds), unit="1/s")


def _held(watch: Watch, size: Size) -> Iterator[Figure]:
    most = size.in_flight + OTHER_DESCRIPTORS
    name = f"most open descriptors in {size.soak_calls:,} calls (a pool of {size.in_flight})"
    yield Figure(name, max(watch.descriptors), "<=", most)
    growth = 100 * (watch.rss[-1] / watch.rss[0] - 1)
    yield Figure(f"RSS growth over {size.soak_calls:,} calls, after a warm-up", growth, "<=", 5.0, "%")
    yield Figure("  RSS at the end", watch.rss[-1] / 1e6, unit="MB")


def main(
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small, and judges nothing.")] = False,
) -> None:
    """Measure the chat client beside others, against a stub model."""
    size = QUICK if quick else Size()
    with serving(size.behaviour) as server:
        figures = asyncio.run(measure(server.url, size))
    if quick:
        figures = [Figure(figure.name, figure.value, unit=figure.unit) for figure in figures]
    sys.exit(report(figures, json_))


if __name__ == "__main__":
    typer.run(main)
