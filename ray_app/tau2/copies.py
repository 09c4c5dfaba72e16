"""Copies of a pydantic model that is built once: each as fresh as a new build, at a fraction of its cost.

A copy shares with the original what cannot be changed (texts, numbers, dates) and no container. What is not
surely copied so is refused, and the caller builds anew. The original is taken apart once; a copy is then made
kind by kind (all dicts, all lists, all models, and what lies in what), which the interpreter does in C.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import repeat
from operator import setitem
from typing import Any, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)

_UNCHANGING = (str, bytes, int, float, bool, type(None), Enum, date, time, timedelta, Decimal)
# A model's parts, set without its own checks: they were made when the original was built.
_set_fields, _set_names, _set_extra, _set_private = (
    BaseModel.__dict__[name].__set__
    for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)


class NotCopied(TypeError):
    """The model holds something that has no sure copy here; the message names it."""


def copier(model: Model) -> Callable[[], Model]:
    """What makes copies of `model`, which belongs to it from now on: a change of it would be in each copy.

    Raises NotCopied.
    """
    parts = _Parts()
    parts.add_model(model)
    if parts.copy() != model:
        raise NotCopied(f"{type(model).__name__}: a copy is not equal")
    return parts.copy


# A container of the original: which of the three lists it is in, and its place there.
_DICTS, _LISTS, _MODELS = range(3)
_Place = tuple[int, int]


@dataclass
class _Parts:
    """A model taken apart. The first model is the whole; model n has its fields in the dict `fields[n]`."""

    dicts: list[dict[Any, Any]] = field(default_factory=list)
    lists: list[list[Any]] = field(default_factory=list)
    kinds: list[type[BaseModel]] = field(default_factory=list)
    fields: list[int] = field(default_factory=list)
    # Of the fields that were given: one set for all models that were given all, which cannot grow.
    names: list[set[str]] = field(default_factory=list)
    partial: list[int] = field(default_factory=list)
    # What lies in which container, at which key.
    links: dict[tuple[int, int], tuple[list[int], list[Any], list[int]]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def copy(self) -> Any:
        dicts: list[Any] = list(map(dict.copy, self.dicts))
        lists: list[Any] = list(map(list.copy, self.lists))
        models: list[Any] = list(map(object.__new__, self.kinds))
        made = dicts, lists, models
        for (outer, inner), (places, keys, within) in self.links.items():
            containers, values = map(made[outer].__getitem__, places), map(made[inner].__getitem__, within)
            _each(map(setitem, containers, keys, values))
        _each(map(_set_fields, models, map(dicts.__getitem__, self.fields)))
        _each(map(_set_names, models, self.names))
        for place in self.partial:
            _set_names(models[place], set(self.names[place]))
        _each(map(_set_extra, models, repeat(None)))
        _each(map(_set_private, models, repeat(None)))
        return models[0]

    def add_model(self, model: BaseModel) -> _Place:
        self._once(model)
        kind, names, place = type(model), model.__pydantic_fields_set__, len(self.kinds)
        if model.__pydantic_extra__ is not None or model.__pydantic_private__ is not None:
            raise NotCopied(f"{kind.__name__}: has more than its fields")
        self.kinds.append(kind)
        self.names.append(names)
        self.fields.append(-1)
        if names != kind.model_fields.keys():
            self.partial.append(place)
        self.fields[place] = self._add_dict(model.__dict__)[1]
        return _MODELS, place

    def _add(self, value: Any) -> _Place | None:
        """Where `value` is now; None where it is its own copy."""
        if isinstance(value, BaseModel):
            return self.add_model(value)
        if type(value) is dict:
            return self._add_dict(value)
        if type(value) is list:
            return self._add_list(value)
        if isinstance(value, _UNCHANGING):
            return None
        raise NotCopied(f"{type(value).__name__}: nothing is known of how to copy it")

    def _add_dict(self, value: dict[Any, Any]) -> _Place:
        self._once(value)
        place = _DICTS, len(self.dicts)
        self.dicts.append(value)
        self._link(place, value.items())
        return place

    def _add_list(self, value: list[Any]) -> _Place:
        self._once(value)
        place = _LISTS, len(self.lists)
        self.lists.append(value)
        self._link(place, enumerate(value))
        return place

    def _link(self, outer: _Place, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in items:
            inner = self._add(value)
            if inner is not None:
                places, keys, within = self.links.setdefault((outer[0], inner[0]), ([], [], []))
                places.append(outer[1])
                keys.append(key)
                within.append(inner[1])

    def _once(self, value: Any) -> None:
        """Two places that share a container would have one each in the copy."""
        if id(value) in self.seen:
            raise NotCopied(f"{type(value).__name__}: stands in two places")
        self.seen.add(id(value))


def _each(calls: Iterable[None]) -> None:
    deque(calls, maxlen=0)
