"""A model that only takes its time: seeded latencies, as an HTTP server and as an in-process client.

The seed of a request decides its latency and its reply, so whoever knows the seeds knows the ideal
makespan. The server speaks just enough HTTP/1.1 and OpenAI streaming for the client under test (a
body with Content-Length, kept-alive connections, one request at a time on each); it checks nothing.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ray_app.chat import ChatRequest
from ray_app.records import ChatReply, Usage

MODEL = "stub"
# Spread of the logarithm: the slowest of a hundred calls takes about three times the mean.
SIGMA = 0.5
# The first token comes after this share of the latency.
PREFILL_SHARE = 0.25
# Pieces that a reply streams in. A server sends one per token; the stub keeps the client's parsing small.
CHUNKS = 8
USAGE = Usage(prompt_tokens=1000, completion_tokens=100)

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_SEED = re.compile(rb'"seed": ?(\d+)')
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the stub answers: mean latency (s) of its lognormal, the bytes of a reply's text, its pieces.

    The pieces come in two packets, or in one each where `is_gradual`.
    """

    mean_s: float
    reply_bytes: int
    chunks: int = CHUNKS
    is_gradual: bool = False

    def latency_s(self, seed: int) -> float:
        """The latency of the request with this seed; the same in every process."""
        return random.Random(seed).lognormvariate(math.log(self.mean_s) - SIGMA**2 / 2, SIGMA)

    def text(self, seed: int) -> str:
        """A reply of its own for each seed, that hardly compresses."""
        return random.Random(seed).randbytes((self.reply_bytes + 1) // 2).hex()[: self.reply_bytes]


@dataclass
class InProcessModel:
    """The stub as a chat client: waits, answers. `ended` holds when the last call of a session ended."""

    behaviour: Behaviour
    ended: dict[str, float] = field(default_factory=dict)

    async def complete(self, request: ChatRequest) -> ChatReply:
        seed = request.sampling.seed or 0
        text = self.behaviour.text(seed)
        await asyncio.sleep(self.behaviour.latency_s(seed))
        self.ended[request.session] = time.monotonic()
        return ChatReply(text, finish_reason="stop", usage=USAGE, model=MODEL)


class Answer(NamedTuple):
    """The packets of a response: the last one goes out `latency_s` after the request."""

    latency_s: float
    packets: Sequence[bytes]


class Connection(asyncio.Protocol):
    """One client connection; `reply` answers a request, head and body, in two packets or more."""

    def __init__(self, reply: Callable[[bytes], Answer]) -> None:
        self._reply = reply
        self._buffer = bytearray()
        self._timers: list[asyncio.TimerHandle] = []
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        found = _LENGTH.search(self._buffer, 0, head)
        end = head + 4 + (int(found[1]) if found else 0)
        if len(self._buffer) >= end:
            request = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            self._transport.write(_models())
            return
        latency_s, (first, *rest) = self._reply(request)
        later = asyncio.get_running_loop().call_later
        begin_s = latency_s * PREFILL_SHARE
        step_s = (latency_s - begin_s) / len(rest)
        self._timers = [later(begin_s, self._transport.write, first)]
        self._timers += [
            later(begin_s + step_s * number, self._transport.write, packet)
            for number, packet in enumerate(rest, 1)
        ]


def seeded(behaviour: Behaviour, request: bytes) -> Answer:
    """What `behaviour` answers to the seed of a request."""
    seed = seed_of(request)
    return Answer(behaviour.latency_s(seed), packets(behaviour.text(seed), behaviour))


def seed_of(request: bytes) -> int:
    """The seed of a request; 0 where it has none."""
    seeds = _SEED.findall(request)
    return int(seeds[-1]) if seeds else 0


def packets(text: str, behaviour: Behaviour) -> list[bytes]:
    """A streamed chat completion: what goes out with the first token, and the rest."""
    size = -(-len(text) // behaviour.chunks) or 1
    pieces = [text[start : start + size] for start in range(0, len(text), size)] or [""]
    return streamed([{"content": piece} for piece in pieces], "stop", is_gradual=behaviour.is_gradual)


def streamed(deltas: Sequence[Mapping[str, Any]], finish: str, *, is_gradual: bool = False) -> list[bytes]:
    """The same of any deltas, one or more."""
    lines = [*map(_chunk, deltas), _chunk({}, finish), _usage_chunk(), b"[DONE]"]
    head = _HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n"
    first, *rest = map(_framed, lines)
    later = rest if is_gradual else [b"".join(rest)]
    return [head + first, *later[:-1], later[-1] + b"0\r\n\r\n"]


def _framed(line: bytes) -> bytes:
    event = b"data: " + line + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


def _chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
    return _completion([{"index": 0, "delta": delta, "finish_reason": finish}])


def _usage_chunk() -> bytes:
    return _completion([], usage=_usage())


def _usage() -> dict[str, int]:
    total = USAGE.prompt_tokens + USAGE.completion_tokens
    counted = {"prompt_tokens": USAGE.prompt_tokens, "completion_tokens": USAGE.completion_tokens}
    return counted | {"total_tokens": total}


def whole(message: Mapping[str, Any], finish: str) -> bytes:
    """A chat completion that was not asked to be streamed."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    head = {"id": "c", "object": "chat.completion", "created": 0, "model": MODEL}
    return _in_json({**head, "choices": [choice], "usage": _usage()})


def _completion(choices: list[dict[str, Any]], **more: Any) -> bytes:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": MODEL}
    return json.dumps({**head, "choices": choices, **more}).encode()


def _models() -> bytes:
    listed = {"id": MODEL, "object": "model", "created": 0, "owned_by": "benchmarks"}
    return _in_json({"object": "list", "data": [listed]})


def _in_json(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return _HEAD % b"application/json" + b"content-length: %d\r\n\r\n%s" % (len(body), body)


async def serve(make: Callable[[], Connection]) -> None:
    """Answer on a free loopback port, printed as the first line, until cancelled."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(make, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve the behaviour on the command line (JSON); ends when killed."""
    reply = partial(seeded, Behaviour(**json.loads(sys.argv[1])))
    asyncio.run(serve(partial(Connection, reply)))


@dataclass(frozen=True, slots=True)
class Server:
    """A stub server that runs in a process of its own."""

    url: str
    pid: int


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Server]:
    """A stub server in a process of its own, killed at the end."""
    program = "from benchmarks.stub_model import main; main()"
    with served(program, json.dumps(asdict(behaviour))) as server:
        yield server


@contextmanager
def served(program: str, *arguments: str) -> Iterator[Server]:
    """A Python program that serves a model and prints its port first, killed at the end."""
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", process.pid)
        finally:
            process.kill()
