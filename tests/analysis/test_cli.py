"""The command line: readable tables, JSON, one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.log import open_run
from analysis.report import sentence
from analysis.summary import summarise
from analysis.tables import timing_page
from analysis.timing import timing
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
    first, parts = (line.split() for line in lines if line.split()[:1] == ["search"])
    assert first == ["search", "1", "2", "0", *["2"] * 12, "0", "100.0%"]
    assert parts == ["search", "1", "2", "2"]
    assert "gpt-5[bold]" in output_of("usage", run_dir)


COMMANDS = {
    "summary": [],
    "timing": [],
    "usage": [],
    "duration": ["--tool", "search", "--model", "gpt-5[bold]"],
    "critical-path": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_json_and_pictures_go_where_they_are_sent(
    run_dir: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    options = [*COMMANDS[command], "--json", "--out", str(out)]
    content = json.loads(output_of(command, run_dir, *options))
    assert not isinstance(content, list)
    assert {path.suffix for path in out.iterdir()} == {".png", ".svg"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", ["empty", "one event", "torn", "filtered away"])
def test_a_run_with_little_in_it_is_a_sentence(tmp_path: Path, command: str, state: str) -> None:
    run, more = tmp_path / "run", list[str]()
    if state == "filtered away":
        rows = [run_start(1, benchmark="hle"), tool_call("search", 1.0), result("a", "ok", True)]
        more = ["--benchmark", "frames"]
    else:
        rows = [run_start(3)] if state == "one event" else []
    write_run(run, rows)
    if state == "torn":
        writer = EventWriter(run, "torn")
        writer.append(run_start(3))
        writer.flush()
        (stream,) = (run / "log").glob("torn*.arrows")
        data = stream.read_bytes()
        writer.close()
        for path in (run / "log").iterdir():
            path.unlink()
        stream.write_bytes(data[:-40])
    for out in ([], ["--out", str(tmp_path / "out")]):
        text = output_of(command, run, *COMMANDS[command], *more, *out)
        assert text.strip()
    assert json.loads(output_of(command, run, *COMMANDS[command], *more, "--json"))
    if command != "summary":
        words = "leaves out" if more else "yet"
        assert words in text


def test_a_file_that_does_not_read_is_one_line_and_exit_code_1(run_dir: Path) -> None:
    (run_dir / "log" / "w-000009.parquet").write_text("no parquet")
    outcome = CliRunner().invoke(app, ["timing", str(run_dir)])
    assert (outcome.exit_code, len(outcome.stderr.splitlines())) == (1, 1)
    assert "w-000009.parquet" in outcome.stderr


def test_several_runs_are_pages_one_after_the_other_and_a_list_in_json(run_dir: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", [tool_call("answer", 1.0)])
    pages = output_of("usage", run_dir, other)
    assert pages.index(str(run_dir)) < pages.index(str(other))
    first, second = json.loads(output_of("usage", run_dir, other, "--json", "--out", tmp_path / "out"))
    assert (first["rows"][0]["tool"], second["rows"][0]["tool"]) == ("search", "answer")
    assert (tmp_path / "out" / "2" / "usage.png").exists()


def test_filters_reach_every_command(run_dir: Path) -> None:
    rows = json.loads(output_of("usage", run_dir, "--tool", "search", "--tool", "x", "--json"))["rows"]
    assert [row["tool"] for row in rows] == ["search"]
    summary = json.loads(output_of("summary", run_dir, "--category", "Math", "--json"))
    assert (summary["accounting"]["planned"], summary["filters"]) == (2, "categories Math")
    outcome = CliRunner().invoke(app, ["duration", str(run_dir), "--tool", "search"])
    assert outcome.exit_code == 2 and "one --model" in outcome.stderr


def test_a_narrow_terminal_gets_fewer_columns_and_no_cut_numbers(run_dir: Path) -> None:
    page = timing_page(timing(open_run(run_dir)))
    file = StringIO()
    Console(width=100, file=file).print(page)
    text = file.getvalue()
    assert "p40" not in text and "p99" in text and "\u2026" not in text


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


def test_figures_import_nothing_heavy_and_nothing_imports_ray(run_dir: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from analysis.__main__ import app\n"
        "heavy = ('matplotlib', 'pandas', 'duckdb', 'scipy', 'ray')\n"
        "for command in ('summary', 'timing', 'usage', 'critical-path'):\n"
        "    done = CliRunner().invoke(app, [command, sys.argv[1]])\n"
        "    print(done.exit_code, [name for name in heavy if name in sys.modules])\n"
        "import analysis.plots, analysis.timeline\n"
        "print('matplotlib' in sys.modules, 'ray' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [*["0 []"] * 4, "True False"]
