"""The baseline behind the OpenAI chat-completions API, as a FastAPI application. Knows nothing of Ray.

It holds no key and checks none: keep it on loopback or behind something that does. One choice per
request; sampling parameters are accepted and change nothing, since the baseline is deterministic.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive

from ray_app.baseline import wire
from ray_app.baseline.faults import Attempts, Failures, Fault, Latency, Settings
from ray_app.baseline.rules import MODEL_NAME, BaselineReply, reply
from ray_app.records import digest

# Above this the rules take more than a few milliseconds and run beside the event loop.
INLINE_CHARS = 20_000
PREFILL_SHARE = 0.3  # of the latency: before the first byte of a stream
TRANSPORT_KEYS = frozenset({"stream", "stream_options", "user"})  # no part of what is asked


class ServerSettings(Settings):
    """What the server serves and how it misbehaves."""

    models: tuple[str, ...] = Field((MODEL_NAME,), min_length=1, description="names that it answers to")
    latency: Latency = Latency()
    failures: Failures = Failures()


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatBody(BaseModel):
    """The part of a chat-completions request that matters here; other fields are let through."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    n: int | None = Field(None, ge=1, le=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class Draw(NamedTuple):
    """What chance has decided for one attempt."""

    request_digest: str
    latency_s: float
    fault: Fault | None


def create_app(settings: ServerSettings) -> FastAPI:
    """`POST /v1/chat/completions`, `GET /v1/models`, `GET /health`."""
    app = FastAPI(title="baseline", docs_url=None, redoc_url=None)
    attempts = Attempts()

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        if body.model not in settings.models:
            return _unknown_model(body.model, settings)
        draw = _draw(settings, attempts, body)
        refusal = await _refuse(settings.failures, draw.fault, request.receive)
        if refusal is not None:
            return refusal
        written = wire.damaged(await _think(_asked(body)), draw.fault)
        envelope = wire.Envelope(f"chatcmpl-{draw.request_digest[:24]}", body.model)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            await asyncio.sleep(draw.latency_s * PREFILL_SHARE)
            stream = _stream(written, envelope, draw.latency_s * (1 - PREFILL_SHARE), with_usage=with_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        await asyncio.sleep(draw.latency_s)
        return JSONResponse(wire.completion(written, envelope))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return wire.models(settings.models)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        body = wire.error(f"{where or 'body'}: {first['msg']}", "invalid_request_error", param=where or None)
        return JSONResponse(body, status_code=400)

    return app


def _draw(settings: ServerSettings, attempts: Attempts, body: ChatBody) -> Draw:
    asked = body.model_dump(mode="json", exclude=set(TRANSPORT_KEYS))
    key = digest(asked)
    fault = settings.failures.draw(key, attempts.next(key))
    return Draw(key, settings.latency.draw_s(key), fault)


async def _refuse(failures: Failures, fault: Fault | None, receive: Receive) -> Response | None:
    """The error response for a fault that yields no completion, or None."""
    if fault == "http_429":
        body = wire.error("Rate limit reached (injected)", "rate_limit_error", "rate_limit_exceeded")
        return JSONResponse(body, 429, {"Retry-After": str(failures.retry_after_s)})
    if fault == "http_500":
        return JSONResponse(wire.error("The server had an error (injected)", "server_error"), 500)
    if fault == "hang":
        await _hang(failures.hang_s, receive)
        return JSONResponse(wire.error("The request hung (injected)", "timeout"), 504)
    return None


async def _hang(seconds: float, receive: Receive) -> None:
    """Gives nothing for so long, or until the client leaves: a request nobody waits for must not stay."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass


def _asked(body: ChatBody) -> dict[str, Any]:
    """Messages, and the tools that `tool_choice` leaves."""
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        tools = []
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        tools = [tool for tool in tools if (tool.get("function") or {}).get("name") == name]
    return {"messages": body.messages, "tools": tools}


async def _think(asked: Mapping[str, Any]) -> BaselineReply:
    size = sum(len(str(message.get("content"))) for message in asked["messages"])
    return reply(asked) if size < INLINE_CHARS else await asyncio.to_thread(reply, asked)


async def _stream(
    written: BaselineReply, envelope: wire.Envelope, decode_s: float, *, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, spread evenly over `decode_s`."""
    events = list(wire.chunks(written, envelope, with_usage=with_usage))
    for body in events:
        yield wire.event(body)
        await asyncio.sleep(decode_s / len(events))
    yield wire.DONE


def _unknown_model(name: str, settings: ServerSettings) -> JSONResponse:
    message = f"The model {name!r} does not exist; this server has {', '.join(settings.models)}"
    body = wire.error(message, "invalid_request_error", "model_not_found", "model")
    return JSONResponse(body, 404)
