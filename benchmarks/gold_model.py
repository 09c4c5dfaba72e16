"""A model that plays both sides of a dialogue by its task's gold actions, over HTTP, in a fixed time.

It keeps no state: every text that it says ends with a marker `[[task#done]]` (how many gold calls were made
by then), and the task's persona carries the first one. So any client may ask it, in any order, again too.
The path says who speaks: `/agent/v1`, `/user/v1`, everything else is a judge who finds all statements met.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.stub_model import Answer, Connection, Server, serve, served, streamed, whole
from ray_app.tau2.gold import FINISHED, HANDOVER
from ray_app.tau2.simulation import STOP

MOST_STATEMENTS = 20

_MARK = re.compile(rb"\[\[(\d+)#(\d+)\]\]")
_STREAMED = re.compile(rb'"stream": ?true')


@dataclass(frozen=True, slots=True)
class Script:
    """A task's gold calls in their order as (side, name, arguments), and what the agent has to tell."""

    calls: Sequence[tuple[str, str, Mapping[str, Any]]]
    told: Sequence[str] = ()


def mark(number: int, done: int = 0) -> str:
    return f"[[{number}#{done}]]"


def next_message(scripts: Sequence[Script], side: str, body: bytes) -> dict[str, Any]:
    """What `side` says to the chat request `body`: a gold call of its own, or a text for the other side.

    Of what was done since the last marker the asked side made all: its answers stand behind the marker.
    """
    found = max(_MARK.finditer(body), key=re.Match.end, default=None)
    if found is None:
        raise ValueError(f"a request of {side} without a marker: {body[-300:]!r}")
    number, done = int(found[1]), int(found[2])
    script = scripts[number]
    done += body.count(b'"tool_call_id"', found.end())
    if done < len(script.calls):
        who, name, arguments = script.calls[done]
        if who != side:
            return {"content": f"{HANDOVER} {mark(number, done)}"}
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"content": None, "tool_calls": [{"id": f"g{done}", "type": "function", "function": function}]}
    if side == "user":
        return {"content": STOP if done > len(script.calls) else f"{HANDOVER} {mark(number, done)}"}
    return {"content": " ".join([FINISHED, *script.told, mark(number, len(script.calls) + 1)])}


def judged() -> dict[str, Any]:
    """A verdict in the shapes of tau2's judge and of ours: all statements are met."""
    results = [{"expectedOutcome": "any", "metExpectation": True, "reasoning": "a stub"}]
    fields = {str(number): True for number in range(1, MOST_STATEMENTS + 1)}
    return {"content": json.dumps({"results": results, **fields})}


def answer(scripts: Sequence[Script], latency_s: float, request: bytes) -> Answer:
    """The HTTP response to one request, streamed where it asks for that."""
    path, _, body = request.partition(b"\r\n\r\n")
    side = {b"agent": "assistant", b"user": "user"}.get(path.split(b"/", 2)[1])
    message = judged() if side is None else next_message(scripts, side, body)
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    if not _STREAMED.search(body):
        return Answer(latency_s, [b"", whole(message, finish)])
    delta = {**message, "tool_calls": [{"index": 0, **call} for call in message.get("tool_calls", ())]}
    return Answer(latency_s, streamed([delta], finish))


def main() -> None:
    """Serve the scripts of a file at a latency, both of the command line; ends when killed."""
    path, latency_s = sys.argv[1:]
    scripts = [Script(**each) for each in json.loads(Path(path).read_text())]
    reply = partial(answer, scripts, float(latency_s))
    asyncio.run(serve(partial(Connection, reply)))


@contextmanager
def gold_serving(scripts: Sequence[Script], latency_s: float, folder: Path) -> Iterator[Server]:
    """The model in a process of its own; `url` lacks the path of a side."""
    path = folder / "scripts.json"
    path.write_text(json.dumps([asdict(script) for script in scripts]))
    with served("from benchmarks.gold_model import main; main()", str(path), str(latency_s)) as server:
        yield Server(server.url.removesuffix("/v1"), server.pid)
