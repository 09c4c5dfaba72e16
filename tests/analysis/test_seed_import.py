"""Runs of earlier systems become ordinary runs: small logs and results in their format, with their faults."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.log import open_run
from analysis.seed_import import Imported, import_run
from analysis.seed_log import Reading, parse, read_logs
from analysis.seed_results import read_results
from analysis.summary import summarise
from analysis.usage import tool_table, usage
from ray_app import events
from ray_app.errors import RunDirError
from ray_app.records import Task


def line(second: float, task: str, words: str, level: str = "PROFILE") -> str:
    return f"[{level}] 2026-01-03 10:00:{second:06.3f} task={task} thread=140 {words}\n"


def llm(second: float, task: str, words: str = "", step: int | None = 0) -> str:
    place = "" if step is None else f"step={step} "
    times = (
        "toolorchestra_vllm_infer_ms=900.00 toolorchestra_vllm_prefill_ms=200.00 "
        "toolorchestra_vllm_decode_ms=700.00 toolorchestra_vllm_prefill_len=1500 "
        "toolorchestra_vllm_decode_len=60"
    )
    model = "model=/models/Orchestrator 8B backend=vllm duration_ms=1000.00 "
    return line(second, task, f"type=llm_call {place}eid=3 {model}{words or times}")


FIRST = line(0, "global", "type=run_start model_name=/models/Orchestrator 8B concurrency=2")
SEARCH = "tool=search model=openai/gpt-oss-20b duration_ms=3000.00 search_backend=tavily_fallback"
ANSWER = "type=tool_call step=1 tool=answer model=gpt-5 duration_ms=2000.00"
JUDGED = line(9.9, "a", "type=evaluator model=gpt-5 duration_ms=500.00", "USER_JUDGE")


def result_file(folder: Path, name: str, **columns: Any) -> Path:
    folder.mkdir(exist_ok=True)
    answered = {"turn_1_response": [{"tool": "answer", "id": "a", "eid": 3, "pred": "42"}]}
    row = {"id": name, "problem": f"question {name}", "answer": "42", "correct": True, "status": "done"}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**row, "all_tool_responses": answered, **columns}))
    return path


def imported(tmp_path: Path, log: str, results: Path | None = None) -> tuple[Imported, Path]:
    (tmp_path / "hle.log").write_text(log)
    made = import_run(tmp_path / "hle.log", results, tmp_path / "run")
    return made, tmp_path / "run"


def calls_of(run_dir: Path, *columns: str) -> list[tuple[Any, ...]]:
    query = f"select {', '.join(columns)} from events where kind <> 'attempt' order by t_start, kind"
    with events.connect(run_dir) as log:
        return log.execute(query).fetchall()


def test_a_call_that_was_logged_at_its_end_gets_its_start_and_its_parts(tmp_path: Path) -> None:
    search = f"type=tool_call step=0 {SEARCH} search_local_hits=2 search_tavily_hits=5 "
    log = (
        FIRST
        + llm(2, "a")
        + line(5, "a", search + "query_llm_ms=1000.00 retrieval_ms=1500.00 retrieval_retries=2")
    )
    _, run = imported(tmp_path, log)
    base = datetime.fromisoformat("2026-01-03 10:00:00").timestamp()
    with events.connect(run) as sql:
        rows = sql.execute(
            "select kind, role, model, epoch_us(t_start) / 1e6 - $1, duration_s, turn, prompt_tokens, "
            "prefill_s, decode_s, local_hits, web_hits, retries from events where task_id = 'a' "
            "and kind not in ('attempt', 'turn') order by t_start, duration_s desc",
            [base],
        ).fetchall()
    gpt = "openai/gpt-oss-20b"
    assert [(*row[:3], round(row[3], 3), *row[4:]) for row in rows] == [
        ("model_call", "orchestrator", "/models/Orchestrator 8B", 1.0, 1.0, 0, 1500, 0.2, 0.7, None, None, 0),
        ("tool_call", "", gpt, 2.0, 3.0, 0, None, None, None, 2, 5, 0),
        ("model_call", "expert", gpt, 2.5, 1.0, 0, None, None, None, None, None, 0),
        ("retrieval", "", "", 3.5, 1.5, 0, None, None, None, 2, 5, 2),
    ]


@pytest.mark.parametrize(("evaluator", "judges"), [(JUDGED, ["gpt-5"]), ("", [""])])
def test_an_answers_time_is_without_the_judge_who_counts_once(
    tmp_path: Path, evaluator: str, judges: list[str]
) -> None:
    log = FIRST + llm(5, "a", step=1) + evaluator
    log += line(10, "a", f"{ANSWER} duration_total_ms=2600.00 judge_ms=500.00")
    _, run = imported(tmp_path, log)
    rows = calls_of(run, "kind", "role", "model", "tool", "duration_s")
    assert ("tool_call", "", "gpt-5", "answer", 2.1) in rows
    assert ("model_call", "expert", "gpt-5", "answer", 2.0) in rows
    assert [(row[2], row[4]) for row in rows if row[1] == "judge"] == [(model, 0.5) for model in judges]


def test_an_answer_of_which_only_a_total_was_logged_has_failed(tmp_path: Path) -> None:
    _, run = imported(tmp_path, FIRST + llm(5, "a", step=1) + line(10, "a", ANSWER))
    log = open_run(run)
    (row,) = (row for row in tool_table(log) if row.name == "answer")
    assert (row.calls, row.errors, row.mean_s) == (1, 1, None)
    assert [(use.tool, use.model, use.errors) for use in usage(log).rows if use.tool == "answer"] == [
        ("answer", "gpt-5", 1)
    ]
    # Such logs tell no prices: nothing is said of costs, rather than that there were none.
    assert row.cost_usd is None and {use.cost_usd for use in usage(log).rows} == {None}


def test_program_times_and_a_reply_that_was_no_reply(tmp_path: Path) -> None:
    code = (
        "type=tool_call tool=enhance_reasoning model=Coder duration_ms=4000.00 llm_ms=3000.00 exec_ms=900.00"
    )
    log = (
        FIRST + llm(1, "a", "error=string_response", step=None) + llm(3, "a", step=None) + line(8, "a", code)
    )
    _, run = imported(tmp_path, log)
    rows = calls_of(run, "kind", "status", "turn", "error", "duration_s")
    assert ("model_call", "error", 0, "string_response", 1.0) in rows
    assert ("turn", "invalid", 0, "no tool call that could be run", 1.0) in rows
    assert ("code", "ok", 1, "", 0.9) in rows and ("turn", "ok", 1, "", 6.0) in rows


def test_outcomes_come_from_the_results_whatever_their_files_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    result_file(folder, "a", correct=True)
    result_file(folder, "b", correct=False, all_tool_responses={}).rename(folder / "c.json")
    failing = {"turn_0_response": [{"tool": "search", "tool_error": "KeyError('x')"}]}
    result_file(folder, "f", status="error", error_type="KeyError", correct=False, all_tool_responses=failing)
    (folder / "torn.json").write_text('{"id": "g", "correct": tr')
    old = result_file(folder, "old", id="a", correct=False)
    os.utime(old, (1.0, 1.0))
    log = FIRST + llm(2, "a") + line(4, "a", f"{ANSWER} duration_total_ms=2000.00") + llm(5, "g")
    made, run = imported(tmp_path, log, folder)
    assert (made.results, made.tasks, made.double_results, made.unreadable_results) == (
        3,
        4,
        1,
        ["torn.json"],
    )
    found = summarise(open_run(run))
    account = found.accounting
    assert (account.planned, account.ok, account.limited, account.failed, account.pending) == (4, 1, 1, 1, 1)
    assert (account.correct, found.failures, found.state) == (1, {"infrastructure": 1}, "not ended")
    assert (
        found.facts["protocol"] == "toolorchestra"
        and found.facts["orchestrator"] == "/models/Orchestrator 8B"
    )
    rows = {row["task_id"]: row for row in events.results(run).to_pylist()}
    assert rows["a"]["rollout_key"] == Task("a", "question a", "42").rollout_key
    assert rows["a"]["duration_s"] == pytest.approx(3.0) and rows["a"]["verdict_method"] == "exact"
    assert rows["f"]["error"] == "KeyError: KeyError('x')"


def test_how_a_verdict_came_is_told_where_it_can_be_known(tmp_path: Path) -> None:
    def answered(name: str, pred: str, reference: str, **more: Any) -> None:
        turns = {"turn_0_response": [{"tool": "answer", "pred": pred, **more}]}
        result_file(tmp_path, name, answer=reference, all_tool_responses=turns)

    answered("exact", " Forty-Two", "forty-two ")
    answered("judge", "forty two", "42")
    answered("empty", " ", "42")
    answered("timed", "42", "", _judge_ms=5.0)
    answered("unknown", "42", "")
    found = {name: result.method for name, result in read_results(tmp_path).by_id.items()}
    assert found == {"exact": "exact", "judge": "judge", "empty": "empty", "timed": "judge", "unknown": ""}


def test_each_start_is_a_segment_and_a_task_of_two_is_in_both(tmp_path: Path) -> None:
    again = FIRST.replace("10:00:00", "10:00:30")
    made, run = imported(tmp_path, llm(0, "z") + FIRST + llm(2, "a") + again + llm(40, "a"))
    assert made.segments == 3
    rows = calls_of(run, "epoch", "kind", "task_id")
    assert [row for row in rows if row[1] == "model_call"] == [
        (1, "model_call", "z"),
        (2, "model_call", "a"),
        (3, "model_call", "a"),
    ]
    assert summarise(open_run(run)).totals.epochs == 3


def test_a_line_without_its_task_is_known_by_its_number(tmp_path: Path) -> None:
    result_file(tmp_path / "results", "a")
    lost = llm(2, "global") + llm(3, "global").replace("eid=3", "eid=9")
    made, run = imported(tmp_path, FIRST + lost, tmp_path / "results")
    assert made.nameless_lines == 1
    assert ("model_call", "a") in calls_of(run, "kind", "task_id")
    assert summarise(open_run(run)).state == "ended"


def test_what_is_torn_or_of_somebody_else_is_counted_and_left_out(tmp_path: Path) -> None:
    whole = llm(2, "a")
    glued = whole[:70] + llm(3, "b")
    garbage = "Traceback (most recent call last):\n\n\x00\x01\xff k=v\n[INFO] 2026-99-99 nothing\n"
    made, run = imported(tmp_path, FIRST + glued + garbage + whole + llm(4, "c")[:-9])
    assert (made.torn_lines, made.foreign_lines) == (2, 3)
    assert {row[0] for row in calls_of(run, "task_id")} == {"", "a", "b"}
    assert "2 torn lines, 3 lines of something else" in made.line()


def test_a_folder_is_read_in_order_of_time_and_a_copied_line_counts_once(tmp_path: Path) -> None:
    late, early = FIRST.replace("10:00:00", "10:00:50"), FIRST + llm(2, "a")
    (tmp_path / "hle_1.log").write_text(late)
    (tmp_path / "hle_2.log").write_text(early)
    (tmp_path / "hle_3.log").write_text(early + early)
    (tmp_path / "other.log").write_text(llm(2, "x"))
    found = read_logs(tmp_path)
    assert [event.kind for event in found.lines()] == ["run_start", "llm_call", "run_start"]
    assert found.doubles == 4 and [path.name for path in found.files] == [
        "hle_2.log",
        "hle_3.log",
        "hle_1.log",
    ]


def test_a_cut_line_never_raises() -> None:
    text = line(5, "a b", f"type=tool_call step=0 {SEARCH} search_local_hits=2 search_tavily_hits=5")
    (whole,) = parse(text, Reading([]))
    assert (whole.task, whole.seconds("duration_ms"), whole.count("search_tavily_hits")) == ("a b", 3.0, 5)
    read = [event for cut in range(len(text)) for event in parse(text[:cut] + text[cut + 3 :], Reading([]))]
    assert 50 < len(read) < len(text)
    assert {event.count("search_local_hits") for event in read} <= {None, 2}


def test_an_unusable_place_is_one_line_and_a_log_without_a_task_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hle.log").write_text("")
    for arguments in (
        ["nowhere.log"],
        ["empty"],
        ["hle.log", "--results", str(tmp_path / "empty")],
        ["hle.log", "--out", str(tmp_path)],
    ):
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "new")]
        words = ["import-seed", str(tmp_path / arguments[0]), *arguments[1:], *out]
        outcome = CliRunner().invoke(app, words)
        assert (outcome.exit_code, len(outcome.stderr.splitlines())) == (2, 1), outcome.output
        assert "expected" in outcome.stderr
    outcome = CliRunner().invoke(
        app, ["import-seed", str(tmp_path / "hle.log"), "--out", str(tmp_path / "run")]
    )
    assert outcome.stdout.startswith("0 events and 0 results of 0 tasks from 1 logs, 0 run segments\n")
    assert "empty" in CliRunner().invoke(app, ["summary", str(tmp_path / "run")]).stdout
    with pytest.raises(RunDirError, match="there is something already"):
        import_run(tmp_path / "hle.log", None, tmp_path / "run")
