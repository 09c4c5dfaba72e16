"""The baseline server on a real port, in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from ray_app.baseline.server import ServerSettings, create_app


@contextmanager
def serving(settings: ServerSettings) -> Iterator[str]:
    """The server's URL while it runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            httpx.get(f"{url}/health", timeout=30).raise_for_status()
            yield url
        finally:
            server.should_exit = True
            thread.join()
