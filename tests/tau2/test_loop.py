"""The dialogue's rules: who speaks when, what ends it, and that a resume comes to the same state."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ray_app.chat import ChatRequest, as_openai
from ray_app.config import Sampling
from ray_app.tau2.dialogue import Answered, Call, Said, chat, exchanges, heard_by
from ray_app.tau2.domain import ReplayError
from ray_app.tau2.gold import GoldScript
from ray_app.tau2.loop import Rules
from ray_app.tau2.simulation import USER_STOPS
from ray_app.tau2.tasks import Action, Assertion, InitialState
from ray_app.tools.base import what_is_asked
from tests.stand_ins import MemoryLog
from tests.tau2.desk import DESK, RAW, spec
from tests.tau2.replays import content, replayed

WRONG = [Action(name="unlock_account", arguments={"employee_id": f"E9{n}"}) for n in range(5)]


class UserWhoSays(GoldScript):
    """A user whose only message is this."""

    text = ""

    def next(self, side: str) -> Said:
        return Said("user", self.text)


async def test_both_sides_use_tools_and_hear_only_what_is_theirs() -> None:
    task = spec("vpn_expired")
    simulation = await replayed(DESK, task, GoldScript.of(task))
    first, *_ = simulation.entries
    assert isinstance(first, Said) and first.text == DESK.greeting
    sides = [call.side for call, _ in exchanges(simulation.entries)]
    assert sides == ["assistant", "assistant", "user", "user"]
    for side in ("assistant", "user"):
        heard = heard_by(side, simulation.entries)
        tools = [entry for entry in heard if isinstance(entry, Answered) or entry.calls]
        assert {entry.side for entry in tools} == {side}
    assert (simulation.reason, simulation.errors) == ("user_stop", 0)


@pytest.mark.parametrize("token", USER_STOPS)
async def test_each_of_the_users_stop_words_ends_the_dialogue(token: str) -> None:
    script = UserWhoSays([])
    script.text = f"Thank you. {token}"
    simulation = await replayed(DESK, spec("unlock_password"), script)
    assert (simulation.reason, simulation.steps, len(simulation.entries)) == ("user_stop", 1, 2)


async def test_steps_and_failing_tools_are_limited() -> None:
    talk = UserWhoSays([])
    talk.text = "Hm."
    too_long = await replayed(DESK, spec("unlock_password"), talk, rules=Rules(max_steps=7))
    assert (too_long.reason, too_long.steps) == ("max_steps", 7)
    failing = await replayed(DESK, spec("unlock_password"), GoldScript(WRONG), rules=Rules(max_errors=3))
    assert (failing.reason, failing.errors) == ("too_many_errors", 3)
    # What the last message said counts after the limit, as in tau2.
    task = spec("unlock_password")
    full = await replayed(DESK, task, GoldScript.of(task))
    cut = await replayed(DESK, task, GoldScript.of(task), rules=Rules(max_steps=full.steps))
    assert (full.reason, cut.reason) == ("user_stop", "max_steps")


async def test_an_agent_that_works_alone_has_both_sides_tools_and_nobody_to_talk_to() -> None:
    task = spec("vpn_start")
    alone = [replace_side(action) for action in GoldScript.of(task).actions]
    simulation = await replayed(DESK, task, GoldScript(alone), rules=Rules(is_solo=True))
    assert [answer.is_error for _, answer in exchanges(simulation.entries)] == [False, False]
    assert simulation.reason == "agent_error"  # its last message is a text, and no stop
    names = [each["function"]["name"] for each in DESK.environment(is_solo=True).schemas("assistant")]
    assert {"connect_vpn", "unlock_account"} <= set(names)


def replace_side(action: Action) -> Action:
    return action.model_copy(update={"requestor": "assistant"})


async def test_a_dialogue_goes_on_from_its_tasks_history() -> None:
    call = {"id": "c1", "name": "unlock_account", "arguments": {"employee_id": "E101"}}
    before = await replayed(DESK, spec("unlock_password"), GoldScript.of(spec("unlock_password")))
    answer = next(a.text for c, a in exchanges(before.entries) if c.name == "unlock_account")
    history = [
        {"role": "user", "content": "My account is locked."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "id": "c1", "content": answer, "requestor": "assistant"},
    ]
    task = spec("unlock_password", initial_state={"message_history": history})
    simulation = await replayed(DESK, task, GoldScript([]))
    assert content(simulation.entries)[:3] == list(task.history())
    assert simulation.state_hash == before.state_hash
    assert isinstance(simulation.entries[3], Said) and simulation.entries[3].side == "assistant"


async def test_a_resumed_dialogue_rebuilds_its_environment_to_the_same_state() -> None:
    task, log = spec("vpn_outdated"), MemoryLog()
    whole = await replayed(DESK, task, GoldScript.of(task), log=log)
    assert len(log.of("tool_call")) == 4
    for calls in range(5):
        again = MemoryLog()
        resumed = await replayed(DESK, task, GoldScript.of(task), log=again, record=log.record(calls))
        assert (resumed.state_hash, content(resumed.entries)) == (whole.state_hash, content(whole.entries))
        assert len(again.of("tool_call")) == 4 - calls  # the recorded ones are checked, and no rows again


@pytest.mark.parametrize("field", ["text", "state_hash"])
async def test_a_resume_that_comes_to_another_state_stops(field: str) -> None:
    task, log = spec("unlock_password"), MemoryLog()
    await replayed(DESK, task, GoldScript.of(task), log=log)
    last = log.of("tool_call")[-1]
    log.bodies[last.payload_hash] = json.dumps(json.loads(log.bodies[last.payload_hash]) | {field: "other"})
    with pytest.raises(ReplayError, match=r"unlock_account: state \w+ and .* resume with the domain's"):
        await replayed(DESK, task, GoldScript.of(task), record=log.record())


async def test_a_failing_tool_is_an_event_with_its_error() -> None:
    log = MemoryLog()
    await replayed(DESK, spec("unlock_password"), GoldScript(WRONG[:1]), log=log)
    (event,) = log.of("tool_call")
    assert (event.tool, event.alias, event.error_kind) == ("unlock_account", "agent", "tool")
    assert event.error == "Error: no employee has the id E90"


def test_answers_that_follow_no_call_are_refused() -> None:
    call = Said("assistant", calls=(Call("a", "get_ticket", {}),))
    for entries in ([call], [call, Said("user", "?")], [Answered("a", "x")], [call, Answered("b", "x")]):
        with pytest.raises(ValueError, match=r"no tool answered|follows no call"):
            exchanges(entries)  # type: ignore[arg-type]


def test_every_task_of_the_splits_is_there() -> None:
    splits = {name: [raw["id"] for raw in DESK.tasks(name)] for name in ("base", "train", "test")}
    assert splits["base"] == list(RAW) and len(RAW) == 20
    assert sorted(splits["train"] + splits["test"]) == sorted(RAW)


def test_what_one_side_has_follows_what_the_other_side_does() -> None:
    environment = DESK.environment()
    scene = {
        "env_type": "user",
        "func_name": "set_scene",
        "arguments": {"owner_id": "E104", "vpn": "connected"},
    }
    environment.initialise(InitialState.model_validate({"initialization_actions": [scene]}))
    connected = Assertion(env_type="user", func_name="assert_vpn", arguments={"expected": "connected"})
    assert not environment.holds(connected)  # the owner's profile has expired
    before = environment.state_hash()
    for call in (
        Call("1", "renew_vpn_profile", {"employee_id": "E104"}),
        Call("2", "connect_vpn", {}, "user"),
    ):
        assert not environment.call(call).is_error
    assert environment.holds(connected) and environment.state_hash() != before


def test_tool_calls_and_their_answers_are_part_of_what_a_model_is_asked_and_sent() -> None:
    said = Said("assistant", calls=(Call("c1", "get_ticket", {"ticket_id": "T-2001"}),))
    asked = chat("assistant", "policy", [said, Answered("c1", "open"), Said("user", "And?")])
    assert [as_openai(message) for message in asked[1:]] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "get_ticket", "arguments": '{"ticket_id": "T-2001"}'},
                }
            ],
        },
        {"role": "tool", "content": "open", "tool_call_id": "c1"},
        {"role": "user", "content": "And?"},
    ]
    request = ChatRequest("m", asked, Sampling())
    other = replace(asked[1], tool_calls=(replace(asked[1].tool_calls[0], arguments="{}"),))
    assert what_is_asked(request) != what_is_asked(replace(request, messages=(asked[0], other, *asked[2:])))
    elsewhere = replace(asked[2], tool_call_id="c2")
    changed = replace(request, messages=(*asked[:2], elsewhere, asked[3]))
    assert what_is_asked(request) != what_is_asked(changed)
