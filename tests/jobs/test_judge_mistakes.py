"""What a user can get wrong with a judge-only pass: one line, exit code 2, nothing asked or stored."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs.judge import app
from ray_app import events, lease
from ray_app.baseline.server import ServerSettings
from ray_app.event_writer import EventWriter
from ray_app.hle import read_tasks
from ray_app.records import TaskResult, Verdict
from tests.baseline.serving import serving as serving_baseline
from tests.test_rejudge import commit, make_run, run_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return asyncio.run(make_run(tmp_path))


def judge(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def other(url: str, **changes: Any) -> list[str]:
    model = {"endpoints": [{"base_url": url}], "served_name": "m"} | changes
    return ["--set", f"models.other={json.dumps(model)}", "--set", "judge.model=other"]


def refused(result: Result) -> str:
    """The one line of a mistake."""
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_folder_that_holds_no_run_is_named(tmp_path: Path) -> None:
    assert "expected the directory of a run" in refused(judge(tmp_path / "nothing"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "judge.model=nobody"], "unknown model 'nobody'"),
        (["--set", "judge.temprature=1"], "unknown key 'judge.temprature'"),
        (["--set", "limits.max_rounds=3"], "the rollouts are not run again"),
        (["--set", "protocol=hle-style"], "use --protocol"),
        (["--prompts", "/no/prompts"], "expected a folder with .txt templates"),
        (["--json", "/no/such/folder/x.json"], "no such folder; make it first"),
        (["--set", "dataset.path=/no/such.jsonl"], "/no/such.jsonl: No such file"),
        (other("http://127.0.0.1:9/v1", endpoints=[{"service": "nope"}]), "no such application"),
        (other("http://127.0.0.1:9/v1"), "start it, or mend models.other"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_stored(
    run_dir: Path, arguments: list[str], message: str
) -> None:
    before = events.read(run_dir).read_all().num_rows
    assert message in refused(judge(run_dir, *arguments))
    assert events.read(run_dir).read_all().num_rows == before


def test_a_judge_that_is_not_served_is_named_with_the_command_that_serves_it(
    run_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    app_lines = "[{name: baseline, import_path: ray_app.app:baseline, route_prefix: /baseline}]"
    path.write_text(f"http_options: {{port: 9}}\napplications: {app_lines}\n")
    line = refused(
        judge(run_dir, *other("", endpoints=[{"service": "baseline"}]), "--set", f"services={path}")
    )
    assert "http://127.0.0.1:9/baseline/v1" in line and f"`serve run {path}`" in line


def test_another_driver_and_a_dataset_without_the_question_are_refused(run_dir: Path, tmp_path: Path) -> None:
    held = lease.take(run_dir)
    busy = refused(judge(run_dir, *other("http://127.0.0.1:9/v1")))
    held.release()
    assert f"process {os.getpid()}" in busy
    questions = tmp_path / "questions.jsonl"
    questions.write_text(questions.read_text().replace("What is wrong?", "Which is wrong?"))
    assert "question 'wrong' of the run is not in it" in refused(judge(run_dir))


def test_hle_style_says_which_results_have_no_response(run_dir: Path, tmp_path: Path) -> None:
    task = read_tasks(run_config(tmp_path).dataset).tasks[4]
    log = EventWriter(run_dir, "e0002-adopt-test")
    verdict = Verdict(False, "judge")
    result = TaskResult(task.task_id, task.rollout_key, task.judge_key, 0, 0, "ok", "pink", verdict)
    asyncio.run(commit(log, run_dir, result, epoch=2))
    log.close()
    line = refused(judge(run_dir, "--protocol", "hle-style"))
    assert "1 of 6 results (first: 'wrong') have no `answer` call" in line


def test_the_plan_shows_work_and_route_and_asks_nothing(run_dir: Path) -> None:
    result = judge(run_dir, *other("http://127.0.0.1:9/v1", price={"input": 1, "output": 2}), "--plan")
    assert result.exit_code == 2
    assert "5 to judge (1 of them need no call), 0 stored, 1 without an answer" in result.output
    assert "missing: judge model other: http://127.0.0.1:9/v1" in result.output
    assert "Expected: 4 judge calls" in result.output and "Nothing was started or paid." in result.output
    assert not (run_dir / "lease").exists()


def test_a_pass_ends_with_the_table_and_the_figures(run_dir: Path, tmp_path: Path) -> None:
    with serving_baseline(ServerSettings(models=("m",))) as url:
        result = judge(run_dir, *other(f"{url}/v1"), "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    assert "5 to judge = 5 judged + 0 owed + 0 failed + 0 pending" in result.output
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["n"], found["first_accuracy"], found["second_accuracy"]) == (5, 0.6, 0.6)
    assert (found["wrong_then_right"], found["right_then_wrong"]) == (["strict"], ["lenient"])
    # By hand: 3 of 5 agree, 0.6; by chance 0.6 * 0.6 + 0.4 * 0.4 = 0.52; 0.08 / 0.48.
    assert found["kappa"] == pytest.approx(1 / 6)
    assert (found["model_calls"], found["exit_code"], found["without_answer"]) == (4, 0, 1)
    again = judge(run_dir, *other("http://127.0.0.1:9/v1"))
    assert again.exit_code == 0 and "Nothing left to judge" in again.output
