"""Copies of a model: equal, and each as free as a new build."""

from __future__ import annotations

from datetime import date
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr

from ray_app.tau2.copies import NotCopied, copier


class State(Enum):
    OPEN = "open"


class Item(BaseModel):
    name: str
    tags: list[str] = []
    counts: dict[str, int] = {}
    due: date | None = None


class Stock(BaseModel):
    items: dict[str, Item]
    rows: list[Any] = []
    state: State = State.OPEN


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Secretive(BaseModel):
    _kept: list[int] = PrivateAttr(default_factory=list)


def stock() -> Stock:
    items = {n: Item(name=n, tags=[n], counts={n: 1}, due=date(2026, 1, 2)) for n in "ab"}
    return Stock(items=items, rows=[1, [2, {"a": Item(name="deep")}]])


def test_a_copy_is_equal_and_no_change_of_it_is_seen_elsewhere() -> None:
    make = copier(stock())
    one, other = make(), make()
    assert one == other == stock() and one.model_dump_json() == stock().model_dump_json()
    assert [type(one.items["a"]), type(one.rows[1][1]["a"])] == [Item, Item]
    one.items["a"].tags.append("x")
    one.items["a"].counts["x"] = 2
    one.items["b"].name = "changed"
    one.rows[1][1]["a"].due = date(2027, 1, 1)
    one.rows.append(3)
    one.items["c"] = Item(name="c")
    assert other == stock() and make() == stock()


def test_what_was_given_grows_in_one_copy_alone() -> None:
    make = copier(stock())
    one = make()
    one.state = State.OPEN  # given now, and equal
    one.rows[1][1]["a"].tags = []
    assert (one.model_fields_set, make().model_fields_set) == ({"items", "rows", "state"}, {"items", "rows"})
    assert make().rows[1][1]["a"].model_fields_set == {"name"}


def _shared() -> Stock:
    row: list[int] = []
    return Stock(items={}, rows=[row, row])


def _secretive() -> Secretive:
    made = Secretive()
    made._kept.append(1)
    return made


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (_shared(), "list: stands in two places"),
        (Stock(items={}, rows=[{1}]), "set: nothing is known"),
        (Open.model_validate({"a": []}), "Open: has more than its fields"),
        (_secretive(), "Secretive: has more than its fields"),
    ],
)
def test_what_has_no_sure_copy_is_refused(model: BaseModel, told: str) -> None:
    with pytest.raises(NotCopied, match=told):
        copier(model)
