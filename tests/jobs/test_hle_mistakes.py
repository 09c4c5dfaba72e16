"""What a user can get wrong before anything starts: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.hle import ROOT, app
from ray_app import lease, rundir

SAMPLE = ROOT / "configs" / "hle_sample.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def config(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SAMPLE.read_text()) | changes))
    return str(path)


def questions(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    return {"path": str(path), "policy": "unscoped"}


GOOD_ROW = json.dumps({"id": "a", "question": "q?", "answer": "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurency": 2}, "unknown key 'concurency'; did you mean 'concurrency'?"),
        ({"judge": {"model": "nobody"}}, "unknown model 'nobody'"),
        ({"dataset": {"path": "/no/such.jsonl", "policy": "unscoped"}}, "/no/such.jsonl: No such file"),
        ({"dataset": {"path": "/no/such.jsonl"}}, "dataset.scopes: expected an examples.json"),
        ({"dataset": {"path": "cais/hle", "policy": "unscoped"}}, "expected dataset.revision"),
        ({"services": "nothing.yaml"}, "expected a Serve config file"),
        (
            {"retriever": {"service": "retreiver"}},
            "no such application in the Serve config; it has: retriever, baseline",
        ),
        ({"prompts": "/no/prompts"}, "expected a folder with .txt templates"),
        ({"run_name": "../elsewhere"}, "expected a plain folder name"),
    ],
)
def test_a_mistake_in_the_config_is_one_line_and_exit_code_2(
    tmp_path: Path, home: Path, changes: dict[str, Any], message: str
) -> None:
    result = run("--config", config(tmp_path, **changes))
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1 and result.output.startswith("error: ")
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD_ROW + "\n{broken\n", "line 2: not valid JSON"),
        (f"{GOOD_ROW}\n\n{GOOD_ROW}\n", "line 3: id 'a' stands on line 1 too"),
        ('{"id": "a"}\n', "line 1: no question, answer"),
    ],
)
def test_a_bad_questions_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    result = run("--config", config(tmp_path, dataset=questions(tmp_path, text)))
    assert (result.exit_code, message in result.output) == (2, True)


def test_a_run_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (ROOT / "runs" / "x", "inside the package"),
        (tmp_path / "file" / "run", "Not a directory"),
    ):
        result = run("--run-dir", str(path))
        assert (result.exit_code, message in result.output) == (2, True)


def test_another_config_and_another_driver_are_refused_by_name(tmp_path: Path) -> None:
    from ray_app.config import load
    from ray_app.hle import read_job

    run_dir = tmp_path / "run"
    job = read_job(load(SAMPLE), run_dir)
    rundir.open_run(run_dir, job.config, job.identity)
    other = run("--run-dir", str(run_dir), "--set", "limits.max_rounds=7")
    assert other.exit_code == 2 and "limits.max_rounds (10 there, 7 now)" in other.output
    fewer = run("--run-dir", str(run_dir), "--limit", "7", "--shuffle")
    assert fewer.exit_code == 2 and "tasks_chosen (None there, '7 of 60' now)" in fewer.output
    unknown = run("--run-dir", str(run_dir), "--ids", "nobody")
    assert unknown.exit_code == 2 and "--ids: 1 of 1 are not among the 60 tasks: 'nobody'" in unknown.output
    nowhere = run("--run-dir", str(run_dir), "--durations-from", str(tmp_path / "none"))
    assert nowhere.exit_code == 2 and "expected a run with results in its log" in nowhere.output
    held = lease.take(run_dir)
    busy = run("--run-dir", str(run_dir))
    held.release()
    assert busy.exit_code == 2 and f"process {os.getpid()}" in busy.output


def test_a_folder_without_old_results_is_named(tmp_path: Path) -> None:
    result = run("--adopt", str(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert result.exit_code == 2 and "expected a folder with one {id}.json per question" in result.output


def test_the_plan_names_routes_that_do_not_answer_and_starts_nothing(tmp_path: Path, home: Path) -> None:
    models = {
        "baseline": {"endpoints": [{"base_url": "http://127.0.0.1:9/v1"}], "price": {"input": 1, "output": 1}}
    }
    result = run("--config", config(tmp_path, models=models), "--plan")
    assert result.exit_code == 2
    assert "60 to run (0 of them owed a verdict only), 0 skipped" in result.output
    assert "missing: judge: http://127.0.0.1:9/v1" in result.output
    assert "Scopes: 60 of 60 questions scoped" in result.output
    assert "Expected: about 420 model calls" in result.output
    assert "Nothing was started or paid." in result.output
    assert not (home / "runs").exists()


def test_a_plan_with_services_that_the_job_would_start_is_complete(tmp_path: Path) -> None:
    result = run("--plan", "--set", f"services={_free_port_config(tmp_path)}")
    assert result.exit_code == 0
    assert "will be started" in result.output


def test_the_plan_of_a_pilot_of_chosen_tasks_counts_what_is_left_for_later(tmp_path: Path) -> None:
    chosen = ("--limit", "20", "--trials", "2", "--pilot", "6")
    result = run("--plan", "--set", f"services={_free_port_config(tmp_path)}", *chosen)
    assert result.exit_code == 0, result.output
    assert "Tasks: 6 to run" in result.output and "34 left for after the pilot" in result.output
    assert "40 left out: not chosen (--limit, --ids)" in result.output
    assert "At n=20 a difference under " in result.output


def _free_port_config(tmp_path: Path) -> Path:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    values["http_options"]["port"] = port
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
