from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine import session
from benchmarks.gold_model import Script, gold_serving, judged, mark, next_message
from benchmarks.tau2_load import BUILT_IN, Work, ideal_s, read_load, works
from benchmarks.tau2_runs import run_ours

SCRIPT = Script(
    [("assistant", "find", {"n": 1}), ("user", "press", {}), ("assistant", "fix", {})], ["all is well"]
)


def work(calls: int, prepare_s: float = 0.0, reward_s: float = 0.0, talk_s: float = 0.0) -> Work:
    return Work("d", calls, prepare_s, talk_s, reward_s, 1.0)


@pytest.mark.parametrize(
    ("load", "slots", "cores", "expected"),
    [
        ([work(4)] * 4, 2, 2, 4.0),  # calls alone: two after each other on each slot
        ([work(2, 1.0)] * 4, 4, 4, 2.0),  # as many cores as simulations
        ([work(2, 1.0)] * 4, 4, 1, 5.0),  # one core: the last one begins to call after 4 s
        ([work(2, 1.0)] * 4, 4, 2, 3.0),
        ([work(2, reward_s=3.0)] * 2, 2, 1, 7.0),
        ([work(2, 1.0, 1.0, talk_s=1.0)], 9, 2, 4.0),
        ([work(6), work(2), work(2)], 2, 2, 3.0),
        ([work(2), work(2), work(6)], 2, 2, 4.0),  # the order is the run's
        ([], 3, 2, 0.0),
    ],
)
def test_the_ideal_is_list_scheduling_of_calls_on_slots_and_of_work_on_cores(
    load: list[Work], slots: int, cores: int, expected: float
) -> None:
    assert ideal_s(load, 0.5, slots, cores) == pytest.approx(expected)


def test_the_gold_model_needs_no_memory_but_the_dialogue() -> None:
    def body(*texts: str, answers: int = 0) -> bytes:
        messages = [{"content": text} for text in texts] + [{"tool_call_id": str(n)} for n in range(answers)]
        return json.dumps({"messages": messages, "tools": []}).encode()

    def said(side: str, request: bytes) -> str:
        message = next_message([Script([]), SCRIPT], side, request)
        return str(message["content"] or message["tool_calls"][0]["function"]["name"])

    start = body(f"persona {mark(1)}")
    assert said("user", start) == f"Please go on. {mark(1)}"
    handed = body("policy", said("user", start))
    assert said("assistant", handed) == "find" == said("assistant", handed)
    over = said("assistant", body("policy", said("user", start), answers=1))
    assert over == f"Please go on. {mark(1, 1)}"
    assert said("user", body(mark(1), over)) == "press"
    back = said("user", body(mark(1), over, answers=1))
    assert said("assistant", body("policy", over, back)) == "fix"
    end = said("assistant", body("policy", back, answers=1))
    assert "all is well" in end and mark(1, 4) in end
    assert said("user", body(mark(1), end)) == "###STOP###"
    with pytest.raises(ValueError, match="without a marker"):
        said("user", body("nobody"))
    assert json.loads(judged()["content"])["1"] is True


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_each_simulation_of_a_run_over_http_is_its_tasks_gold_replay(tmp_path: Path) -> None:
    load = replace(read_load(BUILT_IN), trials=2)
    own = works(load)
    assert {each.reward for each in own} == {1.0} and all(each.calls > 2 for each in own)
    with gold_serving(load.scripts(), 0.1, tmp_path) as server, session():
        ran = run_ours(load, tmp_path / "run", server.url, 16, 2, {server.pid})
    assert (ran.solved, ran.calls) == (40, 2 * sum(each.calls for each in own))
    assert 0.1 < ideal_s(own * 2, 0.1, 16) / ran.makespan_s < 1.05
    assert ran.cpu_s > 0
