"""A model server whose speed depends on what is in flight: an OpenAI stream, in a process of its own.

All open calls share curve(n) units of work a second, `speed` times as fast as the curve says. Beyond
`capacity` it answers 429. The amount of work comes with the request (`seed`), and is told as tokens.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import random
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from benchmarks import thrash
from benchmarks.child import argument
from benchmarks.uvicorn_child import serve_until_closed

TOKENS_PER_WORK = 500


class SharedEngine:
    """Processor sharing in real time; for one event loop."""

    def __init__(self, curve: thrash.Curve, speed: float, capacity: int | None) -> None:
        self._curve, self._speed, self.capacity = curve, speed, capacity
        self._service, self._at = 0.0, time.monotonic()
        self._open: list[tuple[float, int, asyncio.Future[None]]] = []
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self.refused_s: list[float] = []

    @property
    def is_full(self) -> bool:
        return self.capacity is not None and len(self._open) >= self.capacity

    async def work(self, amount: float) -> None:
        """Returns when so much has been done for this call."""
        self._advance()
        done = asyncio.get_running_loop().create_future()
        self._number += 1
        heapq.heappush(self._open, (self._service + amount, self._number, done))
        self._arm()
        await done

    def _advance(self) -> None:
        """Everything that was due by now, each at its own time: many end between two turns of a loop."""
        now = time.monotonic()
        while self._open:
            rate = self._curve(len(self._open)) * self._speed / len(self._open)
            due = self._at + (self._open[0][0] - self._service) / rate
            if due > now:
                self._service += (now - self._at) * rate
                break
            self._service, self._at = self._open[0][0], due
            _, _, done = heapq.heappop(self._open)
            if not done.done():
                done.set_result(None)
        self._at = now

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._open:
            rate = self._curve(len(self._open)) * self._speed / len(self._open)
            wait_s = max(0.0, (self._open[0][0] - self._service) / rate)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._due)

    def _due(self) -> None:
        self._advance()
        self._arm()


def amount(seed: int, tail: float = 1.0) -> float:
    """Work of the call `seed`: lognormal, 1 on average."""
    return random.Random(seed).lognormvariate(-tail * tail / 2, tail)


def application(engine: SharedEngine) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        asked = json.loads(await request.body())
        if engine.is_full:
            engine.refused_s.append(time.monotonic())
            return JSONResponse({"error": {"message": "too many"}}, 429, {"retry-after": "1"})
        return StreamingResponse(stream(amount(asked["seed"])), media_type="text/event-stream")

    async def stream(work: float) -> Any:
        await engine.work(work)
        tokens = max(1, round(work * TOKENS_PER_WORK))
        usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
        choice = {"index": 0, "delta": {"content": "said"}, "finish_reason": "stop"}
        yield f"data: {json.dumps({'model': 'thrash', 'choices': [choice]})}\n\n"
        yield f"data: {json.dumps({'model': 'thrash', 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    return app


async def main() -> None:
    asked = argument()
    named = asked["curve"]
    curve = thrash.CURVES[named] if named in thrash.CURVES else thrash.drawn(int(named))
    engine = SharedEngine(curve, asked["speed"], asked.get("capacity"))
    await serve_until_closed(application(engine))


if __name__ == "__main__":
    asyncio.run(main())
