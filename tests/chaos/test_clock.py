"""The clock of the chaos suite: wall time jumps in a process that runs, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ray_app import steady
from tests.chaos.clock import clock
from tests.chaos.unavailable import Unavailable

# Says at each line what its clocks show and how long waits of 0.1 s took; a child of it says what it is told.
TELLS = """
import ctypes, datetime, os, subprocess, sys, threading, time
from ray_app import steady
steady.agree(steady.Beginning(float(sys.argv[1]), sys.argv[2]))
libc = ctypes.CDLL(None)
class Moment(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanos", ctypes.c_long)]
def waited(wait):
    began = time.monotonic()
    wait()
    return time.monotonic() - began
def until_a_moment():  # of the wall clock, as this process sees it
    seconds, nanos = divmod(time.time_ns() + 10**8, 10**9)
    semaphore = ctypes.create_string_buffer(64)
    libc.sem_init(semaphore, 0, 0)
    assert libc.sem_timedwait(semaphore, ctypes.byref(Moment(seconds, nanos))) == -1
def until_told():
    threading.Event().wait(0.1)
for line in sys.stdin:
    now = datetime.datetime.now().timestamp()
    child = subprocess.run(["date", "+%s"], capture_output=True, text=True).stdout
    waits = [waited(lambda: time.sleep(0.1)), waited(until_told), waited(until_a_moment)]
    open(line.strip(), "w").close()
    wall = [time.time(), now, float(child), time.time() - steady.step_s()]
    print(steady.now(), time.monotonic(), max(waits), *wall, flush=True)
"""


def test_a_step_moves_wall_time_at_once_and_neither_waits_nor_monotonic_time(tmp_path: Path) -> None:
    try:
        mine = clock(tmp_path)
    except Unavailable as reason:
        pytest.skip(str(reason))
    touched = tmp_path / "touched"

    def off(process: subprocess.Popen[str]) -> list[float]:
        assert process.stdin is not None and process.stdout is not None
        print(touched, file=process.stdin, flush=True)
        unmoved, monotonic, waited, *wall = map(float, process.stdout.readline().split())
        assert abs(unmoved - time.time()) < 5, "a step does not move what events are stamped with"
        assert abs(monotonic - time.monotonic()) < 5
        assert 0.09 < waited < 3
        assert abs(touched.stat().st_mtime - time.time()) < 5
        return [round((told - time.time()) / 10) * 10.0 for told in wall]

    mine.step(7200)  # before it begins, which is later than the run did
    with _telling({**os.environ, **mine.environ}) as process:
        assert off(process) == [7200] * 3 + [0]
        for seconds in (3600, -3600, 3 * 86400):
            with mine.stepped(seconds):
                assert off(process) == [seconds] * 3 + [0]
            assert off(process) == [0] * 4


@contextmanager
def _telling(environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", TELLS, *map(str, steady.beginning())]
    process = subprocess.Popen(command, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            process.kill()
