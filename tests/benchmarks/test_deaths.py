from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.deaths import (
    BETWEEN,
    Death,
    Note,
    Outlived,
    after_all,
    after_one,
    check,
    moments,
    outlive,
    read_notes,
)
from benchmarks.engine import write_finished
from benchmarks.load import Load
from benchmarks.stub_model import Behaviour

TINY = Load(tasks=16, turns=4, in_flight=8, behaviour=Behaviour(0.2, 300))
# Process 7 dies at 100; 8 lives, or begins, after it. Tasks a to e.
DIED = Death(100.0, frozenset({7}))
EVIDENCE = """
sent a 0 90 7
ended a 0 91 7
acked a 0 91 7
sent a 1 91 7
ended a 1 97.5 7
sent b 0 95 7
ended b 0 98 7
acked b 0 98 7
sent b 1 99 7
sent c 0 90 7
ended c 0 92 7
acked c 0 92 7
sent d 0 93 8
ended d 0 94 8
acked d 0 94 8
sent a 1 101 8
ended a 1 102 8
acked a 1 102 8
sent b 0 103 8
ended b 0 104 8
acked b 0 104 8
sent b 1 104 8
ended b 1 105 8
acked b 1 105 8
acked d 0 106 8
sent e 0 106 8
"""


def notes(lines: str) -> list[Note]:
    parts = [line.split() for line in lines.split("\n") if line]
    return [Note(what, (key, int(number)), float(at), int(pid)) for what, key, number, at, pid in parts]


def run(lines: str = EVIDENCE, death: Death = DIED) -> Outlived:
    return Outlived(notes(lines), [death])


def test_only_an_acknowledged_call_that_is_sent_after_that_is_repeated() -> None:
    # a 1 had ended and was not acknowledged, b 1 had only been sent, d 0 was served from the record.
    assert run().repeated == {("b", 0)}


def test_a_call_that_is_acknowledged_twice_was_sent_for_the_first_time_before_both() -> None:
    assert run("sent a 0 1 7\nacked a 0 2 7\nacked a 0 5 8").repeated == set()
    assert run("sent a 0 1 7\nacked a 0 2 7\nsent a 0 3 8\nacked a 0 5 8").repeated == {("a", 0)}


def test_what_is_lost_is_as_old_as_its_first_end_before_the_death() -> None:
    assert run().lost_ages_s() == [2.0, 2.5]
    assert run("sent a 0 1 7\nended a 0 2 7\nsent a 1 3 7\nsent a 1 101 8").lost_ages_s() == []


def test_at_stake_is_what_the_dead_acknowledged_of_tasks_that_others_went_on_with() -> None:
    assert run().at_stake == 2  # a 0, b 0; nobody went on with c, and d was not the dead one's
    assert run(death=Death(100.0, frozenset({9}))).at_stake == 0


def test_evidence_comes_from_all_processes_in_order_without_the_line_that_a_death_cut(tmp_path: Path) -> None:
    (tmp_path / "8").write_text("sent b 0 2.5 8\n")
    (tmp_path / "7").write_text("sent a 0 1.25 7\nended a 0 3.5 7\nacked a 0 3.5")
    assert read_notes(tmp_path) == notes("sent a 0 1.25 7\nsent b 0 2.5 8\nended a 0 3.5 7")


def test_one_repeated_call_misses_the_target_and_so_does_a_loss_of_more_than_two_seconds() -> None:
    good = run("sent a 0 1 7")
    first, of_worker, *_ = after_one({"a worker": run(), "the checkpoint actor": good})
    assert first.name == "acknowledged calls repeated after the death of a worker, the checkpoint actor"
    assert (first.value, of_worker.value, first.is_reached) == (1, 1, False)
    assert next(after_one({"a worker": good})).is_reached
    figures = {figure.name.strip(): figure for figure in after_all([run(), good])}
    oldest = figures["after SIGKILL of everything at once: age of the oldest call that is repeated"]
    assert (oldest.value, oldest.is_reached) == (2.5, False)
    assert figures["calls that had ended and are repeated"].value == 2
    assert figures["of them acknowledged"].value == 1
    assert next(after_all([good])).value == 0.0


@pytest.mark.parametrize("deaths", [1, 3])
def test_deaths_spread_over_the_middle_of_a_run_as_their_seed_says(deaths: int) -> None:
    drawn = moments(deaths, random.Random(3))
    assert drawn == moments(deaths, random.Random(3)) != moments(deaths, random.Random(4))
    assert len(drawn) == deaths and drawn == sorted(drawn)
    assert BETWEEN[0] <= drawn[0] and drawn[-1] <= BETWEEN[1]


async def test_a_run_that_lacks_a_result_or_has_one_twice_is_no_measurement(tmp_path: Path) -> None:
    await write_finished(TINY, tmp_path)
    check(TINY, tmp_path)
    with pytest.raises(RuntimeError, match=r"17 tasks should have ended well, these did: {'ok': 16}"):
        check(replace(TINY, tasks=17), tmp_path)
    await write_finished(replace(TINY, tasks=1), tmp_path)
    with pytest.raises(RuntimeError, match=r"beside one: {'[0-9a-f]+': 1}"):
        check(TINY, tmp_path)


@pytest.mark.long
@pytest.mark.cluster
def test_the_death_of_a_real_worker_repeats_no_acknowledged_call(tmp_path: Path) -> None:
    outlived = outlive("a worker", TINY, tmp_path / "run", 1, random.Random(5))
    assert len(outlived.deaths) == 1
    assert outlived.at_stake > 0
    assert outlived.repeated == set()
    for what in ("sent", "ended", "acked"):
        assert len({note.call for note in outlived.notes if note.what == what}) == TINY.calls
