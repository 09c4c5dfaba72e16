"""Both sides of a service desk's dialogue by rule: the agent reads tool schemas, the user its scenario.

Neither knows a task: the agent finds the verbs of what is asked for among the names of its tools, and fills
their arguments from what it was told and has looked up. Of the policy it keeps but a little.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ray_app.baseline.language import WORD, stem

EMAIL = re.compile(r"[\w.]+@[\w.]+\w")
CODE = re.compile(r"\b[A-Z]-\d+\b")
NAMED = re.compile(r"\bof ([a-z][\w-]*)")
CLAUSE = re.compile(r"[.,;!?]\s+| and ")
ASK_EMAIL = "What is your work e-mail address?"
NOT_POSSIBLE = "I am sorry, this is not possible"
DONE = "Done."
# Of one who works alone: the prompt's part, and the tool by which it ends.
TICKET = re.compile(r"<ticket>\n(.*?)\n</ticket>", re.DOTALL)
END = "done"
# What people write where a tool says something else.
MEANINGS = {
    "unlock": ("unlock", "locked"),
    "assign": ("assign", "give", "need a", "like a"),
    "set": ("set the priority", "change the priority"),
}
# What a user is asked to do at the laptop, one thing after the other, for a word in the request.
STEPS = {
    "vpn": (
        "Please turn the wifi on.",
        "Please empty the cache.",
        "Please update the vpn client.",
        "Please connect the vpn.",
    )
}
USUAL = ("normal",)  # of an enum from which nothing was asked for


class Move(NamedTuple):
    """One message: a text, or one tool call."""

    text: str = ""
    tool: str = ""
    arguments: Mapping[str, Any] = {}


def agent(request: Mapping[str, Any]) -> Move:
    """The agent's next message: identify, look up, act, instruct, report; one that is alone only acts."""
    ticket = TICKET.search(str(request["messages"][0]["content"]))
    if ticket is None:
        return _turn(request, " ".join(_texts(request["messages"], "user")))
    move = _turn(request, ticket[1])
    return move if move.tool else _alone(request, ticket[1])


def _alone(request: Mapping[str, Any], told: str) -> Move:
    """What a user would be asked to do at the laptop; then the end."""
    tools, done = _functions(request), [name for name, _ in _calls(request["messages"])]
    for step in _steps(told):
        name = next((name for name in tools if _asks_for(step, name)), END)
        if name not in done:
            return Move(tool=name)
    return Move(tool=END)


def _turn(request: Mapping[str, Any], told: str) -> Move:
    messages, tools = request["messages"], _functions(request)
    email = EMAIL.search(told)
    if email is None:
        return Move(ASK_EMAIL)
    done, facts = _calls(messages), _facts(messages)
    for move in _wanted(tools, told, email[0], facts):
        if (move.tool, dict(move.arguments)) not in done:
            if move.tool.startswith("unlock") and facts.get("lock") == "security":
                return _to_a_person(tools, done)
            return move
    step = _next_step(messages, told, facts, tools, done)
    return step or Move(_report(messages))


def _wanted(tools: Mapping[str, Any], told: str, email: str, facts: Mapping[str, Any]) -> Iterator[Move]:
    """The calls that the request comes to: who asks, what it is about, what is to be done."""
    for name, function in tools.items():
        if set(_parameters(function)) == {"email"}:
            yield Move(tool=name, arguments={"email": email})
    clauses = CLAUSE.split(told)
    for looks in (True, False):
        for clause in clauses:
            for name, function in tools.items():
                if name.startswith("get_") == looks and _is_asked_for(name, clause):
                    arguments = _filled(function, clause, facts)
                    if arguments is not None:
                        yield Move(tool=name, arguments=arguments)


def _is_asked_for(name: str, clause: str) -> bool:
    verb, *objects = name.split("_")
    text = clause.lower()
    words = {stem(word) for word in WORD.findall(text)}
    has_object = any(stem(word) in words for word in objects)
    if verb == "get":
        return has_object or ("licence" in objects and "seats of" in text)
    is_verb = stem(verb) in words or any(phrase in text for phrase in MEANINGS.get(verb, ()))
    return is_verb and has_object


def _filled(function: Mapping[str, Any], clause: str, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tool's arguments, or None where one of them cannot be told."""
    found = {}
    for name, schema in _parameters(function).items():
        value = _value(name, schema, clause, facts)
        if value is None:
            return None
        found[name] = value
    return found


def _value(name: str, schema: Mapping[str, Any], clause: str, facts: Mapping[str, Any]) -> Any:
    if options := schema.get("enum"):
        words = WORD.findall(clause.lower())
        named = [option for option in options if option in words]
        return (named or [option for option in options if option in USUAL] or [None])[0]
    if name == "ticket_id":
        code = CODE.search(clause)
        return code[0] if code else None
    if name == "product":
        product = NAMED.search(clause)
        return product[1] if product else None
    return facts.get(name)


def _next_step(
    messages: Sequence[Mapping[str, Any]],
    told: str,
    facts: Mapping[str, Any],
    tools: Mapping[str, Any],
    done: Sequence[tuple[str, Any]],
) -> Move | None:
    """What the user is asked to do next at the laptop; None where nothing is left, or nothing was needed."""
    steps = _steps(told)
    if not steps or "is connected" in told:
        return None
    renewal = "renew_vpn_profile", {"employee_id": facts.get("employee_id")}
    if facts.get("vpn_profile") == "expired" and renewal[0] in tools and renewal not in done:
        return Move(tool=renewal[0], arguments=renewal[1])
    said = _texts(messages, "assistant")
    return next((Move(step) for step in steps if step not in said), None)


def _steps(told: str) -> Sequence[str]:
    return next((steps for word, steps in STEPS.items() if word in told.lower()), ())


def _asks_for(heard: str, name: str) -> bool:
    """Whether the tool's whole name is in a request."""
    words = {stem(word) for word in WORD.findall(heard.lower())}
    return heard.startswith("Please") and {stem(word) for word in name.split("_")} <= words


def _to_a_person(tools: Mapping[str, Any], done: Sequence[tuple[str, Any]]) -> Move:
    name = next((name for name in tools if name.startswith("transfer")), "")
    if not name or any(made == name for made, _ in done):
        return Move("A person takes over.")
    return Move(tool=name, arguments=dict.fromkeys(_parameters(tools[name]), "not for me to decide"))


def _report(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the last tool said."""
    results = [str(message["content"]) for message in messages if message["role"] == "tool"]
    last = results[-1] if results else ""
    if last.startswith("Error"):
        return f"{NOT_POSSIBLE}: {last.removeprefix('Error: ')}."
    value = _json(last)
    if isinstance(value, dict):
        last = "; ".join(f"{key.replace('_', ' ')}: {each}" for key, each in value.items())
    return f"{DONE} {last}"


def user(request: Mapping[str, Any]) -> Move:
    """The user's next message: the reason for the call, then what it is asked for, then the end."""
    messages = request["messages"]
    scenario = str(messages[0]["content"]).rpartition("<scenario>")[2]
    own, last = _texts(messages, "assistant"), messages[-1]
    if not own and not _calls(messages):
        return Move(_paragraph(scenario, "Reason for call"))
    if last["role"] == "tool":
        return Move(f"The laptop says: {last['content']}")
    heard = str(last["content"])
    if heard == ASK_EMAIL or "e-mail address" in heard:
        email = EMAIL.search(scenario)
        return Move(f"My e-mail address is {email[0]}." if email else "###OUT-OF-SCOPE###")
    if "person takes over" in heard:
        return Move("###TRANSFER###")
    for name in _functions(request):
        if _asks_for(heard, name):
            return Move(tool=name)
    return Move("###STOP###")


def _paragraph(scenario: str, label: str) -> str:
    found = re.search(rf"{label}:\n(.*?)(?:\n\n|\n</scenario>|\Z)", scenario, re.DOTALL)
    return " ".join(found[1].split()) if found else " ".join(scenario.split())


def _functions(request: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {tool["function"]["name"]: tool["function"] for tool in request.get("tools") or ()}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = (function.get("parameters") or {}).get("properties") or {}
    return properties


def _texts(messages: Sequence[Mapping[str, Any]], role: str) -> list[str]:
    return [str(each["content"]) for each in messages if each["role"] == role and each.get("content")]


def _calls(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """All calls that this side has made, as (name, arguments)."""
    return [
        (call["function"]["name"], _json(call["function"]["arguments"]))
        for message in messages
        for call in message.get("tool_calls") or ()
    ]


def _facts(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the first look-up told of the one who asks."""
    values = (_json(str(message["content"])) for message in messages if message["role"] == "tool")
    return next((value for value in values if isinstance(value, dict)), {})


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
