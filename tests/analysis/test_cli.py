"""The command line: readable tables, JSON, one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.queries import open_run
from analysis.report import sentence
from analysis.summary import summarise
from ray_app.event_writer import EventWriter
from tests.analysis.runs import model_call, result, run_start, tool_call, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows = [
        run_start(4, judge_model="judge-1"),
        tool_call("search", 2.0, model="gpt-5[bold]"),
        result("a", "ok", True, category="Math"),
        result("b", "failed", category="Math", error_kind="infrastructure"),
    ]
    return write_run(tmp_path / "run", rows)


def output_of(*arguments: str | Path) -> str:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def test_summary_shows_the_accounting_and_the_facts(run_dir: Path) -> None:
    text = " ".join(output_of("summary", run_dir).split())
    assert "4 = 1 ok + 1 failed + 0 limited + 0 owed + 2 pending" in text
    assert "25.0% of all planned (1 correct)" in text
    assert "judge model judge-1" in text
    assert "failures 1 infrastructure" in text


def test_timing_and_usage_show_each_tool_and_model_as_it_is_named(run_dir: Path) -> None:
    lines = output_of("timing", run_dir).splitlines()
    (row,) = (line.split() for line in lines if line.split()[:1] == ["search"])
    assert row == ["search", "1", "100.0%", "0", "2", "2", "2", "2", "0", "$0.00"]
    assert "gpt-5[bold]" in output_of("usage", run_dir)


@pytest.mark.parametrize("command", ["summary", "timing", "usage"])
def test_json_is_json(run_dir: Path, command: str) -> None:
    assert json.loads(output_of(command, run_dir, "--json"))


@pytest.mark.parametrize("command", ["summary", "timing", "usage"])
def test_an_empty_run_is_a_sentence(tmp_path: Path, command: str) -> None:
    assert "yet" in output_of(command, write_run(tmp_path / "run", []))


def test_plots_names_the_picture_to_open(run_dir: Path, tmp_path: Path) -> None:
    lines = output_of("plots", run_dir, "--out", tmp_path / "out").splitlines()
    assert lines[:2] == [sentence(summarise(open_run(run_dir))), str(tmp_path / "out" / "overview.png")]
    assert Path(lines[1]).exists()


def test_show_tells_one_task_with_what_calls_gave(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "run", "w")
    body = writer.payload(json.dumps({"content": "the reply"}))
    writer.append(model_call("orchestrator", at_s=1, turn=0, payload_hash=body, error="bad\x1b[2J"))
    writer.close()
    text = output_of("show", tmp_path / "run", "a")
    assert "reply: the reply" in text and "\x1b" not in text
    (attempt,) = json.loads(output_of("show", tmp_path / "run", "a", "--json"))["attempts"]
    assert attempt["turns"][0]["steps"][0]["pieces"] == [{"name": "reply", "text": "the reply"}]


@pytest.mark.parametrize(
    "arguments",
    [("summary", "nowhere"), ("plots", "nowhere"), ("show", "nowhere", "a"), ("show", "run", "zz")],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run_dir: Path, arguments: tuple[str, ...]) -> None:
    command, name, *rest = arguments
    outcome = CliRunner().invoke(app, [command, str(run_dir.parent / name), *rest])
    assert outcome.exit_code == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert "expected" in outcome.stderr


def test_summary_starts_without_matplotlib_and_nothing_imports_ray(run_dir: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from analysis.__main__ import app\n"
        "print(CliRunner().invoke(app, ['summary', sys.argv[1]]).exit_code, 'matplotlib' in sys.modules)\n"
        "import analysis.plots; print('matplotlib' in sys.modules, 'ray' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["0 False", "True False"]
