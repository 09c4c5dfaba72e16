"""A real S3 server in a process of its own, which tests stop, kill and start again.

Nothing is set in this process: `env` is what a process needs to use the server.
"""

from __future__ import annotations

import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BUCKET = "runs-of-tests"
PAGE = 50  # objects of one listing; S3 gives 1000
Behaviour = Callable[[str, str, dict[str, str]], int | None]
# One request at a time: moto looks for the object of a conditional put and writes it in two steps.
_PROGRAM = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=False)
"""


@dataclass
class S3Server:
    """The server at `endpoint`; it holds its objects in memory, so a killed one comes back empty."""

    port: int
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        return environment(self.endpoint)

    def start(self) -> None:
        """Start the server and wait until it answers; it has no bucket yet."""
        paged = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
        command = [sys.executable, "-c", _PROGRAM, str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._processes.append(subprocess.Popen(command, env=paged, **quiet))  # type: ignore[call-overload]
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._processes[-1].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no S3 server at {self.endpoint}")
            time.sleep(0.05)

    def make_bucket(self, name: str = BUCKET) -> None:
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            pass

    def stop(self) -> None:
        """Stop it in the middle: connections open and nothing answers."""
        self._processes[-1].send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._processes[-1].send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._processes[-1].kill()
        self._processes[-1].wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/moto-api/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A running server with the bucket BUCKET."""
    server = S3Server(free_port())
    try:
        server.start()
        server.make_bucket()
        yield server
    finally:
        server.kill()


def environment(endpoint: str) -> dict[str, str]:
    """What boto3 reads to use the server at `endpoint`, and nothing of this machine's own settings."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: Any = probe.getsockname()[1]
    return int(port)


class _Forward(http.server.BaseHTTPRequestHandler):
    """Passes a request on to the server behind, where the proxy has no answer of its own."""

    protocol_version = "HTTP/1.1"
    server: S3Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = dict(self.headers.items())
        status = self.server.behaviour(self.command, self.path, headers)
        if status is None:
            self._pass_on(body, headers)
        else:
            self._reply(status, {}, b"")

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle

    def _pass_on(self, body: bytes, headers: dict[str, str]) -> None:
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        behind.request(self.command, self.path, body, headers)
        answer = behind.getresponse()
        data = answer.read()
        behind.close()
        self._reply(answer.status, dict(answer.getheaders()), data)

    def _reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() not in {"connection", "transfer-encoding"}:
                self.send_header(key, value)
        if "content-length" not in {key.lower() for key in headers}:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if self.command != "HEAD" else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


class S3Proxy(http.server.ThreadingHTTPServer):
    """A store with other manners: `behaviour` answers a status itself, or None to pass the request on.

    It gets the method, the path and the headers, which it may change.
    """

    daemon_threads = True

    def __init__(self, behind: int, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.behind, self.behaviour = behind, behaviour

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def s3_proxy(server: S3Server, behaviour: Behaviour) -> Iterator[S3Proxy]:
    with S3Proxy(server.port, behaviour) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
