"""Everything that can die or hang around a run does, once each; and two drivers that want one run.

The long form is `make chaos SEEDS=1..54`. TOOLORCH_CHAOS_SEED gives this one other moments and victims.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.plan import Round, every_kind_once
from tests.chaos.play import judged, play
from tests.chaos.world import World, world
from tests.jobs.cluster import finished, until
from tests.jobs.kills import Answer, Answers, Job, titled

pytestmark = pytest.mark.cluster
SEED = int(os.environ.get("TOOLORCH_CHAOS_SEED") or 1)
QUESTIONS, DIALOGUES = every_kind_once(SEED)
DONE = r"^\[HLE_TASK_COMPLETE\] .* status=done"
LEASE_S = 3.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("chaos") / "world") as found:
        found.learn(QUESTIONS, DIALOGUES)
        yield found


@pytest.fixture(scope="module")
def expected(place: World) -> Answers:
    """The answers of a run in which nothing dies."""
    return dict(place.expected[QUESTIONS.benchmark, QUESTIONS.tasks].answers)


@pytest.fixture
def job(place: World, tmp_path: Path) -> Iterator[Job]:
    place.witness.answered.clear()
    job = Job(place.cluster, place.witness, tmp_path / "run", limit=QUESTIONS.tasks)
    yield job
    job.end()


@pytest.mark.parametrize("one", [QUESTIONS, DIALOGUES], ids=["questions", "dialogues"])
def test_a_run_that_every_kind_of_fault_hits_ends_as_an_undisturbed_one(
    place: World, one: Round, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = play(place, one, tmp_path, print)
    told = capsys.readouterr().out
    assert outcome.is_good, f"{outcome}\n{told}"
    assert outcome.repeated == 0, told
    assert [blow.kind for blow in outcome.struck] == [
        blow.kind for blow in one.blows if blow.kind not in place.unavailable
    ], outcome.missed
    assert (tmp_path / "blows.jsonl").read_text().count("\n") == len(outcome.struck)
    # The same run is found wanting where another answer, or one answer more, was to be expected.
    right = place.expected[one.benchmark, one.tasks]
    (key, answer), *_ = right.answers.items()
    answers = {**right.answers, key: Answer("ok", None, "another"), ("none", 0): answer}
    other = replace(right, answers=answers)
    worse = judged(place, outcome, other)
    assert worse.lost == ["none (trial 0)"] and len(worse.wrong) == 2 and not worse.is_good, worse


def complete(process: subprocess.Popen[str]) -> None:
    """The job ends by itself, with everything accounted for."""
    output, n = finished(process), QUESTIONS.tasks
    assert process.returncode == 0, output
    assert f"{n} planned = {n} ok + 0 failed + 0 limited + 0 owed + 0 pending" in output


def test_a_driver_that_is_stopped_past_its_lease_loses_the_run_and_harms_nothing(
    place: World, expected: Answers, job: Job
) -> None:
    lease = {"TOOLORCH_LEASE_S": f"{LEASE_S}"}
    first = job.start(concurrency=8, **lease)
    until(first, DONE, times=random.Random(SEED).randint(5, 15))
    first.send_signal(signal.SIGSTOP)
    # Within its lease it has the run, whether it runs or not.
    refused(job.start(concurrency=8, TOOLORCH_LEASE_S="600"), f"process {first.pid} on ")
    while time.time() - (job.run_dir / "lease" / "epoch-000001.json").stat().st_mtime < LEASE_S:
        time.sleep(0.1)

    second = job.start(concurrency=8, **lease)
    until(second, DONE)
    committed = [row["task_id"] for row in job.told.rows("result") if row["epoch"] == 1]
    checkpoint = titled(place.cluster, "ray::Checkpoint")
    first.send_signal(signal.SIGCONT)
    output = finished(first)
    assert first.returncode == 1
    assert (
        "error: this driver's lease (epoch 1) was replaced by epoch 2: another driver has the run" in output
    )
    assert second.poll() is None and titled(place.cluster, "ray::Checkpoint") == checkpoint != []

    complete(second)
    job.told.check(expected)
    results = job.told.rows("result")
    assert sorted(row["task_id"] for row in results if row["epoch"] == 1) == sorted(committed)
    assert {(row["epoch"], row["attempt"]) for row in results if row["epoch"] > 1} == {(2, 1)}
    # The old workers pay for what they had sent when the run was taken, and for nothing more.
    assert job.told.repeated() <= 8


def refused(process: subprocess.Popen[str], reason: str) -> None:
    """The job ends at once with one line for the user."""
    output = finished(process)
    assert process.returncode == 2, output
    assert output.startswith("error: run ") and reason in output and output.count("\n") == 1, output


@pytest.mark.long
def test_of_two_drivers_that_start_at_once_one_runs_and_a_signal_ends_it_within_10_s(
    expected: Answers, job: Job
) -> None:
    pair = [job.start(concurrency=40), job.start(concurrency=40)]
    while all(process.poll() is None for process in pair):
        time.sleep(0.05)
    loser, winner = sorted(pair, key=lambda process: process.poll() is None)
    refused(loser, f"{job.run_dir}: ")
    until(winner, DONE)
    began = time.monotonic()
    winner.send_signal(signal.SIGTERM)
    output = finished(winner)
    assert time.monotonic() - began < 10
    assert winner.returncode == 143 and "stays pending for the next run" in output, output

    complete(job.start(concurrency=40))
    job.told.check(expected)
    assert job.told.repeated() == 0
