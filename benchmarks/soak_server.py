"""The model server of a soak: the stub, whose answers go wrong as `soak_load` says, each once."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from benchmarks.soak_load import MEAN_S, REPLY_BYTES, CallFault, call_fault, is_refused
from benchmarks.stub_model import Behaviour, Connection, seed_of, seeded, serve

RETRY_AFTER_S = 2
_REASONS = {400: b"Bad Request", 429: b"Too Many Requests", 500: b"Internal Server Error"}
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
GARBAGE = b'data: {"choices": [{"index": 0, "del\x00\xfe\n\n'
ERROR = b'data: {"error": {"message": "made to fail", "code": 500}}\n\n'


class FaultyConnection(Connection):
    """Answers as the stub does, but for the first answer to a call that is to meet a fault.

    `met` holds the seeds whose fault is over; it is shared by all connections.
    """

    def __init__(self, behaviour: Behaviour, met: set[int]) -> None:
        super().__init__(partial(seeded, behaviour))
        self._behaviour, self._met = behaviour, met

    def _answer(self, request: bytes) -> None:
        seed = seed_of(request)
        if request.startswith(b"GET"):
            super()._answer(request)
        elif is_refused(seed):
            self._transport.write(_status(400, "not this one", code="content_filter"))
        elif (fault := call_fault(seed)) and seed not in self._met:
            self._met.add(seed)
            self._misbehave(fault, request)
        else:
            super()._answer(request)

    def _misbehave(self, fault: CallFault, request: bytes) -> None:
        match fault:
            case "cut":
                self._transport.write(self._begun(request))
                asyncio.get_running_loop().call_later(MEAN_S, self._transport.abort)
            case "500":
                self._transport.write(_status(500, "made to fail"))
            case "429":
                self._transport.write(_status(429, "too many"))
            case "429 with Retry-After":
                header = b"retry-after: %d\r\n" % RETRY_AFTER_S
                self._transport.write(_status(429, "too many", header))
            case "hang":
                pass  # the client gives up and closes the connection
            case "garbage":
                self._transport.write(_STREAM + _chunk(GARBAGE) + b"0\r\n\r\n")
            case "error in mid-stream":
                self._transport.write(self._begun(request) + _chunk(ERROR) + b"0\r\n\r\n")

    def _begun(self, request: bytes) -> bytes:
        return seeded(self._behaviour, request).packets[0]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _status(status: int, message: str, headers: bytes = b"", code: str = "") -> bytes:
    said: dict[str, Any] = {"message": message} | ({"code": code} if code else {})
    body = json.dumps({"error": said}).encode()
    head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (status, _REASONS[status])
    return head + headers + b"content-length: %d\r\n\r\n%s" % (len(body), body)


def main() -> None:
    """Serve until killed; the port is the first line."""
    asyncio.run(serve(partial(FaultyConnection, Behaviour(MEAN_S, REPLY_BYTES), set[int]())))
