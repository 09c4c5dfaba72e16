"""The reward: a product over what the task counts, by replaying and by reading the dialogue."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from ray_app.errors import JudgeError
from ray_app.tau2.dialogue import Call
from ray_app.tau2.domain import ReplayError
from ray_app.tau2.evaluate import evaluate, questions, read_judged
from ray_app.tau2.gold import GoldScript
from ray_app.tau2.service_desk.data import Employee
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.tasks import Action, TaskSpec
from tests.tau2.desk import DESK, RAW, spec
from tests.tau2.replays import PROMPTS, replayed


async def gold(task: TaskSpec) -> Simulation:
    return await replayed(DESK, task, GoldScript.of(task))


@pytest.mark.parametrize("name", list(RAW))
async def test_the_gold_calls_of_each_task_are_worth_1_and_without_them_0(name: str) -> None:
    task = spec(name)
    criteria = task.evaluation_criteria
    assert criteria is not None
    assert evaluate(DESK, task, await gold(task)).value == 1.0
    unwanted = Action(name="release_licence", arguments={"employee_id": "E108", "product": "notes"})
    is_only_state = set(criteria.reward_basis) == {"ENV_ASSERTION"}
    corrupted = await replayed(DESK, task, GoldScript([] if is_only_state else [unwanted]))
    assert evaluate(DESK, task, corrupted).value == 0.0


async def test_each_part_counts_only_where_the_task_says_so() -> None:
    task = spec("licence_seats")
    silent = replace(await gold(task), entries=(await gold(task)).entries[:6])
    told = evaluate(DESK, task, silent)
    assert told.parts == {"DB": 1.0, "COMMUNICATE": 0.0} and told.value == 0.0
    criteria = RAW["licence_seats"]["evaluation_criteria"]
    for basis, value in [(["DB"], 1.0), (["DB", "ACTION"], 1.0), (["COMMUNICATE"], 0.0)]:
        other = spec("licence_seats", evaluation_criteria=criteria | {"reward_basis": basis})
        assert evaluate(DESK, other, silent).value == value
    assert evaluate(DESK, spec("licence_seats", evaluation_criteria=None), silent).value == 1.0
    acting = spec("licence_seats", evaluation_criteria=criteria | {"reward_basis": ["ACTION"]})
    half = replace(silent, entries=silent.entries[:4])  # one of its two gold calls
    assert [evaluate(DESK, acting, each).value for each in (silent, half)] == [1.0, 0.0]


@pytest.mark.parametrize("reason", ["max_steps", "timeout", "too_many_errors", "agent_error", "user_error"])
async def test_a_dialogue_that_nobody_ended_is_worth_nothing(reason: str) -> None:
    task = spec("unlock_password")
    reward = evaluate(DESK, task, replace(await gold(task), reason=reason))  # type: ignore[arg-type]
    assert (reward.value, reward.note) == (0.0, f"ended by {reason}")


def test_a_gold_action_is_done_by_a_call_with_equal_arguments_that_count() -> None:
    action = Action(name="open", arguments={"a": 1, "b": 2})
    assert action.is_done_by(Call("", "open", {"a": 1, "b": 2}))
    assert action.is_done_by(Call("", "open", {"a": 1}))  # as in tau2: by the arguments that the call has
    assert not action.is_done_by(Call("", "open", {"a": 2}))
    assert not action.is_done_by(Call("", "shut", {"a": 1, "b": 2}))
    only_a = action.model_copy(update={"compare_args": ["a"]})
    assert only_a.is_done_by(Call("", "open", {"a": 1, "b": 3}))
    anything = action.model_copy(update={"compare_args": []})
    assert anything.is_done_by(Call("", "open", {}))


async def test_assertions_in_words_are_asked_of_a_judge_and_read_back() -> None:
    criteria = RAW["unlock_password"]["evaluation_criteria"]
    asked = ["The agent unlocks the account.", "The agent is polite."]
    judged = criteria | {"nl_assertions": asked, "reward_basis": ["DB", "NL_ASSERTION"]}
    task = spec("unlock_password", evaluation_criteria=judged)
    simulation = await gold(task)
    (message,) = questions(PROMPTS, task, simulation)
    assert "1. The agent unlocks the account.\n2. The agent is polite." in message.content
    assert 'agent calls unlock_account({"employee_id": "E101"})' in message.content
    assert questions(PROMPTS, spec("unlock_password"), simulation) == ()
    assert questions(PROMPTS, task, replace(simulation, reason="max_steps")) == ()
    assert DESK.reward(task, simulation, '{"1": true, "2": true}').value == 1.0
    assert DESK.reward(task, simulation, 'So: {"1": true, "2": false}').parts["NL_ASSERTION"] == 0.0
    for reply in ("yes", '{"1": true}', '{"1": true, "2": "perhaps"}'):
        with pytest.raises(JudgeError, match="expected a JSON object with true or false for 1 to 2"):
            read_judged(reply, task)


async def test_a_dialogue_that_the_tools_do_not_repeat_is_an_error_and_no_reward() -> None:
    task = spec("unlock_password")
    simulation = await gold(task)
    changed = tuple(
        replace(entry, text=entry.text.replace("E101", "E102")) if entry.text.startswith("{") else entry
        for entry in simulation.entries
    )
    with pytest.raises(ReplayError, match=r"unlock_account\({'employee_id': 'E101'}\) answered"):
        evaluate(DESK, task, replace(simulation, entries=changed))


def test_the_database_is_strict() -> None:
    row = DESK.environment().agent.db.employees["E101"].model_dump()  # type: ignore[attr-defined]
    for wrong in ({"lock": "odd"}, {"licences": "notes"}, {"floor": 3}):
        with pytest.raises(ValidationError):
            Employee.model_validate(row | wrong)
