"""Watching a run: what is stuck comes first, who waits for what, what is spent, and when it ends."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.log import open_run
from analysis.seen import COLUMNS, OpenTask, Seen, look
from analysis.status import status_of
from ray_app import lease
from ray_app.pulse import Pulse
from ray_app.records import Event
from tests.analysis.runs import START_S, event, model_call, result, run_start, write_run


def seen(run_dir: Path, rows: list[Event], at_s: float) -> Seen:
    return look(open_run(write_run(run_dir, rows), columns=COLUMNS), START_S + at_s)


def test_a_task_is_open_from_its_first_attempt_of_the_newest_segment_to_its_result(tmp_path: Path) -> None:
    rows = [
        event("attempt", 0, "old"),
        event("attempt", 100, "open", epoch=2),
        event("attempt", 150, "open", epoch=2, attempt=2),
        event("attempt", 110, "open", epoch=2, trial=1),
        event("attempt", 120, "done", epoch=2),
        replace(result("done", "ok", True, at_s=130), epoch=2),
        replace(result("open", "owed", at_s=50), epoch=1),
    ]
    found = seen(tmp_path, rows, 200)
    assert sorted(found.open_tasks, key=lambda task: task.trial) == [
        OpenTask("open", 0, 2, START_S + 100),
        OpenTask("open", 1, 1, START_S + 110),
    ]


def test_what_is_spent_and_how_fast_leaves_out_replays_and_second_opinions(tmp_path: Path) -> None:
    failed: dict[str, Any] = {"status": "error", "error_kind": "infrastructure", "error": "503"}
    rows = [
        model_call("expert", at_s=0, cost_usd=1.0),
        model_call("expert", at_s=0, cost_usd=9.0, is_replayed=True),
        model_call("judge", at_s=990, cost_usd=9.0, alias="another"),
        model_call("expert", 20.0, at_s=685, cost_usd=0.25, **failed),  # ended in the last five minutes
        event("retrieval", at_s=900, task="a", cost_usd=0.5),
        event("tool_call", at_s=900, task="a", tool="search"),
        result("a", "ok", True, at_s=950, cost_usd=1.75),
        result("b", "ok", True, at_s=10),
    ]
    spending = seen(tmp_path, rows, 1000).spending
    assert (spending.cost_usd, spending.errors) == (1.75, 1)
    assert (spending.recent_cost_usd, spending.recent_calls, spending.recent_errors) == (0.75, 2, 1)
    assert spending.recent_results == 1
    empty = seen(tmp_path / "empty", [], 0)
    assert (empty.open_tasks, empty.errors, empty.spending.cost_usd) == ([], [], 0.0)


@pytest.fixture
def stuck(tmp_path: Path) -> Any:
    """A run with one task in a call that hangs and one between two calls."""
    now = time.time()
    rows = [
        run_start(3),
        event("attempt", now - START_S - 500, "slow"),
        event("attempt", now - START_S - 9, "new"),
    ]
    write_run(tmp_path, rows)
    held = lease.take(tmp_path)
    told = Pulse(tmp_path, "w001", epoch=1, interval_s=1000.0)
    call = Event(
        "model_call", now - 400, task_id="slow", trial=0, attempt=1, turn=7, role="expert", tool="answer"
    )
    told.begin(call, "gpt")
    told.begin(replace(call, kind="retrieval", role="", t_start=now - 1), "")
    told.beat()
    yield tmp_path
    told.close()
    held.release()


def test_the_slowest_tasks_say_what_they_wait_for(stuck: Path) -> None:
    slow, new = status_of(stuck).slow_tasks
    assert (slow.task.task_id, round(slow.age_s)) == ("slow", 500)
    assert slow.waits_for is not None and slow.waits_for.call.model == "gpt"
    assert (new.task.task_id, new.waits_for) == ("new", None)


def test_what_is_stuck_is_the_first_thing_one_sees(stuck: Path) -> None:
    outcome = CliRunner().invoke(app, ["watch", str(stuck), "--once"])
    lines = outcome.stdout.splitlines()
    assert outcome.exit_code == 1 and lines[0].startswith("stuck: ")
    place = next(number for number, line in enumerate(lines) if "STUCK" in line)
    assert (
        place < 5
        and "model_call expert answer gpt" in lines[place]
        and "slow trial 0 attempt 1" in lines[place]
    )
    (row,) = (line for line in lines if line.startswith("8 min 20 s"))
    assert "model_call expert answer gpt, 6 min 40 s" in row
    assert "no call that is named" in outcome.stdout and "cost: $0.00 so far" in outcome.stdout
    assert json.loads(CliRunner().invoke(app, ["watch", str(stuck), "--json"]).stdout)["state"] == "stuck"


def test_on_a_terminal_it_follows_the_run_to_its_end(tmp_path: Path) -> None:
    write_run(tmp_path, [run_start(1)])
    held = lease.take(tmp_path)
    screen, theirs = pty.openpty()
    command = [sys.executable, "-m", "analysis", "watch", str(tmp_path), "--interval", "0.2"]
    with subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as watching:
        os.close(theirs)
        shown = b""
        while b"running" not in shown:
            shown += os.read(screen, 4096)
        write_run(tmp_path, [result("a", "ok", True), event("run_end")], "later")
        held.release()
        while b"ended:" not in shown:
            shown += os.read(screen, 4096)
        assert watching.wait(30) == 0
    os.close(screen)
    assert b"1 planned = 1 ok" in shown and b"Traceback" not in shown


def test_no_run_an_empty_and_a_torn_one_are_told_in_words(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["watch", str(tmp_path / "nowhere")])
    assert (outcome.exit_code, len(outcome.stderr.splitlines())) == (2, 1)
    write_run(tmp_path, [])
    (tmp_path / "log" / "w-000009.arrows").write_text("torn")
    outcome = CliRunner().invoke(app, ["watch", str(tmp_path), "--once"])
    assert (outcome.exit_code, outcome.stdout.splitlines()[0]) == (0, f"empty: {tmp_path}")
