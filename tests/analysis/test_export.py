"""A run for other tools: the result files that earlier systems and `--adopt` read, and flat tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.export import export, file_name
from ray_app.adopt import read_results
from ray_app.errors import ConfigError
from ray_app.event_writer import EventWriter
from ray_app.journal import CHAT, CODE, RETRIEVAL
from ray_app.records import ChatReply, ExecutionResult, Hit, Retrieval, Task, ToolCall
from tests.analysis.runs import Teller, event, write_run

ASKED = "why/../so.json"


def choice(tool: str, content: str = "") -> ChatReply:
    return ChatReply(content, (ToolCall("c", tool, '{"model": "m-1"}'),))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks: one answered after every tool, one limited, one failed; and a second trial."""
    path = tmp_path_factory.mktemp("export") / "run"
    log = EventWriter(path, "w")
    told = Teller(log, ASKED)
    told.call(CHAT, choice("search"), 1, turn=0, role="orchestrator")
    told.call(CHAT, ChatReply("<query>ice</query>"), 2, turn=0, role="expert", tool="search", duration_s=0.5)
    told.call(RETRIEVAL, Retrieval((Hit(1, "text 1", 0.5),)), 3, turn=0, tool="search", duration_s=0.25)
    told.note("tool_call", 2, turn=0, tool="search", model="gpt", status="error", error="nothing new")
    told.call(CHAT, ChatReply("what?"), 4, turn=1, role="orchestrator")
    told.call(CHAT, choice("enhance_reasoning"), 5, turn=2, role="orchestrator")
    told.call(CHAT, ChatReply("```python\nprint(6)\n```"), 6, turn=2, role="expert", tool="enhance_reasoning")
    told.call(CODE, ExecutionResult("6", "", 0, False, 0.1), 7, turn=2, tool="enhance_reasoning")
    told.note("tool_call", 6, turn=2, tool="enhance_reasoning", model="coder")
    told.call(CHAT, choice("answer"), 8, turn=3, role="orchestrator")
    told.call(CHAT, ChatReply("<answer>41</answer>"), 8.2, turn=3, role="expert", tool="answer")
    told.call(CHAT, ChatReply("<answer>42</answer>"), 9, turn=3, role="expert", tool="answer", epoch=2)
    told.note("tool_call", 9, turn=3, tool="answer", model="gpt")
    told.call(CHAT, ChatReply("true"), 10, turn=3, role="judge", duration_s=0.75)
    told.result(11, "42", "ok", True, turn=4, verdict_method="judge", cost_usd=0.5)
    told.result(12, "41", "ok", False, turn=4, trial=1)
    Teller(log, "b").result(13, "", "limited", False)
    Teller(log, "c").note("result", 14, outcome="failed", error_kind="model", error="too long")
    log.append(event("verdict", 20, ASKED, role="judge", alias="another", is_correct=False))
    log.close()
    return path


def test_result_files_have_each_turns_choice_and_what_its_tool_gave(run_dir: Path, tmp_path: Path) -> None:
    assert export(run_dir, tmp_path, "json") == ["4 files {id}.json"]
    assert len(list(tmp_path.iterdir())) == 4
    value: dict[str, Any] = json.loads((tmp_path / "why%2F%2E%2E%2Fso%2Ejson.json").read_text())
    call = {"name": "answer", "arguments": '{"model": "m-1"}'}
    assert value["all_tool_calls"][1::2] == ["342 invalid tool calls what?", [call]]
    assert (value["id"], value["correct"], value["status"]) == (ASKED, True, "done")
    assert "error_type" not in value
    search, code, answer = (turn[0] for turn in value["all_tool_responses"].values())
    assert (search["query"], search["search_results_data"]) == ("ice", ["text 1"])
    assert (search["_query_llm_ms"], search["_retrieval_ms"]) == (500.0, 250.0)
    assert search["_search_local_hits"] == 1 and "tool_error" not in search
    assert (code["generated_code"], code["exec_result"]) == ("print(6)", "6")
    assert (answer["pred"], answer["_judge_ms"], answer["correctness"]) == ("42", 750.0, True)
    assert list(value["all_message_responses"]) == ["turn_0_message", "turn_2_message", "turn_3_message"]


def test_what_is_exported_can_be_adopted(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path, "json")
    (tmp_path / file_name(ASKED, 1)).unlink()
    adoption = read_results(tmp_path, {name: Task(name, "question", "42") for name in (ASKED, "b", "c")})
    assert adoption.refused == {"ended in an error": 1}
    found = {result.task_id: (result.outcome, result.prediction) for result in adoption.results}
    assert found == {ASKED: ("ok", "42"), "b": ("limited", "")}


def test_tables_are_flat_and_hold_all_results_and_calls(run_dir: Path, tmp_path: Path) -> None:
    pd: Any = importlib.import_module("pandas")  # which has no types
    readers = {"csv": pd.read_csv, "parquet": pd.read_parquet, "pandas": pd.read_feather}
    for form, read in readers.items():
        lines = export(run_dir, tmp_path, form)  # type: ignore[arg-type]
        assert [line.split(": ")[1] for line in lines] == ["4 rows", "14 rows"]
        results, calls = (read(tmp_path / line.split(":")[0]) for line in lines)
        assert list(results["task_id"]) == ["b", "c", ASKED, ASKED]
        assert [int(value) for value in results["prediction"][2:]] == [42, 41]
        assert results["reasoning"].iloc[2] == "it is" and results["turns"].iloc[2] == 4
        counts = {"model_call": 9, "tool_call": 3, "retrieval": 1, "code": 1}
        assert calls["kind"].value_counts().to_dict() == counts
    assert str(results["t_start"].dtype).startswith("datetime64")


def test_no_two_ids_share_a_file_and_none_is_a_path() -> None:
    ids = [
        "a",
        "A b",
        "../a",
        "..",
        "",
        "a/b",
        "a%2Fb",
        "x" * 300,
        "x" * 299 + "y",
        "\u00e9\x00",
        "a.trial-1",
    ]
    names = [file_name(name, trial) for name in ids for trial in (0, 1)]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) < 200 and name.strip(".") for name in names)


def test_an_empty_run_is_exported_as_nothing_and_a_mistake_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", [])
    assert export(empty, tmp_path / "out", "json") == ["0 files {id}.json"]
    assert export(empty, tmp_path / "out", "csv") == ["results.csv: 0 rows", "calls.csv: 0 rows"]
    with pytest.raises(ConfigError, match="tau2: the run has no dialogue that counts"):
        export(run_dir, tmp_path / "out", "tau2")
    (tmp_path / "file").write_text("")
    for run, to in ((tmp_path / "nowhere", "x"), (run_dir, "file")):
        outcome = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / to)])
        assert (outcome.exit_code, len(outcome.stderr.splitlines())) == (2, 1), outcome.output
    outcome = CliRunner().invoke(app, ["export", str(run_dir), "--to", str(tmp_path / "x")])
    assert outcome.stdout == f"{tmp_path / 'x'}: 4 files {{id}}.json\n"
