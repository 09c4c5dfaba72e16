from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ray_app import ordering, planning
from ray_app.dataset import TaskSet
from ray_app.errors import ConfigError
from ray_app.ordering import Asked, Durations, arranged, choose
from ray_app.planning import Plan
from ray_app.records import Task

LONGEST_FIRST = Asked()


def task(name: str, category: str = "Math", length: int = 10) -> Task:
    return Task(name, "q" * length, "", category=category)


def whole(*tasks: Task, trials: int = 1) -> Plan:
    return planning.plan(tasks, trials, [])


def ids(work: Plan) -> list[str]:
    return [f"{item.task.task_id}{item.trial or ''}" for item in work.items]


def test_the_longest_of_a_prior_run_start_first_and_unknown_ones_where_their_category_would() -> None:
    tasks = [
        task("short"),
        task("new", "Art"),
        task("long"),
        task("art", "Art"),
        task("renamed"),
        task("odd"),
    ]
    known = Durations(
        {tasks[0].rollout_key: 1.0, tasks[2].rollout_key: 9.0, tasks[3].rollout_key: 5.0}, {"renamed": 6.0}
    )
    order = ids(arranged(whole(*tasks), tasks, LONGEST_FIRST, known))
    # `odd` is in its category's mean of 16 / 3, `new` in that of 5.
    assert order == ["long", "renamed", "odd", "new", "art", "short"]


def test_without_durations_categories_take_turns_the_longest_prompts_first() -> None:
    tasks = [
        *(task(f"m{n}", "Math", n) for n in range(1, 7)),
        *(task(f"a{n}", "Art", 90 + n) for n in (1, 2)),
    ]
    order = ids(arranged(whole(*tasks, trials=2), tasks, Asked(), Durations()))
    assert order[:8] == ["m6", "a2", "m5", "m4", "m3", "a1", "m2", "m1"]
    assert order[8:] == [f"{name}1" for name in order[:8]], "trial after trial"


def test_a_shuffled_order_is_that_of_its_seed_also_for_what_a_resume_has_left() -> None:
    tasks = [task(f"t{n}") for n in range(30)]
    asked = Asked(is_shuffled=True, seed=3)
    order = ids(arranged(whole(*tasks), tasks, asked, Durations({tasks[0].rollout_key: 1.0})))
    assert order != [one.task_id for one in tasks] and sorted(order) == sorted(one.task_id for one in tasks)
    rest = arranged(whole(*tasks[10:]), tasks, asked, Durations())
    assert ids(rest) == [name for name in order if int(name[1:]) >= 10]
    assert ids(arranged(whole(*tasks), tasks, Asked(is_shuffled=True, seed=4), Durations())) != order


def test_a_pilot_has_of_each_stratum_its_share_and_stays_the_same_when_part_of_it_is_done() -> None:
    tasks = [task(f"t{n}", "Math" if n < 60 else "Art" if n < 90 else "Law") for n in range(100)]
    asked = Asked(pilot=11, seed=5)
    work = arranged(whole(*tasks, trials=2), tasks, asked, Durations())
    assert Counter(item.task.category for item in work.items) == {"Math": 7, "Art": 3, "Law": 1}
    assert len(work.left) == 200 and work.skipped == 0 and {item.trial for item in work.items} == {0}
    first = work.items[0].task
    row = {"rollout_key": first.rollout_key, "judge_key": first.judge_key, "trial": 0, "attempt": 1}
    done = planning.plan(tasks, 2, [row | {"outcome": "ok", "error_kind": None}])
    again = arranged(done, tasks, asked, Durations())
    assert {item.key for item in again.items} == {item.key for item in work.items[1:]} and again.skipped == 1
    assert len(ordering.pilot(tasks[:4], 50, 0)) == 4


def test_a_choice_of_tasks_is_part_of_what_a_run_measures_and_an_unknown_id_is_named(tmp_path: Path) -> None:
    data = TaskSet(tuple(task(f"t{n}") for n in range(10)), "", "file", "", {})
    few = choose(data, Asked(limit=3))
    assert [one.task_id for one in few.tasks] == ["t0", "t1", "t2"]
    assert few.digest != data.digest and ordering.identity(data, few) == {"tasks_chosen": "3 of 10"}
    assert dict(few.left_out) == {"not chosen (--limit, --ids)": 7}
    lot = choose(data, Asked(limit=3, is_shuffled=True, seed=1))
    assert len(lot.tasks) == 3 and lot.digest not in (few.digest, data.digest)
    (tmp_path / "ids").write_text("t7\n\nt1\n")
    named = choose(data, Asked(ids=str(tmp_path / "ids")))
    assert named.digest == choose(data, Asked(ids="t1, t7,t7")).digest
    assert choose(data, Asked(is_shuffled=True)) is data and ordering.identity(data, data) == {}
    with pytest.raises(ConfigError, match="--ids: 1 of 2 are not among the 10 tasks: 'x'"):
        choose(data, Asked(ids="t1,x"))
    with pytest.raises(ConfigError, match="no id in it"):
        choose(data, Asked(ids=" ,"))
