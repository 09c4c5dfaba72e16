"""A tau2 run's figures from its log: what counts, what is left out, and that both are said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.log import open_run
from analysis.simulations import COLUMNS, simulations
from ray_app.event_writer import EventWriter
from ray_app.records import Event
from tests.analysis.runs import event, result, run_start, write_run

FACTS = {"benchmark": "tau2", "trials": 2, "tasks_by_domain": {"airline": 2, "retail": 3}}


def ended(
    task: str, trial: int, reason: str, outcome: str, is_right: bool | None = None, **more: Any
) -> Iterator[Event]:
    """A simulation and its counted result; `more` goes into the result."""
    common: dict[str, Any] = {"trial": trial, "category": task.partition(":")[0]}
    if reason:
        yield event("simulation", task=task, detail=reason, **common)
    yield result(task, outcome, is_right, **common, **more)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows = [
        run_start(10, **FACTS),
        *ended("airline:1", 0, "user_stop", "ok", True),
        *ended("airline:1", 1, "user_stop", "ok", True),
        *ended("airline:2", 0, "user_stop", "ok", False),
        *ended("airline:2", 1, "max_steps", "limited", error_kind="limit"),
        *ended("retail:1", 0, "user_stop", "ok", True),
        *ended("retail:1", 1, "", "failed", error_kind="infrastructure"),
        *ended("retail:2", 0, "user_stop", "ok", True),
        *ended("retail:2", 1, "", "failed", error_kind="model"),
        *ended("retail:3", 0, "user_stop", "owed"),
        # A resume replays a simulation, and says so; that one has another end says the newest alone.
        event("simulation", task="airline:2", trial=0, epoch=2, detail="agent_error", is_replayed=True),
    ]
    return write_run(tmp_path / "run", rows)


def test_what_counts_is_what_says_something_of_the_models(run_dir: Path) -> None:
    found = simulations(open_run(run_dir, columns=COLUMNS))
    airline, retail = found.domains
    assert [row.value for row in airline.pass_hat] == [0.5, 0.5]
    # retail:1 has one trial that counts: it is no part of pass^2; retail:3 has none.
    assert [(row.value, row.tasks) for row in retail.pass_hat] == [(0.75, 2), (0.0, 1)]
    assert found.overall is not None
    assert [(row.value, row.tasks) for row in found.overall.pass_hat] == [(2.5 / 4, 4), (1 / 3, 3)]
    assert [row.value for row in found.mean_of_domains] == [0.625, 0.25]
    assert retail.coverage.__class__(6, 3, 1, 1, 1) == retail.coverage
    assert (found.overall.coverage.planned, found.overall.coverage.share) == (10, 0.7)
    assert airline.reasons == {"user_stop": 2, "agent_error": 1, "max_steps": 1}
    assert retail.reasons == {"user_stop": 2, "infrastructure_error": 1, "model_error": 1}
    assert airline.noise is not None and airline.noise.by_trial == (0.5, 0.5)


def test_the_page_always_says_what_was_left_out_and_json_has_all(run_dir: Path) -> None:
    page = CliRunner().invoke(app, ["tau2", str(run_dir)]).output
    assert (
        "10 planned simulations: 7 count, 1 infrastructure errors left out, 1 rewards owed, 1 pending. "
        "Coverage 70.0%."
    ) in page
    lines = [line.split() for line in page.splitlines()]
    assert ["retail", "1", "2", "75.0%", "25.6%", "to", "96.3%"] in lines
    assert ["2", "3", "33.3%", "6.1%", "to", "79.2%"] in lines, "all tasks, pass^2"
    assert "infrastructure_error" in page and "detectable" in page
    found = json.loads(CliRunner().invoke(app, ["tau2", str(run_dir), "--json"]).output)
    assert found["overall"]["pass_hat"][1]["value"] == pytest.approx(1 / 3)
    one = json.loads(
        CliRunner().invoke(app, ["tau2", str(run_dir), "--json", "--category", "airline"]).output
    )
    assert one["overall"]["coverage"] == {
        "planned": None,
        "counted": 4,
        "infrastructure": 0,
        "owed": 0,
        "pending": None,
    }


def test_a_run_without_results_is_a_sentence(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [run_start(10, **FACTS)])
    assert "no result is in the log yet" in CliRunner().invoke(app, ["tau2", str(tmp_path / "run")]).output


def test_each_counted_simulation_is_exported_as_a_file_of_its_newest_attempt(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "run", "w")

    def simulated(task: str, attempt: int, said: str) -> None:
        body = writer.payload(json.dumps({"task_id": task, "messages": [said]}))
        common: dict[str, Any] = {"category": "airline", "attempt": attempt, "payload_hash": body}
        writer.append(event("simulation", task=task, detail="user_stop", **common))

    simulated("airline:../7", 2, "second")
    simulated("airline:../7", 1, "first")
    simulated("airline:8", 1, "its attempt was lost")
    writer.append(result("airline:../7", "ok", True, attempt=2, category="airline"))
    writer.close()
    out = tmp_path / "out"
    told = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", str(out), "--format", "tau2"])
    assert told.output == f"{out}: 1 files airline/{{id}}.json\n"
    (written,) = out.rglob("*.json")
    assert written.parent == out / "airline" and json.loads(written.read_text())["messages"] == ["second"]
