from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_app import outlook
from ray_app.config import load
from ray_app.errors import RunDirError
from ray_app.ordering import Asked
from ray_app.outlook import History, RouteUse
from ray_app.records import Task
from tests.analysis.runs import event, model_call, result, run_start, write_run

CONFIG = load(Path(__file__).parent.parent / "configs" / "hle_sample.yaml", ["concurrency=8"], {})


def row(name: str, seconds: float = 10.0, **columns: Any) -> dict[str, Any]:
    base = {"rollout_key": name, "task_id": name, "outcome": "ok", "duration_s": seconds, "cost_usd": 0.1}
    return {**base, "is_correct": True, "category": "", "answer_type": "", **columns}


def test_a_log_tells_what_tasks_took_and_how_busy_each_route_was(tmp_path: Path) -> None:
    route = {"model": "baseline", "endpoint": "http://e"}
    run = write_run(
        tmp_path / "run",
        [
            run_start(3),
            *(
                event("limit", at, detail=f'{{"old": 1, "new": {new}}}', **route)
                for at, new in ((0, 4), (5, 2))
            ),
            *(event("attempt", 1, task) for task in "abc"),
            *(model_call("expert", 9.0, at_s=1, queue_s=1.0, **route) for _ in range(2)),
            model_call("expert", 5.0, at_s=1, is_replayed=True, **route),
            result("a", "ok", True, at_s=10, duration_s=9.0, cost_usd=0.5),
            result("b", "ok", True, at_s=11, duration_s=9.0, cost_usd=0.25),
            result("c", "failed", at_s=9, duration_s=1.0, error_kind="model"),
        ],
    )
    seen = outlook.history(run)
    assert seen is not None
    assert [one["task_id"] for one in seen.measured] == ["a", "b"] and seen.spent_usd == pytest.approx(0.75)
    assert seen.spans_s == pytest.approx({1: 10.0})
    assert seen.routes == [RouteUse("baseline", "http://e", 2, 16.0, 2)] and seen.waited_s == 2.0
    told = outlook.bottleneck(CONFIG, seen).splitlines()
    assert told == [
        "Bottleneck so far: places for tasks (2 at once), 90% busy",
        "  beyond its limit: baseline at http://e: about 7 calls at once with all places taken, "
        "its limit was 2 at last",
    ]
    assert outlook.history(tmp_path / "none") is None
    with pytest.raises(RunDirError, match=r"--durations-from .*none: expected a run with results"):
        outlook.prior(Asked(durations_from=tmp_path / "none"))


def test_a_task_may_take_its_wall_limit_and_what_calls_were_seen_to_wait_on_top() -> None:
    limited = load(Path(__file__).parent.parent / "configs" / "hle_sample.yaml", ["limits.wall_s=60"], {})

    def longest_s(seconds: float, waited_s: float) -> float | None:
        return outlook._longest_s(limited, History([row("a", seconds)], {}, [], waited_s))

    assert longest_s(50.0, 0.0) == 180.0 and longest_s(50.0, 40.0) == 220.0
    assert longest_s(900.0, 40.0) == 900.0  # it waited for what no call tells of


def test_the_busiest_route_is_the_bottleneck_where_it_is_busier_than_the_places_for_tasks() -> None:
    routes = [RouteUse("small", "u", 9, 10.0, 100), RouteUse("large", "v", 9, 38.0, 4)]
    seen = History([row(str(n)) for n in range(4)], {1: 10.0}, routes)
    crowded = History([row(str(n), 5.0) for n in range(4)], {1: 10.0}, routes)
    assert "places for tasks" in outlook.bottleneck(CONFIG, seen).splitlines()[0]
    assert "large at v, 95% of its limit of 4 calls busy" in outlook.bottleneck(CONFIG, crowded)


def test_durations_are_means_over_trials_and_this_runs_count_before_a_prior_ones() -> None:
    prior = History([row("a", 4.0), row("b", 1.0), row("c", 9.0, outcome="failed")], {}, [])
    own = History([row("a", 10.0), row("a", 20.0)], {}, [])
    known = outlook.durations(prior, own)
    assert known.by_key == {"a": 15.0, "b": 1.0} == known.by_id
    assert known.of(Task("c", "", "")) is None and known.of(Task("b", "other words", "")) == 1.0


def test_what_a_run_can_show_follows_from_pairs_with_the_prior_run_where_there_are_any() -> None:
    def run(wrong: int) -> History:
        return History([row(str(n), is_correct=n >= wrong) for n in range(40)], {}, [])

    assert "At n=1,900 a difference under 4.5 points from another run" in outlook.power(
        1900, None, None, "another run"
    )
    alike, apart = (outlook.power(1900, run(10), run(wrong), "A") for wrong in (10, 30))
    assert "under 1.4 points from A" in alike and "as 40 tasks of both differ" in alike
    assert "under 4.6 points from A" in apart
    assert "At n=4 no difference from A would be found" in outlook.power(4, run(10), run(10), "A")
