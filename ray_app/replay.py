"""A replay endpoint: `python -m ray_app.replay RUN` answers chat and retrieval from the log of a run.

Speaks OpenAI's `/v1/chat/completions` (streamed or not) and `/v1/models`, and the retriever's `/retrieve`.
A request that was not recorded is a 404 whose one line says what is nearest. Nothing is asked elsewhere.
There is no authentication, hence loopback unless told otherwise. What a client makes of a refusal names its
address: a prompt that quotes one is another prompt here (`jobs/hle.py --replay` has it to the byte).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from aiohttp import web
from pydantic_core import to_json

from ray_app import object_store
from ray_app.baseline import wire
from ray_app.chat import ChatRequest
from ray_app.config import load
from ray_app.errors import EvalError, ToolError, UserError
from ray_app.journal import CHAT, RETRIEVAL, RecordedCall, RecordedError
from ray_app.recording import Recording
from ray_app.records import ChatReply
from ray_app.replies import Replies, read_request
from ray_app.retrieval.http_api import MAX_BODY_BYTES, parse, status_of, to_wire, web_headers

MAX_CHAT_BYTES = 64 << 20  # a prompt with images
SESSION = "x-session-id"


@dataclass(frozen=True)
class Endpoint:
    """The handlers over the replies of one run."""

    replies: Replies

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_CHAT_BYTES)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/retrieve", self.retrieve)
        app.router.add_get("/health", self.health)
        return app

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(wire.models(self.replies.served_names(), "replay"))

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
            asked = self._asked(body, request.headers.get(SESSION, ""))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return _refused(400, f"not a chat request: {type(error).__name__}: {error}")
        if not asked:
            known = ", ".join(self.replies.served_names())
            return _refused(404, f"not recorded: no model {body['model']!r} in the run; it has {known}")
        for one in asked:
            if (call := self.replies.chat(one)) is not None:
                return await _answer(request, body, call)
        return _refused(404, f"not recorded: {self.replies.nearest(asked[0])}")

    def _asked(self, body: Mapping[str, Any], session: str) -> list[ChatRequest]:
        """What the body may stand for: an endpoint may know several models of the config by one name."""
        models = self.replies.config.models
        return [
            read_request(body, name, models[name].token_limit_field, session)
            for name in self.replies.models(body["model"])
        ]

    async def retrieve(self, request: web.Request) -> web.Response:
        content = await request.read()
        if len(content) > MAX_BODY_BYTES:
            return _detail(413, f"the request is larger than {MAX_BODY_BYTES} bytes; send a shorter query")
        try:
            asked = parse(content)
        except ToolError as error:
            return _detail(status_of(error), str(error))
        results = []
        for query in asked.to_queries():
            call = self.replies.retrieval(query.text, query.scope_id, query.top_k)
            if call is None:
                place = f"question {query.scope_id!r}" if query.scope_id else "the whole corpus"
                return _detail(404, f"not recorded: no retrieval of {query.text[:200]!r} in {place}")
            if call.error is not None:
                return _detail(status_of(call.error.error()), call.error.message)
            results.append(RETRIEVAL.decode(call.body, call.texts))
        hits = [[to_wire(hit, asked.return_scores) for hit in found.hits] for found in results]
        return web.Response(body=to_json(hits), content_type="application/json", headers=web_headers(results))


async def _answer(request: web.Request, body: Mapping[str, Any], call: RecordedCall) -> web.StreamResponse:
    if call.error is not None and not call.body:
        return _failed(call.error)
    reply = CHAT.decode(call.body, call.texts)
    envelope = wire.Envelope(f"replay-{call.request_hash}", reply.model)
    if not body.get("stream"):
        return web.json_response(wire.completion(reply, envelope))
    return await _stream(
        request, reply, envelope, bool((body.get("stream_options") or {}).get("include_usage"))
    )


async def _stream(
    request: web.Request, reply: ChatReply, envelope: wire.Envelope, with_usage: bool
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    lines = [wire.event(body) for body in wire.chunks(reply, envelope, with_usage=with_usage)]
    await response.write("".join([*lines, wire.DONE]).encode())
    await response.write_eof()
    return response


def _failed(error: RecordedError) -> web.Response:
    """A recorded failure, of the kind that it was for the run's own client.

    An overflow too is a plain refusal: what a client would ask next, shortened, was not recorded by itself.
    """
    return _refused(422 if error.kind == "model" else 503, error.message)


def _refused(status: int, message: str) -> web.Response:
    return web.json_response(wire.error(" ".join(message.split()), "replay"), status=status)


def _detail(status: int, message: str) -> web.Response:
    return web.json_response({"detail": " ".join(message.split())}, status=status)


async def serve(replies: Replies, host: str, port: int, started: asyncio.Future[str]) -> None:
    """Serves until cancelled; `started` gets the url."""
    runner = web.AppRunner(Endpoint(replies).app(), shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        started.set_result(f"http://{host}:{runner.addresses[0][1]}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main(
    run: Annotated[Path, typer.Argument(help="The directory of the run, or its s3:// url.")],
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8100,
    host: Annotated[str, typer.Option(help="There is no authentication: keep it on loopback.")] = "127.0.0.1",
) -> None:
    """Answer chat and retrieval from the log of RUN until stopped. Nothing is asked elsewhere."""
    try:
        recording = Recording.of(object_store.local(run))
        config = load(recording.run_dir / "config.yaml", ["endpoints_file=null"], {})
        replies = Replies.of(recording, config)
        asyncio.run(_until_stopped(replies, host, port))
    except EvalError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    except OSError as error:
        typer.echo(f"error: --host {host} --port {port}: {error.strerror}; choose another", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _until_stopped(replies: Replies, host: str, port: int) -> None:
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    started.add_done_callback(lambda url: typer.echo(_greeting(replies, url.result())))
    await serve(replies, host, port, started)


def _greeting(replies: Replies, url: str) -> str:
    models = ", ".join(replies.served_names())
    return (
        f"Replay of {len(replies.tasks)} tasks at {url}/v1 (models: {models}) and {url}/retrieve; Ctrl-C ends"
    )


if __name__ == "__main__":
    typer.run(main)
