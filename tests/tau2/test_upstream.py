"""tau2-bench itself beside ours: the same dialogues, message for message, and the same rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_app.chat import ChatRequest, as_openai
from ray_app.errors import ConfigError, JudgeError
from ray_app.records import ChatReply, ToolCall
from ray_app.tau2 import upstream
from ray_app.tau2.domain import Schema
from ray_app.tau2.evaluate import evaluate
from ray_app.tau2.export import results_json
from ray_app.tau2.gold import GoldScript
from ray_app.tau2.loop import Rules
from ray_app.tau2.results import simulation_json
from ray_app.tau2.run import make_solver, task_of
from ray_app.tau2.service_desk.domain import ServiceDesk
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.tasks import Action, TaskSpec
from ray_app.tau2.upstream import UpstreamDomain, UpstreamEnvironment
from tests.stand_ins import MemoryLog, journal
from tests.tau2.desk import config
from tests.tau2.official import Asked, official_requests
from tests.tau2.replays import PROMPTS, content, replayed
from tests.tau2.upstream_marks import UPSTREAM

pytestmark = UPSTREAM

# (domain, tasks of its base split, those that their gold actions solve)
DOMAINS = [("mock", 10, 8), ("telecom", 114, 114), ("retail", 114, 114), ("airline", 50, 50)]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    upstream.is_installed()
    upstream.freeze()


@pytest.mark.parametrize(("name", "count", "solved"), DOMAINS)
async def test_gold_replays_are_tau2s_own_dialogues_and_rewards(name: str, count: int, solved: int) -> None:
    domain = UpstreamDomain(name)
    specs = [TaskSpec.model_validate(task) for task in domain.tasks("base")]
    rewards = []
    for spec in specs:
        ours = await replayed(domain, spec, GoldScript.of(spec))
        official = upstream.run_official(domain, spec, GoldScript.of(spec), Rules())
        assert (ours.reason, content(ours.entries)) == (official.reason, content(official.entries)), spec.id
        rewards.append(_reward(domain, spec, ours, met=True))
    assert (len(specs), sum(rewards)) == (count, solved)


@pytest.mark.parametrize("name", [name for name, *_ in DOMAINS[1:]])
async def test_a_corrupted_replay_is_worth_nothing_to_both(name: str) -> None:
    domain = UpstreamDomain(name)
    for spec in [TaskSpec.model_validate(task) for task in domain.tasks("base")]:
        simulation = await replayed(domain, spec, _corrupted(domain, spec))
        assert _reward(domain, spec, simulation, met=True) == 0.0, spec.id


@pytest.mark.parametrize(("name", "place"), [("telecom", 0), ("telecom", 40), ("retail", 0), ("mock", 4)])
async def test_models_are_asked_what_tau2_asks_them(
    name: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = UpstreamDomain(name)
    raw = domain.tasks("base")[place]
    spec = TaskSpec.model_validate(raw)
    theirs = official_requests(domain, spec, GoldScript.of(spec), monkeypatch)
    ours = Asked(GoldScript.of(spec))

    class Scripted:
        async def complete(self, request: ChatRequest) -> ChatReply:
            ours.add([as_openai(message) for message in request.messages], list(request.tools))
            is_user = "<scenario>" in request.messages[0].content
            said = ours.script.next("user" if is_user else "assistant")
            calls = [ToolCall(c.call_id, c.name, json.dumps(dict(c.arguments))) for c in said.calls]
            return ChatReply(said.text, tuple(calls))

    task, settings = task_of(name, raw), config(domains=[name])
    solver = make_solver(settings, PROMPTS, Scripted(), {name: domain})
    dialogue = await solver.dialogue(spec, domain, journal(task, MemoryLog()))
    await dialogue.run(name)
    assert len(ours.requests) > 3
    assert ours.requests == theirs.requests


@pytest.mark.parametrize("name", ["airline", "retail"])
def test_each_environment_has_the_data_of_the_file_and_shares_no_change(name: str) -> None:
    domain = UpstreamDomain(name)
    one, other = domain.environment(), domain.environment()
    assert isinstance(one, UpstreamEnvironment) and isinstance(other, UpstreamEnvironment)
    read = json.loads(Path(upstream.data_folder() or "", "tau2", "domains", name, "db.json").read_text())
    kind, begun = type(one.inner.tools.db), other.fingerprint()
    assert any(key[0] is kind and copy is not None for key, copy in upstream._COPIERS.items())
    assert kind.model_validate(read).get_hash() == one.inner.get_db_hash()
    one.perform(_unwanted(name, one.inner.tools.db))
    assert one.fingerprint() != begun
    assert begun == other.fingerprint() == domain.environment().fingerprint()


async def test_what_the_judge_denies_is_worth_nothing_to_both() -> None:
    domain = UpstreamDomain("retail")
    specs = [TaskSpec.model_validate(task) for task in domain.tasks("base")]
    spec = next(s for s in specs if s.evaluation_criteria and s.evaluation_criteria.nl_assertions)
    simulation = await replayed(domain, spec, GoldScript.of(spec))
    asked = domain.questions(spec, simulation)
    assert [message.role for message in asked] == ["system", "user"]
    assert all(text in asked[1].content for text in _assertions(spec)[:1])
    assert _reward(domain, spec, simulation, met=False) == 0.0


@pytest.mark.parametrize("rules", [Rules(max_steps=3), Rules(max_errors=2)])
async def test_limits_end_a_dialogue_where_tau2_ends_it(rules: Rules) -> None:
    domain = UpstreamDomain("mock")
    spec = TaskSpec.model_validate(domain.tasks("base")[0])
    wrong = [Action(name="create_task", arguments={"nobody": n}) for n in range(4)]
    ours = await replayed(domain, spec, GoldScript(wrong), rules=rules)
    official = upstream.run_official(domain, spec, GoldScript(wrong), rules)
    assert (ours.reason, content(ours.entries)) == (official.reason, content(official.entries))
    assert ours.reason == ("max_steps" if rules.max_steps == 3 else "too_many_errors")
    assert _reward(domain, spec, ours, met=True) == 0.0


async def test_the_service_desk_loads_into_tau2_and_is_rewarded_alike() -> None:
    upstream.register_service_desk()
    theirs, ours = UpstreamDomain("service_desk"), ServiceDesk(PROMPTS)
    for side in ("assistant", "user"):
        offered = [_shape(each) for each in theirs.environment().schemas(side)]
        assert offered == [_shape(each) for each in ours.environment().schemas(side)]
    for task in theirs.tasks("base"):
        spec = TaskSpec.model_validate(task)
        for script in (GoldScript.of(spec), GoldScript([], ())):
            official = upstream.run_official(theirs, spec, script, Rules())
            script.done, script.is_told = 0, False
            simulation = await replayed(ours, spec, script)
            # The greeting differs, which no criterion looks at.
            assert content(simulation.entries)[1:] == content(official.entries)[1:], spec.id
            assert ours.reward(spec, simulation, "") == _without_record(theirs, ours, spec, simulation)


async def test_tau2_reads_our_results() -> None:
    domain = UpstreamDomain("telecom")
    raw = domain.tasks("base")[0]
    spec = TaskSpec.model_validate(raw)
    simulation = await replayed(domain, spec, GoldScript.of(spec))
    written = simulation_json(simulation, domain.reward(spec, simulation, ""))
    settings = config(domains=["telecom"])
    results = results_json(settings, [task_of("telecom", raw)], "telecom", [written])
    read = upstream.read_results(json.dumps(results))
    (run,) = read.simulations
    assert (run.reward_info.reward, run.termination_reason.value) == (1.0, "user_stop")
    assert [message.turn_idx for message in run.messages] == list(range(len(simulation.entries)))
    assert (read.tasks[0].id, read.info.max_steps) == (raw["id"], 200)


async def test_an_evaluator_that_fails_leaves_the_reward_owed() -> None:
    domain = UpstreamDomain("mock")
    raw = next(raw for raw in domain.tasks("base") if raw["id"] == "create_task_1_with_env_assertions")
    spec = TaskSpec.model_validate(raw)
    nothing_done = await replayed(domain, spec, GoldScript([]))
    with pytest.raises(JudgeError, match=r"tau2's evaluator: ValueError: Task task_2 not found"):
        domain.reward(spec, nothing_done, "")


def test_an_unknown_domain_is_one_line() -> None:
    with pytest.raises(ConfigError, match="'chemistry': no such domain; there are service_desk, airline"):
        UpstreamDomain("chemistry")


def _reward(domain: UpstreamDomain, spec: TaskSpec, simulation: Simulation, *, met: bool) -> float:
    """The official reward, which ours has to be equal to, part for part. `met`: what the judge says."""
    asked = domain.questions(spec, simulation)
    official = domain.reward(spec, simulation, _verdict(spec, met) if asked else "")
    ours = evaluate(domain, spec, simulation, [met] if asked else [])
    assert (ours.value, ours.parts) == (official.value, official.parts), spec.id
    return official.value


def _verdict(spec: TaskSpec, met: bool) -> str:
    results = [
        {"expectedOutcome": text, "metExpectation": met, "reasoning": "a stub"} for text in _assertions(spec)
    ]
    return json.dumps({"results": results})


def _assertions(spec: TaskSpec) -> list[str]:
    assert spec.evaluation_criteria is not None
    return spec.evaluation_criteria.nl_assertions or []


def _corrupted(domain: UpstreamDomain, spec: TaskSpec) -> GoldScript:
    """The gold replay without what changes the data, and with a change that nobody wants.

    In telecom, which asks for calls too, without any.
    """
    script = GoldScript.of(spec)
    if domain.name == "telecom":
        return GoldScript([], script.told)
    environment = domain.environment()
    assert isinstance(environment, UpstreamEnvironment)
    kept = [action for action in script.actions if not environment.mutates(action.name)]
    return GoldScript([*kept, _unwanted(domain.name, environment.inner.tools.db)], script.told)


def _unwanted(name: str, db: Any) -> Action:
    if name == "airline":
        return Action(name="cancel_reservation", arguments={"reservation_id": next(iter(db.reservations))})
    if name == "retail":
        pending = next(key for key, order in db.orders.items() if order.status == "pending")
        arguments = {"order_id": pending, "reason": "no longer needed"}
        return Action(name="cancel_pending_order", arguments=arguments)
    raise AssertionError(f"{name}: no unwanted change is known")


def _shape(schema: Schema) -> tuple[Any, ...]:
    function = schema["function"]
    return function["name"], function["description"], function["parameters"].get("properties")


def _without_record(theirs: UpstreamDomain, ours: ServiceDesk, spec: TaskSpec, simulation: Simulation) -> Any:
    official, own = theirs.reward(spec, simulation, ""), ours.reward(spec, simulation, "")
    assert official.parts == own.parts
    return type(own)(official.value, official.parts, own.note, own.record)
