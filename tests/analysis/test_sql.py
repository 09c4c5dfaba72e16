"""Questions in SQL: what they may ask, what they may not touch, and how a mistake reads."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from ray_app.event_writer import EventWriter
from tests.analysis.runs import event, model_call, result, run_start, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        run_start(2),
        model_call("judge", 1.5, model="[bold]m"),
        model_call("expert", 0.5, cost_usd=float("nan")),
        result("a", "ok", True),
        result("a", "ok", False),
    ]
    return write_run(tmp_path_factory.mktemp("sql") / "run", rows)


def printed(run_dir: Path, question: str, *options: str) -> str:
    outcome = CliRunner().invoke(app, ["sql", question, str(run_dir), *options])
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def test_views_are_the_events_the_counted_results_and_the_payloads(run_dir: Path) -> None:
    question = (
        "select (select count(*) from events) as events, (select count(*) from results) as results, "
        "(select count(*) from payloads) as payloads, (select bool_or(is_correct) from results) as last"
    )
    assert json.loads(printed(run_dir, question, "--json")) == [
        {"events": 5, "results": 1, "payloads": 0, "last": False}
    ]


def test_the_run_may_come_first_as_in_other_commands(run_dir: Path) -> None:
    for question in ("select count(*) as n from events", f"select count(*) as n from events --{'x' * 5000}"):
        outcome = CliRunner().invoke(app, ["sql", str(run_dir), question, "--json"])
        assert json.loads(outcome.stdout) == json.loads(printed(run_dir, question, "--json")) == [{"n": 5}]


def test_an_answer_is_a_table_json_or_csv_of_plain_values(run_dir: Path) -> None:
    question = (
        "select model, duration_s, cost_usd, t_start, [1.5, 2] as l from events "
        "where kind = 'model_call' order by 2 desc"
    )
    (judge, expert) = json.loads(printed(run_dir, question, "--json"))
    assert judge == {
        "model": "[bold]m",
        "duration_s": 1.5,
        "cost_usd": None,
        "t_start": "2026-05-28T20:26:40",
        "l": [1.5, 2.0],
    }
    assert expert["cost_usd"] is None
    names, first, _ = csv.reader(io.StringIO(printed(run_dir, question, "--csv")))
    assert names == ["model", "duration_s", "cost_usd", "t_start", "l"] and first[:2] == ["[bold]m", "1.5"]
    assert "[bold]m" in printed(run_dir, question)
    assert printed(run_dir, "select * from results").splitlines()[0] == "row 1"
    assert printed(run_dir, "select kind from events where false") == "No row. Columns: kind\n"
    assert "The first 200 of 1,000 rows" in printed(run_dir, "select range from range(1000)")


def test_a_run_that_goes_on_is_read_anew(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, "w", flush_s=3600.0)
    for number in range(1, 3):
        writer.append(event("turn", at_s=number))
        writer.flush()
        assert json.loads(printed(tmp_path, "select count(*) n from events", "--json")) == [{"n": number}]
    writer.close()


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("select toool from events", "events and results: schema_version, event_id, kind"),
        ("select * from runs", "Expected one of the views events, results, payloads"),
        ("selec 1", "syntax error"),
        ("select 'x'::int from events", "Could not convert"),
        ("", "nothing; expected one SELECT"),
        ("select 1; select 2", "SELECT, SELECT; expected one SELECT"),
        ("set enable_external_access = true", "SET; expected one SELECT"),
        ("copy events to 'out.csv'", "COPY; expected one SELECT"),
        ("create table t as select 1", "CREATE; expected one SELECT"),
        ("select * from read_text('/etc/hostname')", "disabled by configuration"),
        ("select * from '/etc/hostname'", "Expected one of the views"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_outside_is_touched(
    run_dir: Path, question: str, words: str
) -> None:
    outcome = CliRunner().invoke(app, ["sql", question, str(run_dir)])
    assert (outcome.exit_code, len(outcome.stderr.splitlines())) == (2, 1)
    assert words in outcome.stderr and not Path("out.csv").exists()
