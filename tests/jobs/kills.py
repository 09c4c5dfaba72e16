"""What the kill tests need beside a cluster: a witness of every model call, and one view of a run's log."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
from typer.testing import CliRunner

from analysis.__main__ import app as analysis_app
from ray_app import events
from tests.jobs.cluster import Cluster

TIMEOUT_S = 120


@dataclass(frozen=True)
class Job:
    """One run directory and the command that runs it, with the witness before the model."""

    cluster: Cluster
    witness: Witness
    run_dir: Path
    limit: int  # of questions
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, concurrency: int, **environ: str) -> subprocess.Popen[str]:
        endpoint = f"models.baseline.endpoints=[{{base_url: {self.witness.url}}}]"
        where = ("--run-dir", str(self.run_dir), "--limit", f"{self.limit}")
        settings = ("--set", endpoint, "--set", f"concurrency={concurrency}")
        self.started.append(self.cluster.job(*where, *settings, **environ))
        return self.started[-1]

    def end(self) -> None:
        """Nothing is left running by a test that fails half-way."""
        for process in self.started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    @property
    def told(self) -> Told:
        return Told(self.run_dir)


def titled(cluster: Cluster, title: str, *nodes: str, is_prefix: bool = False) -> list[psutil.Process]:
    """The processes of these nodes (default: of all) that have this title of Ray's, or one that begins so."""
    found = [(process, _title(process)) for process in cluster.processes(*nodes)]
    return [each for each, name in found if name == title or (is_prefix and name.startswith(title))]


def _title(process: psutil.Process) -> str:
    try:
        if process.name() == "raylet":
            return "raylet"
        words = process.cmdline()
    except psutil.Error:  # it is gone, or nearly
        return ""
    return words[0].partition(".")[0] if words else ""  # while an actor's method runs, its name follows


class Kill(NamedTuple):
    """Finding the processes and killing them takes a moment (Unix seconds)."""

    began: float
    done: float


@dataclass(frozen=True)
class Asked:
    """One model call as its endpoint sees it (Unix seconds)."""

    at: float
    answered: float


@dataclass
class Witness:
    """Stands between the workers and the baseline and outlives them both: what they lost, it has seen.

    `answered` has the calls that got their answer, by the body of the request. Requests of two tasks differ,
    and so do all requests of one task.
    """

    url: str
    answered: dict[bytes, list[Asked]] = field(default_factory=lambda: defaultdict(list), repr=False)

    def repeated(self, *kills: Kill, settled_s: float) -> int:
        """Calls made again although no kill came while they went on or `settled_s` after."""

        def is_torn(one: Asked) -> bool:
            return any(one.at < kill.done and kill.began < one.answered + settled_s for kill in kills)

        return sum(not all(map(is_torn, calls[:-1])) for calls in self.answered.values())


@contextmanager
def witness(upstream: str) -> Iterator[Witness]:
    """A server that passes everything on to `upstream`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._pass_on(None)

        def do_POST(self) -> None:
            self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

        def _pass_on(self, body: bytes | None) -> None:
            at = time.time()
            status, kind, answer = _fetched(f"{upstream}{self.path}", body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            if body is not None and status == 200:
                seen.answered[body].append(Asked(at, time.time()))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        seen = Witness(f"http://127.0.0.1:{server.server_port}/v1")
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    block_on_close = False  # workers keep their connections open

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


def _fetched(url: str, body: bytes | None) -> tuple[int, str, bytes]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return reply.status, reply.headers["Content-Type"], reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()
    except OSError as error:
        return 502, "text/plain", str(error).encode()


class Answer(NamedTuple):
    """What a run says of a task; `body` has the prediction and the verdict's words."""

    outcome: str
    is_correct: bool | None
    body: str


# By task and trial.
Answers = dict[tuple[str, int], Answer]


@dataclass(frozen=True)
class Told:
    """What the log of a run tells."""

    run_dir: Path

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = events.read(self.run_dir, where={"kind": {kind}}).read_all().to_pylist()
        return rows

    def answers(self) -> Answers:
        rows = events.results(self.run_dir).to_pylist()
        bodies = events.read_payloads(self.run_dir, {row["payload_hash"] for row in rows})
        return {
            (row["task_id"], row["trial"]): Answer(
                row["outcome"], row["is_correct"], bodies[row["payload_hash"]]
            )
            for row in rows
        }

    def dialogues(self) -> dict[tuple[str, int], tuple[str, Any]]:
        """The newest simulation of each task and trial: the hash of its last state, and what was said."""
        rows = sorted(self.rows("simulation"), key=lambda row: (row["epoch"], row["attempt"]))
        bodies = events.read_payloads(self.run_dir, {row["payload_hash"] for row in rows})
        told = {_key(row): json.loads(bodies[row["payload_hash"]]) for row in rows}
        said = ("role", "content", "tool_calls", "error")
        return {
            task: (
                run["info"]["state_hash"],
                [[message.get(key) for key in said] for message in run["messages"]],
            )
            for task, run in told.items()
        }

    def searches(self) -> dict[tuple[str, int], set[tuple[int, int, int]]]:
        """(call, local hits, web hits) of all searches that brought something, in any attempt."""
        found: dict[tuple[str, int], set[tuple[int, int, int]]] = defaultdict(set)
        for row in self.rows("retrieval"):
            if row["status"] == "ok":
                found[_key(row)].add((row["call_seq"], row["local_hits"], row["web_hits"]))
        return dict(found)

    def answered(self) -> list[dict[str, Any]]:
        """The rows of the model calls that gave an answer."""
        return [row for row in self.rows("model_call") if row["status"] == "ok"]

    def repeated(self) -> int:
        """Model calls that were answered before."""
        rows = self.answered()
        return len(rows) - len({_call(row) for row in rows})

    def check(self, expected: Answers) -> None:
        """A complete run: every answer as expected and counted once, no row twice, the summary says so."""
        assert self.answers() == expected
        rows = self.rows("result")
        times = Counter(row["task_id"] for row in rows)
        twice = [row for row in rows if times[row["task_id"]] > 1]
        assert [(row["task_id"], row["epoch"], row["attempt"], row["event_id"]) for row in twice] == []
        # The reader drops doubles, so the files themselves are asked.
        files = list((self.run_dir / "log").glob("*.parquet"))
        ids = [name for file in files for name in pq.read_table(file)["event_id"].to_pylist()]
        assert ids and len(ids) == len(set(ids))
        page = CliRunner().invoke(analysis_app, ["summary", str(self.run_dir), "--json"])
        summary = json.loads(page.output)
        account, totals = summary["accounting"], summary["totals"]
        assert summary["state"] == "ended"
        counted = [account[name] for name in ("ok", "failed", "limited", "owed", "pending")]
        assert account["planned"] == sum(counted) == len(expected)
        assert totals["repeated_calls"] == self.repeated()


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["task_id"], row["trial"]


def _call(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["rollout_key"], row["call_seq"], row["request_hash"]
