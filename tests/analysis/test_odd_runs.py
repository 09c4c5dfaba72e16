"""Runs with hardly anything in them: every command says so in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from ray_app.event_writer import EventWriter
from tests.analysis.runs import event, model_call, write_run

COMMANDS = {
    "show": ("show", "RUN", "a"),
    "show whole": ("show", "RUN", "a", "--full", "--json"),
    "watch": ("watch", "RUN", "--once"),
    "compare": ("compare", "RUN", "RUN", "--out", "OUT"),
    "sql": ("sql", "select * from events join results using (task_id)", "RUN"),
    "export": ("export", "RUN", "--to", "OUT"),
    "report": ("report", "RUN", "--out", "PAGE"),
    "export tables": ("export", "RUN", "--to", "OUT", "--format", "csv"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An empty run, one of one event, and one whose only stream was cut in the middle of a row."""
    folder = tmp_path_factory.mktemp("odd")
    cut = EventWriter(folder / "torn", "w", flush_s=3600.0)
    cut.append(model_call("judge", payload_hash=cut.payload("{")))
    cut.flush()
    for table in ("log", "payloads"):
        (path,) = (folder / "torn" / table).glob("*.arrows")
        path.with_name("other-000000.arrows").write_bytes(path.read_bytes()[:-200])
    cut.close()
    for table in ("log", "payloads"):  # only what was cut is left
        for path in (folder / "torn" / table).glob("w-*"):
            path.unlink()
    return {
        "empty": write_run(folder / "empty", []),
        "one event": write_run(folder / "one", [event("attempt", task="a")]),
        "torn": folder / "torn",
    }


@pytest.mark.parametrize("name", ["empty", "one event", "torn"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_with_hardly_anything_is_told_in_words(
    runs: dict[str, Path], name: str, command: str, tmp_path: Path
) -> None:
    places = {"RUN": str(runs[name]), "OUT": str(tmp_path), "PAGE": str(tmp_path / "page.html")}
    outcome = CliRunner().invoke(app, [places.get(word, word) for word in COMMANDS[command]])
    assert isinstance(outcome.exception, SystemExit | None), outcome.exc_info
    assert outcome.exit_code == (2 if command.startswith("show") and name != "one event" else 0)
    assert outcome.output.strip() and "nan" not in outcome.output.lower()


def test_a_file_of_the_log_that_is_damaged_is_named_by_every_command(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [event("attempt", task="a")])
    (path,) = (run_dir / "log").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    places = {"RUN": str(run_dir), "OUT": str(tmp_path / "out"), "PAGE": str(tmp_path / "page.html")}
    for command in ({**COMMANDS, "summary": ("summary", "RUN")}).values():
        outcome = CliRunner().invoke(app, [places.get(word, word) for word in command])
        assert isinstance(outcome.exception, SystemExit | None), command
        assert outcome.exit_code == (command[0] != "watch") and f"cannot read {path}" in outcome.output, (
            command
        )
