"""The story of a task: what is told of it, in which order, and which task is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.story import pieces_of, story_of
from analysis.story_page import story_lines
from ray_app.errors import UserError
from ray_app.event_writer import EventWriter
from ray_app.journal import CHAT, CODE, RETRIEVAL
from ray_app.records import ChatReply, ExecutionResult, Hit, Retrieval, ToolCall, Usage
from tests.analysis.runs import Teller, model_call, result, write_run

TASK = "hle/7"
CHOICE = ChatReply("", (ToolCall("c1", "search", '{"model": "search-1"}'),), model="orch", queue_s=0.25)
QUERY = ChatReply(
    "I think <query>ice age</query>", model="gpt", usage=Usage(1200, 34), cost_usd=0.5, retries=2
)
PROGRAM = ChatReply("```python\nprint(1)\n```", model="coder")
HITS = Retrieval(
    tuple(Hit(n, f"text {n}\nsecond line", 0.9 - n / 100) for n in range(7)), web_error="web is down"
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that died in its second turn, went on in another epoch and was answered there."""
    path = tmp_path_factory.mktemp("story") / "run"
    log = EventWriter(path, "w")

    teller = Teller(log, TASK)
    call, note = teller.call, teller.note
    note("attempt", 0)
    call(CHAT, CHOICE, 1, turn=0, role="orchestrator", prefill_s=0.5)
    call(CHAT, QUERY, 2, turn=0, role="expert", tool="search", alias="search-1", endpoint="http://e/v1")
    call(RETRIEVAL, HITS, 3, turn=0, tool="search", duration_s=0.75)
    note("tool_call", 1.9, turn=0, tool="search", alias="search-1", model="gpt", duration_s=2.0)
    note("turn", 0.9, turn=0, duration_s=3.0)
    call(CHAT, ChatReply("no tool"), 5, turn=1, role="orchestrator")
    note("turn", 4.9, turn=1, status="invalid", error="no tool was called")
    second: dict[str, Any] = {"epoch": 2, "attempt": 2}
    note("attempt", 100, **second)
    note("turn", 100.1, turn=0, is_replayed=True, **second)
    call(CHAT, PROGRAM, 101, turn=2, role="expert", tool="enhance_reasoning", **second)
    failed = ExecutionResult("", "Boom\x1b[2J\n" * 9, 1, False, 0.1)
    call(CODE, failed, 102, turn=2, tool="enhance_reasoning", **second)
    log.append(
        model_call(
            "expert",
            at_s=103,
            task=TASK,
            turn=2,
            status="error",
            error="429",
            error_kind="infrastructure",
            **second,
        )
    )
    body = log.payload(json.dumps({"prediction": "42", "verdict": {"reasoning": "it is"}}))
    log.append(
        result(TASK, "ok", True, at_s=104, turn=3, payload_hash=body, verdict_method="judge", **second)
    )
    log.append(model_call("orchestrator", task="hle/77", turn=0))
    log.append(model_call("orchestrator", task="math", turn=0, trial=1))
    log.close()
    return path


def told(run_dir: Path, asked: str, **options: Any) -> str:
    return "\n".join(line.plain for line in story_lines(story_of(run_dir, asked), **options))


def test_each_call_is_told_with_its_place_times_cost_and_output(run_dir: Path) -> None:
    text = told(run_dir, TASK)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0].startswith("hle/7   Math, exactMatch   rollout rollout-hle/")
    assert "+1.00 s  orchestrator orch   0 s (queue 0.25 s, prefill 0.5 s, decode 0 s)   0 + 0 tokens" in text
    assert 'chose: search {"model": "search-1"}' in lines
    assert "expert gpt at http://e/v1" in text and "1,200 + 34 tokens   $0.50   2 retries" in text
    assert "query: ice age" in lines and not any(line.startswith("reply: I think") for line in lines)
    assert "retrieval   0.75 s   7 local and 0 web hits (local_only)" in text
    assert "hit 1 (local, document 0, 0.900): text 0 ... (12 more characters)" in lines
    assert "and 2 more hits" in lines and "web: web is down" in lines
    assert "turn 1   0 s   INVALID: no tool was called" in lines
    assert "infrastructure: 429" in lines
    assert lines[-2:] == ["prediction: 42", "reasoning: it is"] and "verdict method judge   ok right" in text


def test_attempts_come_in_order_and_what_was_replayed_is_marked(run_dir: Path) -> None:
    text = told(run_dir, TASK)
    places = [text.index(part) for part in ("attempt 1, epoch 1", "no tool", "attempt 2, epoch 2", "Boom")]
    assert places == sorted(places)
    assert "turn 0   0 s   served again from the record of an earlier attempt" in text
    assert "turn 2   (no end in the log)" in text


def test_texts_are_printable_and_cut_unless_they_are_asked_for_whole(run_dir: Path) -> None:
    short, whole = told(run_dir, TASK), told(run_dir, TASK, whole=True)
    assert "\x1b" not in whole and short.count("Boom") == 6 and whole.count("Boom") == 9
    assert "hit 7 (local" in whole and "second line" in whole and "reply: I think" in whole
    assert "program: print(1)" in short and "reply: ```" not in short and "exit status 1" in short


def test_a_task_is_meant_by_its_id_or_by_the_only_beginning(run_dir: Path) -> None:
    assert [story_of(run_dir, asked).task_id for asked in (TASK, "m", "rollout-m")] == [TASK, "math", "math"]
    for asked, reason in [("hle", "could be hle/7, hle/77"), ("../x", "no task '../x'"), ("", "no task")]:
        with pytest.raises(UserError, match=f"{reason}.*expected"):
            story_of(run_dir, asked)
    with pytest.raises(UserError, match=r"no trial 0; expected one of \[1\]"):
        story_of(run_dir, "math", trial=0)


def test_a_payload_that_is_lost_or_torn_is_no_error(tmp_path: Path) -> None:
    log = EventWriter(tmp_path, "w")
    torn = log.payload('{"content": ')
    log.append(model_call("expert", tool="search", turn=0, payload_hash=torn))
    log.append(model_call("judge", turn=0, payload_hash="0" * 32))
    log.close()
    first, second = story_of(tmp_path, "a").attempts[0].turns[0].steps
    assert [piece.name for piece in first.pieces] == ["payload"] and second.pieces == ()
    with pytest.raises(UserError, match="its log has 0 tasks"):
        story_of(write_run(tmp_path / "empty", []), "a")


def test_a_dialogue_tells_what_its_tools_gave_how_it_ended_and_what_its_reward_is_made_of() -> None:
    def told(kind: str, value: Any) -> dict[str, str]:
        return {piece.name: piece.text for piece in pieces_of(kind, "", "find", json.dumps(value))}

    assert told("tool_call", {"text": "Wi-Fi is on.", "is_error": False}) == {"result": "Wi-Fi is on."}
    assert told("tool_call", {"text": "No such seat", "is_error": True}) == {"error": "No such seat"}
    reward = {
        **{"reward": 0.0, "reward_breakdown": {"DB": 0.0, "COMMUNICATE": 1.0}, "db_check": None},
        "nl_assertions": [{"nl_assertion": "It is polite", "met": False, "justification": "It shouts"}],
    }
    simulation = {"termination_reason": "user_stop", "reward_info": reward, "messages": ["said above"]}
    assert told("simulation", simulation) == {
        "ended": "user_stop",
        "reward": "0, the product of DB 0, COMMUNICATE 1",
        "nl assertion": 'missed {"nl_assertion": "It is polite", "justification": "It shouts"}',
    }
    why = json.dumps({"reason": "max_steps", "parts": {"DB": 1.0}, "note": ""})
    verdict = {"method": "reward", "reasoning": why}
    assert told("result", {"prediction": "", "verdict": verdict}) == {
        "ended": "max_steps",
        "reward of": "DB 1",
    }
    assert told("simulation", {"termination_reason": "error", "reward_info": None}) == {"ended": "error"}
    assert "payload" in told("simulation", {"other": 1})
