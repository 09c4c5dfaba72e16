"""A forecast beside what came of it, from small logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.foretold import Foretold, foretold
from analysis.log import open_run
from ray_app.records import Event
from tests.analysis.runs import event, result, run_start, write_run

TOLD = {"left": 2, "wall_s": [5.0, 8.0, 13.0], "cost_usd": [0.1, 0.2, 0.3], "basis": "from 9 tasks"}


def found(tmp_path: Path, *rows: Event) -> list[Foretold]:
    return foretold(open_run(write_run(tmp_path / "run", rows)))


def second(kind: str, at_s: float, task: str, **columns: Any) -> Event:
    return event(kind, at_s=at_s, task=task, epoch=2, **columns)


def test_what_came_is_of_the_command_that_foretold_it_and_only_when_it_did_all(tmp_path: Path) -> None:
    pilot = [run_start(3), event("attempt", 1, "a"), result("a", "ok", True, at_s=4, cost_usd=7.0)]
    start = Event(**{name: getattr(run_start(3, forecast=TOLD), name) for name in Event.__slots__})
    start.epoch, start.t_start = 2, start.t_start + 100
    rest = [
        start,
        second("attempt", 101, "b"),
        second("attempt", 102, "c"),
        second("result", 105, "b", outcome="ok", is_correct=True, cost_usd=0.15),
    ]
    (half,) = found(tmp_path / "half", *pilot, *rest)
    assert (half.epoch, half.left, half.done, half.actual_wall_s, half.actual_cost_usd) == (
        2,
        2,
        1,
        None,
        None,
    )
    last = second("result", 110, "c", outcome="failed", error_kind="model", cost_usd=0.1)
    (whole,) = found(tmp_path / "whole", *pilot, *rest, last)
    assert (whole.actual_wall_s, whole.actual_cost_usd) == pytest.approx((9.0, 0.25))
    assert (whole.wall_s, whole.cost_usd) == (TOLD["wall_s"], TOLD["cost_usd"])


@pytest.mark.parametrize(
    "odd", ["many", {"left": 2}, TOLD | {"wall_s": [1.0]}, TOLD | {"cost_usd": ["x"] * 3}]
)
def test_a_forecast_that_cannot_be_read_is_none(tmp_path: Path, odd: Any) -> None:
    assert found(tmp_path, run_start(3, forecast=odd)) == []
