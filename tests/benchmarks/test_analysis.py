"""The measurement of the analysis measures the same run in every form, and would notice if it did not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import analysis, text_log
from benchmarks.analysis_run import Run, make_run, write_finished, write_live, write_text_log
from ray_app import events

TASKS = 30


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(3000, TASKS, seed=3)


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_finished(run, folder / "finished")
    write_live(run, folder / "live")
    write_text_log(run, folder / "hle.log")
    return folder


def test_the_two_forms_of_the_log_hold_the_same_rows(run: Run, folder: Path) -> None:
    assert len(run.table) >= 3000
    ids = {form: events.columns(folder / form, ["event_id"])["event_id"] for form in ("finished", "live")}
    shared = Counter(ids["finished"].to_pylist()) & Counter(ids["live"].to_pylist())
    assert len(ids["finished"]) == len(run.table) + 2  # run_start, run_end
    assert shared.total() == len(run.table) + 1
    assert len(list((folder / "finished" / "log").iterdir())) == 1
    assert {path.suffix for path in (folder / "live" / "log").iterdir()} == {".parquet", ".arrows"}


def test_every_command_runs_and_the_query_finds_what_the_text_log_holds(folder: Path) -> None:
    for command in ("critical-path", "compare", "show", "sql", "watch"):
        cost = analysis.run_command(command, folder / "live")
        assert cost.wall_s > 0 and cost.rss > 1 << 20
    times = analysis.time_query(folder, rounds=1)
    assert {*times} == {"query", "by_field", "by_line"}


def test_a_difference_between_the_logs_is_noticed(folder: Path) -> None:
    found = text_log.by_field(folder / "hle.log")
    lines = text_log.by_line(folder / "hle.log")
    assert {key: len(values) for key, values in found.items() if key[0] == "tool"} == {
        key: len(values) for key, values in lines.items() if key[0] == "tool"
    }
    ours = {own: found[name] / (1.0 if own[0] == "tokens" else 1000.0) for name, own in analysis.SAME.items()}
    analysis.check(ours, found)
    ours["stage", "judge"] = ours["stage", "judge"] + np.float64(0.001)
    with pytest.raises(RuntimeError, match="differ"):
        analysis.check(ours, found)


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 2"):
        analysis.run_command("timing", tmp_path / "nowhere")
