"""The watchdog's page: over real status files and leases, of this process and of one that is killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.status import RunStatus, status_of
from ray_app import lease, pulse
from ray_app.pulse import Pulse
from ray_app.records import Event
from tests.analysis.runs import event, model_call, result, run_start, write_run

NEVER_S = 1000.0
FIGURES = {"planned": 9, "ok": 1, "failed": 0, "limited": 0, "owed": 0, "pending": 8, "in_flight": 2}


@contextmanager
def driven(run_dir: Path) -> Iterator[lease.Lease]:
    """A run whose driver lives in this process."""
    held = lease.take(run_dir)
    yield held
    held.release()


def told(run_dir: Path, name: str = "w001", **options: Any) -> Pulse:
    return Pulse(run_dir, name, epoch=1, interval_s=NEVER_S, **options)


def waits(watch: Pulse, since: float, **columns: Any) -> int:
    """`watch` waits for a model call since then."""
    row = Event(
        "model_call", since, task_id="hle/7", trial=0, attempt=1, turn=3, role="expert", tool="search"
    )
    number = watch.begin(replace(row, **columns), "gpt")
    watch.beat()
    return number


def test_a_run_at_work_is_running(tmp_path: Path) -> None:
    rows = [run_start(3), result("a", "ok", True), result("b", "failed", error_kind="model")]
    for at, (old, new, why) in enumerate([(None, 64, "start"), (64, 24, "refused")]):
        detail = json.dumps({"old": old, "new": new, "reason": why})
        rows.append(event("limit", float(at), model="gpt", endpoint="http://a/v1", detail=detail))
    write_run(tmp_path, rows)
    with driven(tmp_path):
        decided = {"limits": [["gpt", "http://a/v1", 24], ["qwen", "http://b/v1", 8, 32, 3]]}
        figures = FIGURES | decided | {"per_min": 2.0, "last_commit": 1.0, "spent_usd": 1.5, "limit_usd": 6.0}
        driver = told(tmp_path, "driver", figures=lambda: figures)
        worker = told(tmp_path)
        number = waits(worker, time.time())
        run = status_of(tmp_path)
        assert (run.state, run.exit_code, run.problems) == ("running", 0, [])
        assert run.driver is not None and run.driver.pid == os.getpid()
        progress = run.progress
        assert (progress.planned, progress.ok, progress.failed, progress.pending) == (3, 1, 1, 1)
        assert (progress.in_flight, progress.per_min) == (2, 2.0)
        assert progress.last_commit_s is not None and progress.last_commit_s > 1e9
        assert [(group.kind, group.role, group.model, group.n) for group in run.in_flight] == [
            ("model_call", "expert", "gpt", 1)
        ]
        assert [(process.name, process.life, process.in_flight) for process in run.workers] == [
            ("w001", "alive", 1)
        ]
        limits = [(route.model, route.limit, route.open, route.changed) for route in run.limits]
        assert limits[1] == ("qwen", 8, 0, None) and limits[0][:3] == ("gpt", 24, 1)
        changed = limits[0][3]
        assert changed is not None
        assert (changed.old, changed.new, changed.reason, changed.n) == (64, 24, "refused", 2)
        page = CliRunner().invoke(app, ["watch", "--once", str(tmp_path)], env={"COLUMNS": "160"}).stdout
        assert "limits.run_cost_usd: $1.50 of $6.00 spent (25.0%)" in page
        assert re.search(r"qwen +http://b/v1 +8 of 32 \(3 runs\) +0", page)
        assert re.search(r"gpt +http://a/v1 +24 +1 +\S+ \S+ +64 +refused", page)
        worker.end(number)
        worker.close()
        driver.close()


def test_a_call_that_hangs_is_named_with_its_age_the_longest_first(tmp_path: Path) -> None:
    with driven(tmp_path):
        now = time.time()
        first, second = told(tmp_path, "w001"), told(tmp_path, "w002")
        waits(first, now - 100, task_id="short")
        waits(second, now - 301, task_id="long")
        run = status_of(tmp_path, clock=lambda: now)
        assert [(call.call.task_id, round(call.age_s), call.is_stuck, call.worker) for call in run.calls] == [
            ("long", 301, True, "w002"),
            ("short", 100, False, "w001"),
        ]
        assert (run.state, run.exit_code) == ("stuck", 1)
        assert run.problems == ["calls in flight for more than 300 s: 1, the longest below"]
        assert status_of(tmp_path, stuck_after_s=400, clock=lambda: now).exit_code == 0
        text = " ".join(CliRunner().invoke(app, ["status", str(tmp_path)]).stdout.split())
        assert "5 min 1 s STUCK" in text and "model_call expert search gpt" in text
        assert f"w002 (process {os.getpid()} on" in text
        first.close()
        second.close()


@pytest.mark.parametrize(("age_s", "is_silent"), [(10.0, False), (16.0, True)])
def test_a_worker_without_a_heartbeat_is_named_as_silent(
    tmp_path: Path, age_s: float, is_silent: bool
) -> None:
    with driven(tmp_path):
        now = time.time()
        worker = told(tmp_path, clock=lambda: now - age_s)
        run = status_of(tmp_path, clock=lambda: now)
        assert [process.life for process in run.workers] == ["silent" if is_silent else "alive"]
        assert run.exit_code == is_silent
        assert (
            any("worker w001" in problem and "16 s ago" in problem for problem in run.problems) == is_silent
        )
        worker.close()
        assert status_of(tmp_path, clock=lambda: now).problems == []


def test_a_dead_worker_is_named_until_the_driver_has_replaced_it(tmp_path: Path) -> None:
    with driven(tmp_path):
        kill_after_start(
            "from ray_app.pulse import Pulse; from ray_app.records import Event\n"
            "told = Pulse(Path(sys.argv[1]), 'w001', epoch=1)\n"
            "told.begin(Event('code', 5.0, task_id='a')); told.beat()",
            tmp_path,
        )
        run = status_of(tmp_path)
        assert [process.life for process in run.workers] == ["dead"]
        assert run.exit_code == 1 and "worker w001" in run.problems[0] and "is dead" in run.problems[0]
        assert [call.is_stuck for call in run.calls] == [False]
        pulse.mark_lost(tmp_path, "w001", 1)
        run = status_of(tmp_path)
        assert (run.exit_code, run.calls, [process.life for process in run.workers]) == (0, [], ["lost"])


def test_a_killed_driver_is_dead_and_what_it_left_is_told(tmp_path: Path) -> None:
    write_run(tmp_path, [run_start(3), result("a", "ok", True)])
    told(tmp_path, "driver", figures=lambda: FIGURES)
    kill_after_start("from ray_app import lease; held = lease.take(Path(sys.argv[1]))", tmp_path)
    run = status_of(tmp_path)
    assert run.driver is not None and run.driver.life == "dead"
    assert run.progress.in_flight is None
    assert (run.state, run.exit_code) == ("stopped", 1)
    assert run.problems == ["the driver died with 2 tasks pending; the job's command resumes it"]


def test_a_driver_killed_before_the_first_task_is_no_empty_run(tmp_path: Path) -> None:
    kill_after_start("from ray_app import lease; held = lease.take(Path(sys.argv[1]))", tmp_path)
    run = status_of(tmp_path)
    assert run.exit_code == 1 and "an unknown number of tasks" in run.problems[0]
    assert run.notes == ["No log yet: no task has been started."]


def test_a_driver_that_stands_still_is_silent(tmp_path: Path) -> None:
    with driven(tmp_path) as held:
        run = status_of(tmp_path, clock=lambda: held.path.stat().st_mtime + 16)
        assert run.exit_code == 1 and "driver" in run.problems[0] and "16 s ago" in run.problems[0]


def test_a_complete_run_has_ended_well_whatever_its_workers_left(tmp_path: Path) -> None:
    write_run(tmp_path, [run_start(2), result("a", "ok", True), result("b", "limited"), event("run_end")])
    with driven(tmp_path):
        waits(told(tmp_path, clock=lambda: 5.0), 1.0)  # killed at the end, never closed
    run = status_of(tmp_path)
    assert (run.state, run.exit_code, run.problems) == ("ended", 0, [])


def test_only_processes_of_the_newest_epoch_are_shown(tmp_path: Path) -> None:
    with driven(tmp_path):
        told(tmp_path, "w001", clock=lambda: 5.0)
    with driven(tmp_path):
        assert status_of(tmp_path).workers == []


def test_the_last_error_of_each_kind_is_shown_with_its_place(tmp_path: Path) -> None:
    failed: dict[str, Any] = {"status": "error", "error_kind": "infrastructure"}
    rows = [
        run_start(3),
        model_call("expert", at_s=30, task="b", error="the newest", worker="n:1", **failed),
        model_call("expert", at_s=10, task="a", error="an earlier one", **failed),
        model_call("expert", at_s=50, task="a", error="again", is_replayed=True, **failed),
        model_call("judge", at_s=20, task="c", status="error", error_kind="judge", error="unreadable [/b]"),
        model_call("judge", at_s=21, task="c"),
    ]
    write_run(tmp_path, rows)
    errors = status_of(tmp_path).errors
    assert [(e.error_kind, e.n, e.kind, e.task_id, e.worker, e.message) for e in errors] == [
        ("infrastructure", 2, "model_call", "b", "n:1", "the newest"),
        ("judge", 1, "model_call", "c", "", "unreadable [/b]"),
    ]
    assert "unreadable [/b]" in CliRunner().invoke(app, ["status", str(tmp_path)]).stdout


def test_json_has_the_same_keys_for_every_state_and_age(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    empty = json_of(tmp_path, 0)
    assert (empty["state"], empty["driver"], empty["progress"]["planned"]) == ("empty", None, None)
    with driven(tmp_path):
        worker = told(tmp_path)
        waits(worker, 1.0)
        full = json_of(tmp_path, 1)
        worker.close()
    assert list(full) == list(empty) == [*RunStatus.__dataclass_fields__]
    assert list(full["progress"]) == list(empty["progress"])
    (call,) = full["calls"]
    assert list(call) == ["age_s", "is_stuck", "worker", "host", "pid", "call"]
    assert call["call"] == {
        "task_id": "hle/7",
        "trial": 0,
        "attempt": 1,
        "turn": 3,
        "kind": "model_call",
        "role": "expert",
        "tool": "search",
        "alias": "",
        "model": "gpt",
        "since": 1.0,
    }
    assert asdict(status_of(tmp_path))["progress"] == empty["progress"]


def test_a_lease_that_was_torn_is_judged_by_its_age(tmp_path: Path) -> None:
    path = tmp_path / "lease" / "epoch-000001.json"
    path.parent.mkdir()
    path.touch()
    assert status_of(tmp_path).exit_code == 0
    os.utime(path, (time.time() - 60,) * 2)
    assert "driver" in status_of(tmp_path).problems[0]


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"host": 3, "pid": "x", "ended"', '{"pid": []}'])
def test_torn_files_are_no_traceback(tmp_path: Path, torn: str) -> None:
    write_run(tmp_path, [run_start(1)])
    for name in ("lease/epoch-000001.json", "status/e0001-w001.json", "log/w-000009.arrows"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(torn)
    outcome = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert outcome.exit_code in (0, 1) and isinstance(outcome.exception, SystemExit | None)
    assert "1 planned = 0 ok" in outcome.stdout


def test_a_log_that_does_not_read_is_a_note(tmp_path: Path) -> None:
    write_run(tmp_path, [run_start(1)])
    (tmp_path / "log" / "w-000009.parquet").write_text("no parquet")
    with driven(tmp_path):
        run = status_of(tmp_path)
    assert run.state == "running" and "cannot be read" in run.notes[0]


def test_no_such_run_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        outcome = CliRunner().invoke(app, ["status", str(path)])
        assert outcome.exit_code == 2
        assert outcome.stderr.splitlines() == [
            f"no run at {path}: expected a run directory, as the job prints it"
        ]


def json_of(run_dir: Path, exit_code: int) -> dict[str, Any]:
    outcome = CliRunner().invoke(app, ["status", str(run_dir), "--json"])
    assert outcome.exit_code == exit_code, outcome.output
    value: dict[str, Any] = json.loads(outcome.stdout)
    return value


def kill_after_start(code: str, run_dir: Path) -> None:
    """Run `code` in a process of its own, which is killed once it has run."""
    text = f"import sys; from pathlib import Path\n{code}\nprint('up', flush=True); input()"
    command = [sys.executable, "-c", text, str(run_dir)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        other.kill()


def test_an_imported_run_is_not_said_to_be_resumable(tmp_path: Path) -> None:
    write_run(tmp_path, [run_start(2, imported="hle.log"), result("a", "ok", True)])
    run = status_of(tmp_path)
    assert (run.state, run.exit_code, run.problems) == ("ended", 0, [])
    assert any("Imported (hle.log)" in note for note in run.notes)
