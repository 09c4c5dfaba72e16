"""One task from dialogue to reward, through the journal: events, experts, limits, judges, resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.tau2 import app
from ray_app.chat import ChatRequest
from ray_app.config import load
from ray_app.errors import ConfigError, EndpointError, LimitReached
from ray_app.records import ChatReply, ToolCall, Usage
from ray_app.tau2.config import Tau2Config, trial_seed
from ray_app.tau2.dialogue import exchanges
from ray_app.tau2.run import read_tasks, spec_of
from ray_app.tau2.service_desk.domain import NAME
from ray_app.tau2.tasks import entries_of
from tests.stand_ins import MemoryLog, journal
from tests.tau2.desk import DESK, RAW, BaselineModel, config, solver, task

EXPERTS = {"experts": {"expert-1": {"model": "e", "blurb": "the best", "latency_s": 9}}}
JUDGED = RAW["unlock_password"]["evaluation_criteria"] | {
    "nl_assertions": ["The agent says what it has done."],
    "reward_basis": ["DB", "NL_ASSERTION"],
}


def simulation_in(log: MemoryLog) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(log.bodies[log.of("simulation")[-1].payload_hash])
    return found


def asks_expert(choice: str = "expert-1") -> Callable[[ChatRequest], ChatReply | None]:
    """The agent hands each of its turns to `choice`; the expert itself speaks as the baseline."""

    def instead(request: ChatRequest) -> ChatReply | None:
        if not any(tool["function"]["name"] == "call_expert" for tool in request.tools):
            return None
        call = ToolCall("x", "call_expert", json.dumps({"expert": choice}))
        return ChatReply("", (call,), "tool_calls", Usage(10, 1), model="m", cost_usd=0.5)

    return instead


@pytest.mark.parametrize(("is_solo", "least", "end"), [(False, 12, "user_stop"), (True, 8, "agent_stop")])
async def test_the_baseline_solves_much_of_the_service_desk_and_not_all(
    is_solo: bool, least: int, end: str
) -> None:
    """Alone it can tell nobody what some tasks want told."""
    own = solver(BaselineModel(), config(solo=is_solo))
    ended = [await own.solve(task(name), journal(task(name), MemoryLog())) for name in RAW]
    right = sum(solved.verdict is not None and solved.verdict.is_correct for solved in ended)
    assert least <= right < len(RAW) and {solved.prediction for solved in ended} == {end}


async def test_each_call_turn_and_tool_is_an_event_and_the_simulation_is_kept() -> None:
    log = MemoryLog()
    solved = await solver(BaselineModel()).solve(task("vpn_start"), journal(task("vpn_start"), log))
    assert solved.verdict is not None and solved.verdict.is_correct and solved.prediction == "user_stop"
    roles = [event.role for event in log.of("model_call")]
    assert set(roles) == {"orchestrator", "user"}
    assert [event.detail for event in log.of("turn")] == [
        {"orchestrator": "agent"}.get(role, role) for role in roles
    ]
    assert [(event.tool, event.alias) for event in log.of("tool_call")][:2] == [
        ("find_employee", "agent"),
        ("turn_wifi_on", "user"),
    ]
    (verdict,) = log.of("verdict")
    assert (verdict.is_correct, verdict.verdict_method) == (True, "reward")
    assert json.loads(verdict.detail)["parts"] == {"ENV_ASSERTION": 1.0}
    kept = simulation_in(log)
    assert kept["termination_reason"] == "user_stop"
    assert kept["reward_info"] == {
        "reward": 1.0,
        "reward_basis": ["ENV_ASSERTION"],
        "reward_breakdown": {"ENV_ASSERTION": 1.0},
    }
    assert kept["agent_cost"] == 0.25 * roles.count("orchestrator")


@pytest.mark.parametrize("calls", [0, 1, 4, 9])
async def test_a_dialogue_resumes_in_its_middle_and_repeats_no_call(calls: int) -> None:
    log, again, model = MemoryLog(), MemoryLog(), BaselineModel()
    whole = await solver(BaselineModel()).solve(task("vpn_outdated"), journal(task("vpn_outdated"), log))
    resumed = journal(task("vpn_outdated"), again, log.record(calls))
    assert await solver(model).solve(task("vpn_outdated"), resumed) == whole
    made = [event for event in log.events if event.call_seq >= 0]
    assert len(model.asked) == sum(event.kind == "model_call" for event in made[calls:])
    assert simulation_in(again)["info"] == simulation_in(log)["info"]  # the state's hash among it


async def test_an_experts_turn_is_in_the_dialogue_with_its_own_event_tokens_and_cost() -> None:
    log, model = MemoryLog(), BaselineModel(asks_expert())
    solved = await solver(model, config(**EXPERTS)).solve(
        task("unlock_password"), journal(task("unlock_password"), log)
    )
    assert solved.verdict is not None and solved.verdict.is_correct
    asked = next(request for request in model.asked if request.model == "m" and request.tools)
    schema = next(tool for tool in asked.tools if tool["function"]["name"] == "call_expert")
    told = schema["function"]["parameters"]["properties"]["expert"]
    assert told["enum"] == ["expert-1"]
    assert "expert-1: the best; $10 in, $20 out per million tokens, about 9 s." in told["description"]
    expert = next(request for request in model.asked if request.model == "e")
    assert "call_expert" not in str(expert.tools) + expert.messages[0].content
    assert expert.messages[1:] == asked.messages[1:]
    turns = [event for event in log.of("tool_call") if event.tool == "call_expert"]
    calls = [event for event in log.of("model_call") if event.role == "expert"]
    assert len(turns) == len(calls) > 0
    assert {(event.alias, event.model) for event in turns} == {("expert-1", "e")}
    assert all(event.tool == "call_expert" and event.cost_usd == 0.25 for event in calls)
    said = [m for m in simulation_in(log)["messages"] if m["role"] == "assistant" and m["raw_data"]]
    assert said[0]["cost"] == 0.75
    assert [call["role"] for call in said[0]["raw_data"]["calls"]] == ["orchestrator", "expert"]
    assert said[0]["raw_data"]["calls"][1]["alias"] == "expert-1"
    assert not any(
        call.name == "call_expert" for call, _ in exchanges(entries_of(simulation_in(log)["messages"]))
    )


async def test_an_expert_that_fails_fails_the_attempt_and_is_no_end_of_the_dialogue() -> None:
    def instead(request: ChatRequest) -> ChatReply | Exception | None:
        return EndpointError("endpoint e: down") if request.model == "e" else asks_expert()(request)

    log = MemoryLog()
    with pytest.raises(EndpointError, match="endpoint e: down"):
        await solver(BaselineModel(instead), config(**EXPERTS)).solve(
            task("unlock_password"), journal(task("unlock_password"), log)
        )
    (turn,) = (event for event in log.of("tool_call") if event.tool == "call_expert")
    assert (turn.status, turn.error_kind, turn.alias) == ("error", "infrastructure", "expert-1")
    assert log.of("verdict") == log.of("simulation") == []


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (ChatReply("  "), "the reply is empty"),
        (
            ChatReply("", (ToolCall("x", "find_employee", "[1"),)),
            "arguments of find_employee are no JSON",
        ),
        (
            ChatReply("", (ToolCall("x", "call_expert", '{"expert": "who"}'),)),
            "needs one of expert-1",
        ),
    ],
)
async def test_a_reply_that_is_no_message_is_asked_for_again_and_then_ends_it(
    reply: ChatReply, told: str
) -> None:
    def instead(request: ChatRequest, times: int) -> ChatReply | None:
        is_agent = request.messages[0].content.startswith("You are an agent")
        refused = sum("could not be used" in message.content for message in request.messages)
        return reply if is_agent and refused < times else None

    once = BaselineModel(lambda request: instead(request, 1))
    log = MemoryLog()
    await solver(once, config(**EXPERTS)).solve(
        task("unlock_password"), journal(task("unlock_password"), log)
    )
    assert simulation_in(log)["termination_reason"] == "user_stop"
    assert any(told in request.messages[-1].content for request in once.asked)
    always = BaselineModel(lambda request: instead(request, 9))
    log = MemoryLog()
    solved = await solver(always, config(**EXPERTS)).solve(
        task("unlock_password"), journal(task("unlock_password"), log)
    )
    assert solved.verdict is not None and not solved.verdict.is_correct
    assert solved.prediction == "agent_error" and told in str(simulation_in(log)["info"])
    assert len([event for event in log.of("model_call") if event.status == "error"]) == 3


async def test_a_judge_that_fails_leaves_the_reward_owed_and_is_asked_alone_on_resume() -> None:
    judged = task("unlock_password", evaluation_criteria=JUDGED)
    replies = {"bad": ChatReply("It was fine."), "good": ChatReply('{"1": true}')}

    def judging(name: str) -> BaselineModel:
        return BaselineModel(lambda r: replies[name] if "<statements>" in r.messages[-1].content else None)

    log, model = MemoryLog(), judging("good")
    owed = await solver(judging("bad")).solve(judged, journal(judged, log))
    assert owed.verdict is None and "expected a JSON object with true or false" in owed.owed
    assert simulation_in(log)["reward_info"] is None
    settled = await solver(model).solve(judged, journal(judged, MemoryLog(), log.record()))
    assert settled.verdict is not None and settled.verdict.is_correct and settled.verdict.judge_model == "m"
    assert len(model.asked) == 1


@pytest.mark.parametrize(
    ("limits", "line", "reason"),
    [
        ({"max_steps": 3}, r"3 steps \(limits.max_steps is 3\)", "max_steps"),
        ({"cost_usd": 0.6}, r"\$0.7500 spent \(limits.cost_usd is \$0.6\)", "timeout"),
        ({"tokens": 10}, r"\d+ tokens used \(limits.tokens is 10\)", "timeout"),
    ],
)
async def test_a_limit_is_an_outcome_of_its_own_and_the_dialogue_so_far_is_kept(
    limits: dict[str, float], line: str, reason: str
) -> None:
    log = MemoryLog()
    with pytest.raises(LimitReached, match=line):
        await solver(BaselineModel(), config(limits=limits)).solve(
            task("unlock_password"), journal(task("unlock_password"), log)
        )
    kept = simulation_in(log)
    assert (kept["termination_reason"], log.of("verdict")) == (reason, [])
    assert kept["reward_info"]["reward"] == 0.0


async def test_an_agent_alone_ends_by_a_tool_of_its_own() -> None:
    def instead(request: ChatRequest) -> ChatReply | None:
        assert request.messages[0].role == "system" and "Ines Falk" in request.messages[0].content
        done = {message.tool_call_id for message in request.messages}
        steps = {"a": ("unlock_account", {"employee_id": "E101"}), "b": ("done", {})}
        key = "b" if "a" in done else "a"
        name, arguments = steps[key]
        return ChatReply("", (ToolCall(key, name, json.dumps(arguments)),))

    log = MemoryLog()
    solved = await solver(BaselineModel(instead), config(solo=True)).solve(
        task("unlock_password"), journal(task("unlock_password"), log)
    )
    assert solved.prediction == "agent_stop"
    assert solved.verdict is not None and solved.verdict.is_correct


def test_a_corrected_criterion_is_judged_again_and_changes_no_rollout() -> None:
    mine, corrected = task("unlock_password"), task("unlock_password", evaluation_criteria=JUDGED)
    assert mine.rollout_key == corrected.rollout_key and mine.judge_key != corrected.judge_key
    assert task("unlock_password", ticket="another").rollout_key != mine.rollout_key
    assert spec_of(corrected).model_dump()["evaluation_criteria"]["nl_assertions"] == JUDGED["nl_assertions"]


def test_tasks_of_several_domains_take_turns() -> None:
    both = config(domains=["one", "two"], limit=3)
    data = read_tasks(both, {"one": DESK, "two": DESK})
    assert [each.category for each in data.tasks] == ["one", "two"] * 3


def test_trials_have_tau2s_seeds() -> None:
    assert [trial_seed(300, trial) for trial in range(2)] == [626729, 373753]
    assert trial_seed(None, 1) is None


def test_the_configs_are_valid() -> None:
    folder = Path(__file__).parents[2] / "configs"
    sample = load(folder / "tau2_sample.yaml", environ={}, kind=Tau2Config)
    assert sample.domains == (NAME,) and sample.models_used() == ["baseline"]
    full = load(folder / "tau2_full.yaml", environ={}, kind=Tau2Config)
    assert (full.concurrency, full.limits.max_steps, len(full.domains)) == (48, 200, 3)
    assert sorted(full.routes()) == [
        *(f"experts.expert-{n}" for n in (1, 2, 3)),
        *("judge", "orchestrator", "user"),
    ]
    assert full.key_names() == ["OPENAI_API_KEY"]
    with pytest.raises(ConfigError, match=r"unknown key 'limits.max_round'; did you mean"):
        load(folder / "tau2_sample.yaml", ["limits.max_round=3"], {}, kind=Tau2Config)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--domain", "nowhere"], "tau2-bench is not here|domain 'nowhere': no such domain"),
        (["--set", "split=odd"], "split 'odd': service_desk has base, train, test"),
        (["--set", "domains=[service_desk, service_desk]"], "domains: expected each domain once"),
        (["--set", "user.model=gpt"], "user.model: unknown model 'gpt'; models has baseline"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    from typer.testing import CliRunner

    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path))
    result = CliRunner().invoke(app, [*arguments, "--plan"])
    assert result.exit_code == 2
    assert re.search(line, result.output), result.output
    assert len(result.output.strip().splitlines()) == 1
