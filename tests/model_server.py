"""A local server that speaks the OpenAI chat API and can misbehave, for tests of the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

PAUSE_S = 0.05


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps(
        {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m-1", "choices": [choice]}
    )


def usage(prompt: int, completion: int, cached: int = 0) -> str:
    counted = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return json.dumps(
        {
            "id": "c",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": "m-1",
            "choices": [],
            "usage": counted,
        }
    )


GOOD = [
    chunk({"role": "assistant", "content": "Hel"}),
    chunk({"content": "lo"}),
    chunk(
        {
            "tool_calls": [
                {"index": 0, "id": "t1", "type": "function", "function": {"name": "ans", "arguments": ""}}
            ]
        }
    ),
    chunk({"tool_calls": [{"index": 0, "function": {"name": "wer", "arguments": '{"model": '}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"a1"}'}}]}),
    chunk({}, "tool_calls"),
    usage(1000, 50, 400),
]


@dataclass
class ModelServer:
    """Answers each request by the next behaviour, the last one for ever; counts what it was asked.

    A behaviour is (status, error, headers), "hang" after the headers, a whole response, or the data of a
    stream's events, in which "reset", "hang" and "pause" stand for themselves.
    """

    behaviours: list[Any]
    requests: list[dict[str, Any]] = field(default_factory=list)
    peers: set[Any] = field(default_factory=set)  # of the connections that requests came on
    answered: int = 0  # streams written to their end
    headers: list[dict[str, str]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed_early: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    name: str = "m"
    listed: dict[str, Any] = field(default_factory=dict)  # what else the model list says of it

    async def until_asked(self, times: int) -> None:
        while len(self.requests) < times:
            self.arrived.clear()
            await self.arrived.wait()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append({key.lower(): value for key, value in request.headers.items()})
        self.peers.add(request.transport.get_extra_info("peername") if request.transport else None)
        self.arrived.set()
        index = min(len(self.requests), len(self.behaviours)) - 1
        behaviour = self.behaviours[index]
        if isinstance(behaviour, tuple):
            status, error, headers = behaviour
            return web.json_response({"error": error}, status=status, headers=headers)
        if isinstance(behaviour, web.Response):
            return web.Response(body=behaviour.body, content_type=behaviour.content_type)
        if behaviour == "hang":
            return await self._hang(request, [])
        return await self._stream(request, behaviour)

    async def _hang(self, request: web.Request, before: list[str]) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for line in before:
            await reply.write(f"data: {line}\n\n".encode())
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.closed_early.set()
            raise
        return reply

    async def _stream(self, request: web.Request, lines: list[str]) -> web.StreamResponse:
        if "hang" in lines:
            return await self._hang(request, lines[: lines.index("hang")])
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for line in lines:
            if line == "pause":
                await asyncio.sleep(PAUSE_S)
                continue
            if line == "reset":
                assert request.transport is not None
                request.transport.abort()
                return reply
            await reply.write(f"data: {line}\n\n".encode())
        await reply.write(b"data: [DONE]\n\n")
        self.answered += 1
        return reply

    async def models(self, request: web.Request) -> web.Response:
        listed = {"id": self.name, "object": "model", "created": 0, "owned_by": "tests", **self.listed}
        return web.json_response({"object": "list", "data": [listed]})


@asynccontextmanager
async def serving(
    *behaviours: Any, name: str = "m", port: int = 0, **listed: Any
) -> AsyncIterator[ModelServer]:
    """A server of the model `name` on a loopback port, a free one for 0; closed at the end."""
    server = ModelServer(list(behaviours), name=name, listed=listed)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.handle)
    app.router.add_get("/v1/models", server.models)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()
