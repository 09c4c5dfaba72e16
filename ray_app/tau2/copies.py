"""Copies of a pydantic model that is built once: each as fresh as a new build, at half its cost or less.

A copy shares with the original what cannot be changed (texts, numbers, dates) and no container. What is not
surely copied so is refused, and the caller builds anew.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)
Copy = Callable[[], Any]

_UNCHANGING = (str, bytes, int, float, bool, type(None), Enum, date, time, timedelta, Decimal)
_new = object.__new__
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
    make = _model(model, set())
    if make() != model:
        raise NotCopied(f"{type(model).__name__}: a copy is not equal")
    return make


def _copy_of(value: Any, seen: set[int]) -> Copy | None:
    """What makes copies of `value`; None where it is its own copy."""
    if isinstance(value, BaseModel):
        return _model(value, seen)
    if type(value) is dict:
        return _dict(value, seen)
    if type(value) is list:
        return _list(value, seen)
    if isinstance(value, _UNCHANGING):
        return None
    raise NotCopied(f"{type(value).__name__}: nothing is known of how to copy it")


def _once(value: Any, seen: set[int]) -> None:
    """Two places that share a container would have one each in the copy."""
    if id(value) in seen:
        raise NotCopied(f"{type(value).__name__}: stands in two places")
    seen.add(id(value))


def _model(model: BaseModel, seen: set[int]) -> Copy:
    _once(model, seen)
    kind, names = type(model), model.__pydantic_fields_set__
    if model.__pydantic_extra__ or model.__pydantic_private__:
        raise NotCopied(f"{kind.__name__}: has more than its fields")
    extra, fields = model.__pydantic_extra__, _dict(model.__dict__, seen)
    # The set of the fields that were given grows where one is assigned that was not.
    is_complete = names == kind.model_fields.keys() and extra is None

    def make() -> Any:
        copy = _new(kind)
        _set_fields(copy, fields())
        _set_names(copy, names if is_complete else set(names))
        _set_extra(copy, None if extra is None else {})
        _set_private(copy, None)
        return copy

    return make


def _dict(value: dict[Any, Any], seen: set[int]) -> Copy:
    _once(value, seen)
    found = [(key, _copy_of(each, seen)) for key, each in value.items()]
    inner = [(key, make) for key, make in found if make is not None]
    shallow = value.copy
    if not inner:
        return shallow

    def make_all() -> dict[Any, Any]:
        copy = shallow()
        for key, make in inner:
            copy[key] = make()
        return copy

    return make_all


def _list(value: list[Any], seen: set[int]) -> Copy:
    _once(value, seen)
    found = [_copy_of(each, seen) for each in value]
    if all(make is None for make in found):
        return value.copy
    pairs = list(zip(value, found, strict=True))
    return lambda: [each if make is None else make() for each, make in pairs]
