"""Domains of our own: a toolkit's methods as tools, a strict database, and an environment over both.

A tool is a method of a `Toolkit` marked with `tool`; its signature is its schema. The same classes load into
tau2 itself (`upstream.register`), so tools return what tau2 can render: texts and pydantic models.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from ray_app.records import digest
from ray_app.tau2.dialogue import Answered, Call, Side
from ray_app.tau2.domain import Schema, function_schema
from ray_app.tau2.tasks import Action, Assertion, FunctionCall, InitialState

Kind = Literal["read", "write", "generic"]
Method = TypeVar("Method", bound=Callable[..., Any])


class Table(BaseModel):
    """Base of a database and its rows: unknown fields are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


def tool(kind: Kind) -> Callable[[Method], Method]:
    """Mark a method as a tool. `write`: it may change the database; `generic`: neither reads nor writes."""

    def mark(method: Method) -> Method:
        hints = get_type_hints(method, include_extras=True)
        signature = inspect.signature(method)
        parameters = [
            each.replace(annotation=hints.get(name, each.annotation))
            for name, each in signature.parameters.items()
        ]
        # Resolved: whoever reads the signature (pydantic, tau2) cannot look names up in this module.
        method.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=hints.get("return", Any)
        )
        method.__tool_kind__ = kind  # type: ignore[attr-defined]
        return method

    return mark


def kind_of_tool(method: Any) -> Kind | None:
    return getattr(method, "__tool_kind__", None)


class Toolkit:
    """The tools of one side over its database."""

    def __init__(self, db: Table) -> None:
        self.db = db

    @classmethod
    def tool_names(cls) -> list[str]:
        return [name for name, each in vars(cls).items() if kind_of_tool(each) is not None]

    @classmethod
    def kind(cls, name: str) -> Kind | None:
        return kind_of_tool(getattr(cls, name, None))

    def use(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the tool returns. Raises ValueError for an unknown tool, TypeError for wrong arguments."""
        if self.kind(name) is None:
            raise ValueError(f"Tool '{name}' not found.")
        return getattr(self, name)(**arguments)

    @classmethod
    def schemas(cls) -> dict[str, Schema]:
        return {name: _schema(name, getattr(cls, name)) for name in cls.tool_names()}


def _schema(name: str, method: Any) -> Schema:
    fields: dict[str, Any] = {
        parameter.name: (
            parameter.annotation,
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in list(inspect.signature(method).parameters.values())[1:]
    }
    model = create_model(name, **fields)
    schema = function_schema(name, inspect.getdoc(method) or name, {})
    schema["function"]["parameters"] = model.model_json_schema()
    return schema


@dataclass
class LocalEnvironment:
    """An environment of toolkits: the agent's, and the user's where the domain gives the user any."""

    policy: str
    agent: Toolkit
    user: Toolkit | None
    synchronise: Callable[[Any, Any], None]
    is_solo: bool = False

    def initialise(self, initial: InitialState | None) -> None:
        if initial is None:
            return
        if data := initial.initialization_data:
            for kit, update in ((self.agent, data.agent_data), (self.user, data.user_data)):
                if kit is not None and update is not None:
                    kit.db = type(kit.db).model_validate(_merged(kit.db.model_dump(), update))
        for action in initial.initialization_actions or ():
            self._run(action)
        self.sync()

    def schemas(self, side: Side, only: Sequence[str] | None = None) -> tuple[Schema, ...]:
        if self.is_solo:
            kits = [self.agent, self.user] if side == "assistant" else []
        else:
            kits = [self.agent] if side == "assistant" else [self.user]
        found = {name: each for kit in kits if kit is not None for name, each in _schemas(type(kit)).items()}
        return tuple(each for name, each in found.items() if only is None or name in only)

    def call(self, call: Call) -> Answered:
        try:
            text = rendered(self._kit(call.side, call.name).use(call.name, call.arguments))
            self.sync()
        except Exception as error:  # a tool's failure, of whatever kind, is what the model is told
            return Answered(call.call_id, f"Error: {error}", call.side, is_error=True)
        return Answered(call.call_id, text, call.side)

    def perform(self, action: Action) -> None:
        self._kit(action.requestor, action.name).use(action.name, action.arguments)

    def has_tool(self, name: str) -> bool:
        return any(kit is not None and kit.kind(name) for kit in (self.agent, self.user))

    def mutates(self, name: str) -> bool:
        return any(kit is not None and kit.kind(name) == "write" for kit in (self.agent, self.user))

    def holds(self, assertion: Assertion) -> bool:
        return bool(self._run(assertion) == assertion.assert_value)

    def sync(self) -> None:
        self.synchronise(self.agent, self.user)

    def state_hash(self) -> str:
        return digest([kit.db.model_dump(mode="json") if kit else None for kit in (self.agent, self.user)])

    def fingerprint(self) -> str:
        return self.state_hash()

    def _run(self, call: FunctionCall) -> Any:
        kit = self.agent if call.env_type == "assistant" else self.user
        result = getattr(kit, call.func_name)(**call.arguments)
        self.sync()
        return result

    def _kit(self, side: Side, name: str) -> Toolkit:
        is_users = self.user is not None and self.user.kind(name) is not None
        if side == "assistant":
            return self.user if self.is_solo and is_users and self.user else self.agent
        if self.user is None or self.is_solo:
            raise ValueError("the user has no tools here")
        return self.user


_SCHEMAS: dict[type[Toolkit], dict[str, Schema]] = {}


def _schemas(kit: type[Toolkit]) -> dict[str, Schema]:
    if kit not in _SCHEMAS:
        _SCHEMAS[kit] = kit.schemas()
    return _SCHEMAS[kit]


def rendered(result: Any) -> str:
    """A tool's result as the text that a model reads: models as JSON, texts as they are."""
    if isinstance(result, str):
        return result
    if isinstance(result, BaseModel):
        return json.dumps(result.model_dump(), default=str)
    if isinstance(result, list):
        return json.dumps([each.model_dump() for each in result], default=str)
    raise TypeError(f"a tool returned {type(result).__name__}: expected a text, a model or a list of models")


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
