"""The short form of the soak: a real command with every fault, watched from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import soak_picture
from benchmarks.soak import FEW_KILLS, MOST_GROWTH, SINCE, figures, soak
from benchmarks.soak_load import (
    CALL_FAULTS,
    ONE_CALL_IN,
    TASK_FAULTS,
    call_fault,
    is_refused,
    planned_faults,
)
from benchmarks.soak_watch import HOLDING, Held, Sample, Watch, oldest_worker, rss
from ray_app import events

TASKS = 400


def test_one_call_in_a_hundred_meets_a_fault_each_kind_in_turn_and_each_thousand_tasks_have_all() -> None:
    for first in range(0, 10_000, ONE_CALL_IN):
        met = [fault for seed in range(first, first + ONE_CALL_IN) if (fault := call_fault(seed))]
        assert met == [CALL_FAULTS[first // ONE_CALL_IN % len(CALL_FAULTS)]]
    assert planned_faults(3000) == dict.fromkeys(TASK_FAULTS.values(), 3)
    assert sum(map(is_refused, range(2000))) == 1


def test_growth_is_from_the_level_at_a_fifth_and_the_oldest_worker_is_told_apart(tmp_path: Path) -> None:
    watch = Watch(1, tmp_path, tmp_path / "told", 100)
    for done in range(101):
        # The first worker grows by half; the second was killed at 60, and is small since.
        workers = [
            Held("workers", 7, 1.0, 1000 + 5 * done, 0, 9, 4),
            Held("workers", 8 + (done > 60), 2.0 + done, 1100 if done <= 60 else 600, 0, 9, 4),
        ]
        jump = 5000 if done == 20 else 0  # of a single sample
        held = [Held("driver", 1, 0.0, 2000 + jump, 0, 20, 5), *workers]
        watch.samples.append(Sample(float(done), done, held, 10 * done, 2))
    assert watch.growth(rss("driver"), SINCE) == 1.0
    assert watch.growth(oldest_worker("rss"), SINCE) == pytest.approx(1495 / 1100, rel=0.01)
    assert watch.growth(rss("workers"), SINCE) < 1.0 < MOST_GROWTH < watch.growth(oldest_worker("rss"), SINCE)


@pytest.mark.cluster
def test_a_soaked_run_counts_every_task_and_is_watched_to_its_end(tmp_path: Path) -> None:
    soaked = soak(TASKS, tmp_path, 0.1, FEW_KILLS, with_pictures=False)
    found = {figure.name.strip(): figure for figure in figures(soaked)}
    missed = [
        figure.line for figure in found.values() if figure.target != MOST_GROWTH and not figure.is_reached
    ]
    assert missed == []
    assert found["failed, as they were made to"].value == 2
    assert {kill.kind for kill in soaked.watch.killed} == {"workers", "checkpoint actor"}
    with events.connect(soaked.run_dir) as log:
        faults = log.execute("select distinct detail from events where kind = 'model_call'").fetchall()
    # Of eight faulty calls in all, a kill may take some.
    assert len({"reset", "500", "429", "timeout", "malformed"} & {name for (name,) in faults}) >= 3
    at_work = [
        one for one in soaked.watch.run if {held.kind for held in one.held} >= {*HOLDING, "raylet", "GCS"}
    ]
    assert at_work, "all kinds of process are seen at once"
    assert all(min(rss(kind)(one) for kind in HOLDING) > 0 for one in at_work)
    assert all(path.stat().st_size > 0 for path in soak_picture.draw(soaked.watch, SINCE, tmp_path / "soak"))
