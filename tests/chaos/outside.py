"""What a run pays for outside, and what it is stored on, when those are away.

A web search that answers every query, always the same, and can be told to misbehave; and a door before any
server of loopback that can be shut, so that connections are refused, and opened again on the same port.
"""

from __future__ import annotations

import asyncio
import hashlib
import select
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.retrieval.tavily_server import KEY, TavilyServer, serving, text_of
from tests.s3_server import S3Server, environment, s3_server

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = 4  # that the web finds for a query
# Of 25 asked for the sample's scopes often bring fewer, and then the web is asked.
MIN_LOCAL_HITS = 20
KEY_VARIABLE = "TAVILY_API_KEY"


class Door:
    """Forwards connections to `behind`; while it is shut they are refused, and the open ones are cut."""

    def __init__(self, behind: int) -> None:
        # Bound for good and never listening: while the door is shut the port is refused, and nobody else's.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self._behind, self.port = behind, int(self._reserved.getsockname()[1])
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self._listener = listener
        threading.Thread(target=self._accept, args=[listener], name="chaos-door", daemon=True).start()

    def shut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._reserved.close()

    @contextmanager
    def refused(self) -> Iterator[None]:
        self.shut()
        try:
            yield
        finally:
            self.open()

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=[connection], daemon=True).start()

    def _carry(self, caller: socket.socket) -> None:
        with ExitStack() as stack:
            stack.enter_context(caller)
            try:
                server = stack.enter_context(socket.create_connection(("127.0.0.1", self._behind)))
            except OSError:
                return
            ends = {caller: server, server: caller}
            with self._lock:
                self._open |= ends.keys()
            with suppress(OSError):
                while all(_pass_on(end, ends[end]) for end in select.select(list(ends), [], [])[0]):
                    pass
            with self._lock:
                self._open -= ends.keys()


def _pass_on(source: socket.socket, target: socket.socket) -> bool:
    data = source.recv(65_536)
    target.sendall(data)
    return bool(data)


@contextmanager
def door(behind: int) -> Iterator[Door]:
    """An open one."""
    made = Door(behind)
    made.open()
    try:
        yield made
    finally:
        made.close()


class _Everything(TavilyServer):
    """Finds PAGES pages for every query, whose urls and texts follow from the query alone."""

    def found(self, query: str) -> Sequence[tuple[str, float]]:
        name = hashlib.sha256(query.encode()).hexdigest()[:16]
        return [(f"http://pages.invalid/{name}/{page}", 1 - page / 100) for page in range(PAGES)]

    def text(self, url: str) -> str:
        return text_of(url)


@dataclass(frozen=True)
class Web:
    """The paid web search of a run, behind a door; `server` remembers what it was asked."""

    server: TavilyServer
    door: Door
    _loop: asyncio.AbstractEventLoop

    @property
    def environ(self) -> Mapping[str, str]:
        """What the cluster is to be started with: the key that its config names."""
        return {KEY_VARIABLE: KEY}

    @property
    def asked(self) -> int:
        """Searches and pages so far, those that failed included."""
        return self.server.asked

    def refused(self) -> Any:
        """Nobody answers inside: connections are refused, and open ones are cut."""
        return self.door.refused()

    @contextmanager
    def failing(self, status: int = 500) -> Iterator[None]:
        """Everything is answered with `status` inside."""
        self.server.faults["*"] = [(status, {})]
        try:
            yield
        finally:
            del self.server.faults["*"]

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """What is asked inside is answered at the end."""
        self._loop.call_soon_threadsafe(self.server.gate.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self.server.gate.set)

    def serve_config(self, cache: Path) -> dict[str, Any]:
        """`serve_config.yaml` with this web behind its retriever, its answers kept in `cache`."""
        values: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        for app in values["applications"]:
            if app["name"] == "retriever":
                web = {"base_url": self.door.url, "api_key_env": KEY_VARIABLE, "cache_dir": str(cache)}
                app["args"] |= {"min_local_hits": MIN_LOCAL_HITS, "web": web}
        return values


@contextmanager
def web() -> Iterator[Web]:
    """A web search on loopback, in a thread of its own."""
    with ExitStack() as stack:
        server = _Everything((), {})
        loop = stack.enter_context(_serving(server))
        port = int(server.url.rpartition(":")[2])
        yield Web(server, stack.enter_context(door(port)), loop)


@contextmanager
def _serving(server: TavilyServer) -> Iterator[asyncio.AbstractEventLoop]:
    """The loop of a thread that serves it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="chaos-web", daemon=True)
    thread.start()

    def wait_for(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(timeout=10)

    running = serving(server)
    wait_for(running.__aenter__())
    try:
        yield loop
    finally:
        wait_for(running.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass(frozen=True)
class Bucket:
    """An S3 server behind a door."""

    server: S3Server
    door: Door

    @property
    def environ(self) -> Mapping[str, str]:
        return environment(self.door.url)

    def refused(self) -> Any:
        """Nobody answers inside: connections are refused, and open ones are cut."""
        return self.door.refused()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Connections are taken inside and nothing answers."""
        self.server.stop()
        try:
            yield
        finally:
            self.server.resume()


@contextmanager
def bucket() -> Iterator[Bucket]:
    """A real S3 server with the bucket `tests.s3_server.BUCKET`, in a process of its own."""
    with s3_server() as server, door(server.port) as before:
        yield Bucket(server, before)
