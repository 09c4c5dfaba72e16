"""A FastAPI app as a child of the benchmark: uvicorn with its fastest settings, on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from benchmarks.child import converse

BACKLOG = 4096
# Longer than clients are idle between two rounds: a connection that closes while it is used is an error.
KEEP_ALIVE_S = 90


async def serve_until_closed(app: FastAPI) -> None:
    """Serve on a free port, told in the first line, until the input ends."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    # It takes connections from here on, though it answers them only when it runs.
    listener.listen(BACKLOG)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    hello = {"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "pid": os.getpid()}
    await converse(hello, _nothing)
    server.should_exit = True
    await running


async def _nothing(question: dict[str, Any]) -> dict[str, Any]:
    return {}
