from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from ray_app import engine, events, lease, planning, pulse
from ray_app.errors import EndpointError, InfrastructureError
from ray_app.event_writer import EventWriter
from ray_app.journal import CHAT, CODE, Journal
from ray_app.options import Options
from ray_app.planning import Tally, WorkItem
from ray_app.pulse import Call, CallGroup, Followed, Pulse
from ray_app.records import ChatReply, Event, ExecutionResult, Task, TaskResult, Verdict
from ray_app.waits import waiting
from ray_app.worker import Solved
from tests.stand_ins import MemoryLog

NEVER_S = 1000.0
TASK = Task("hle/7", "question", "answer")


def still_pulse(run_dir: Path, now: float = 50.0) -> Pulse:
    """A pulse that beats only when it is told to, at a time that stands still."""
    return Pulse(run_dir, "w001", epoch=2, node="n1", interval_s=NEVER_S, clock=lambda: now)


def journal_of(watch: Pulse) -> Journal:
    base = Event("attempt", 0.0, task_id=TASK.task_id, trial=1, attempt=3)
    return Journal(TASK, MemoryLog(), base, clock=lambda: 20.0, watch=watch)


async def test_a_call_that_waits_is_named_until_it_ends(tmp_path: Path) -> None:
    told, sent, reply = still_pulse(tmp_path), asyncio.Event(), asyncio.Event()

    async def model() -> ChatReply:
        sent.set()
        await reply.wait()
        return ChatReply("hello")

    journal = journal_of(told)
    journal.turn, journal.tool, journal.alias = 4, "search", "search-1"
    call = asyncio.create_task(journal.call(CHAT, {"model": "gpt"}, model, role="expert"))
    await sent.wait()
    told.beat()
    (status,) = pulse.read(tmp_path)
    assert status.calls == (
        Call("hle/7", 1, 3, 4, "model_call", "expert", "search", "search-1", "gpt", 20.0),
    )
    assert status.groups == (CallGroup("model_call", "expert", "gpt", 1, 20.0),)
    assert (status.name, status.epoch, status.node, status.beat) == ("w001", 2, "n1", 50.0)
    assert (status.pid, status.started) == (os.getpid(), pulse.process_started(os.getpid()))
    reply.set()
    await call
    told.beat()
    (status,) = pulse.read(tmp_path)
    assert (status.in_flight, status.calls, status.calls_ended) == (0, (), 1)
    told.close()


async def test_calls_that_fail_or_are_cancelled_are_in_flight_no_more(tmp_path: Path) -> None:
    told, sent = still_pulse(tmp_path), asyncio.Event()
    journal = journal_of(told)

    async def fails() -> ExecutionResult:
        raise EndpointError("down")

    async def hangs() -> ExecutionResult:
        sent.set()
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(EndpointError):
        await journal.call(CODE, "print(1)", fails)
    call = asyncio.create_task(journal.call(CODE, "print(1)", hangs))
    await sent.wait()
    assert told.status().in_flight == 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (told.status().in_flight, told.status().calls_ended) == (0, 2)
    told.close()


async def test_an_attempt_that_was_given_up_makes_no_call_any_more(tmp_path: Path) -> None:
    made = []

    async def run() -> ExecutionResult:
        made.append(1)
        return ExecutionResult("out", "", 0, False, 0.0)

    log = MemoryLog()
    journal = Journal(TASK, log, Event("attempt", 0.0))
    journal.is_closed = True
    with pytest.raises(InfrastructureError, match="given up"):
        await journal.call(CODE, "print(1)", run)
    assert made == [] and log.events == []


def test_many_calls_are_counted_and_the_oldest_named(tmp_path: Path) -> None:
    told = still_pulse(tmp_path)
    for second in range(pulse.NAMED_CALLS + 20):
        told.begin(Event("model_call", float(second), role="judge"), "small" if second % 2 else "large")
    told.close()
    (status,) = pulse.read(tmp_path)
    assert status.in_flight == pulse.NAMED_CALLS + 20
    assert [call.since for call in status.calls] == [float(second) for second in range(pulse.NAMED_CALLS)]
    assert [(group.model, group.n, group.since) for group in status.groups] == [
        ("large", 60, 0.0),
        ("small", 60, 1.0),
    ]
    assert status.ended == status.beat == 50.0


def test_the_heart_beats_by_itself_until_it_is_closed(tmp_path: Path) -> None:
    beats, thrice = itertools.count(), threading.Event()

    def figures() -> dict[str, int]:
        number = next(beats)
        if number == 3:
            thrice.set()
        return {"number": number}

    told = Pulse(tmp_path, "driver", epoch=1, figures=figures, interval_s=0.001)
    assert thrice.wait(10)
    told.close()
    (status,) = pulse.read(tmp_path)
    assert status.figures["number"] >= 3 and status.ended is not None
    assert next(beats) == status.figures["number"] + 1


def test_a_killed_process_leaves_what_it_waited_for_and_is_known_to_be_dead(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ray_app.pulse import Pulse\n"
        "from ray_app.records import Event\n"
        "told = Pulse(Path(sys.argv[1]), 'w001', epoch=1)\n"
        "told.begin(Event('model_call', 5.0, task_id='a'), 'gpt'); told.beat()\n"
        "print('up', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        (alive,) = pulse.read(tmp_path)
        assert pulse.process_started(other.pid) == alive.started is not None
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert pulse.process_started(other.pid) is None  # dead, though its parent has not asked yet
        other.wait()
    (dead,) = pulse.read(tmp_path)
    assert (dead.pid, dead.ended, [call.task_id for call in dead.calls]) == (other.pid, None, ["a"])
    assert pulse.process_started(other.pid) != dead.started


def test_a_lost_process_is_marked_and_an_unknown_one_makes_nothing(tmp_path: Path) -> None:
    still_pulse(tmp_path).close()
    pulse.mark_lost(tmp_path, "w001", 2)
    pulse.mark_lost(tmp_path, "w009", 2)
    assert [(status.name, status.is_lost) for status in pulse.read(tmp_path)] == [("w001", True)]


def test_a_status_that_cannot_be_written_or_read_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    still_pulse(tmp_path / "file").close()
    assert pulse.read(tmp_path / "file") == pulse.read(tmp_path / "nowhere") == []
    told = still_pulse(tmp_path)
    for name, text in {"torn": '{"name": "w', "list": "[]", "other": '{"calls": [], "groups": [1]}'}.items():
        (tmp_path / "status" / f"{name}.json").write_text(text)
    assert [status.name for status in pulse.read(tmp_path)] == ["w001"]
    told.close()


def test_the_driver_says_how_far_it_is_and_when_it_ends(tmp_path: Path) -> None:
    now, shown = [100.0], Shown()
    tally = Tally(10)
    tally.counts["ok"] = 4
    followed = Followed(shown, tally, clock=lambda: now[0])
    assert followed.figures()["eta_s"] is None
    for _ in range(3):
        followed.started(WorkItem(TASK, 0))
    now[0] = 130.0
    tally.counts["failed"] += 1
    failed = TaskResult("t", "r", "j", 0, 1, "failed", error_kind="model", cost_usd=0.5)
    followed.committed(failed, tally)
    followed.tick()
    assert followed.figures() == {
        "planned": 10,
        "ok": 4,
        "failed": 1,
        "limited": 0,
        "owed": 0,
        "pending": 5,
        "in_flight": 2,
        "per_min": 2.0,
        "eta_s": 150.0,
        "last_commit": 130.0,
        "cost_usd": 0.5,
        "failures": {"model": 1},
    }
    assert shown.seen == ["started", "started", "started", "committed", "tick"]


@pytest.mark.parametrize(
    ("hard", "said"),
    [
        (600, "600"),
        (531, "open files: the limit is 531, expected at least 532 for concurrency 10; raise it "
              "(`ulimit -n 532`, as root or in limits.conf) or lower concurrency"),
    ],
)  # fmt: skip
def test_the_limit_of_open_files_is_lifted_or_refused(hard: int, said: str) -> None:
    code = (
        "import resource, sys; from ray_app.errors import ConfigError\n"
        "from ray_app.pulse import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (200, {hard}))\n"
        "try: assert raise_file_limit(10) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]\n"
        "except ConfigError as error: sys.exit(print(error))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said


def test_neither_the_pulse_nor_its_reader_imports_ray() -> None:
    code = "import sys, ray_app.pulse, analysis.status; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class Shown:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.results: list[TaskResult] = []

    def started(self, item: WorkItem) -> None:
        self.seen.append("started")

    def committed(self, result: TaskResult, tally: Tally) -> None:
        self.seen.append("committed")
        self.results.append(result)

    def tick(self) -> None:
        self.seen.append("tick")


@dataclass(frozen=True)
class Stubborn:
    """Its first attempt makes one call, then hangs and ignores that it is cancelled; the second waits."""

    folder: Path

    def __call__(self) -> Stubborn:
        return self

    async def solve(self, task: Task, journal: Journal) -> Solved:
        await journal.call(CODE, "first", self._run)
        with (self.folder / task.rollout_key).open("a") as attempts:
            attempts.write(f"{os.getpid()}\n")
        if journal.base.attempt == 1:
            while True:
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
        with waiting():  # which is no hang, although it takes longer than the deadline of an attempt
            await asyncio.sleep(0.8)
        return Solved(task.answer, Verdict(True, "exact"))

    async def _run(self) -> ExecutionResult:
        return ExecutionResult("out", "", 0, False, 0.0)

    async def close(self) -> None:
        pass


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
async def test_an_attempt_that_ignores_its_end_is_given_up_and_ends_on_another_worker(
    cluster: None, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    held = lease.take(run_dir)
    log = EventWriter(run_dir, "driver")
    shown = Shown()
    options = Options(run_dir, "run", held.epoch, 1, 2, 3, attempt_deadline_s=0.2)
    tasks = [Task("stubborn", "q", "a")]
    began = time.monotonic()
    tally = await engine.run(
        planning.plan(tasks, 1, []), Stubborn(tmp_path), options, log=log, lease=held, watcher=shown,
        stop=asyncio.Event(),
    )  # fmt: skip
    assert time.monotonic() - began < 60
    log.close()
    held.release()
    assert tally.counts["ok"] == 1 and [result.attempt for result in shown.results] == [2]
    places = (tmp_path / tasks[0].rollout_key).read_text().split()
    assert len(set(places)) == len(places) == 2
    rows = [row for batch in events.read(run_dir, ["kind"]) for row in batch.to_pylist()]
    assert sum(row["kind"] == "code" for row in rows) == 1  # the call before the hang was not repeated
    assert {status.name for status in pulse.read(run_dir)} == {"w001", "w002"}
