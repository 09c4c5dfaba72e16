"""The HLE job while its processes are killed: a worker, a node, the whole cluster, the driver itself.

The baseline is deterministic, so whatever dies, a run must end with the answers of an undisturbed one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.jobs.cluster import Cluster, finished, running, until
from tests.jobs.kills import Answers, Job, Kill, Witness, titled, witness

pytestmark = pytest.mark.cluster
SIMULATED = r"^\[TAU2_TASK_COMPLETE\] .* status=done"
DONE = r"^\[HLE_TASK_COMPLETE\] .* status=done"
QUESTIONS = 60
SEED = int(os.environ.get("TOOLORCH_KILL_SEED") or 1)
LEASE_S = 3.0
# What a killed process had answered this long before was its task's to go on from.
HANDLED_S = 0.5
# The promise for the loss of everything at once.
LOST_S = 2.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("cluster"), latency_s=0.15) as found:
        yield found


@pytest.fixture(scope="module")
def seen(cluster: Cluster) -> Iterator[Witness]:
    with witness(f"{cluster.http}/baseline") as found:
        yield found


@pytest.fixture(scope="module")
def expected(cluster: Cluster, seen: Witness, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The answers of a run in which nothing dies."""
    seen.answered.clear()
    job = Job(cluster, seen, tmp_path_factory.mktemp("undisturbed") / "run")
    output = finished(job.start(concurrency=40))
    answers = job.told.answers()
    assert [answer.outcome for answer in answers.values()] == ["ok"] * QUESTIONS, output
    job.told.check(answers)
    assert job.told.repeated() == 0
    # The witness knows a call by its body, so no two calls may have the same.
    assert len(seen.answered) == len(job.told.answered())
    assert {len(calls) for calls in seen.answered.values()} == {1}
    return answers


@pytest.fixture
def job(cluster: Cluster, seen: Witness, tmp_path: Path) -> Iterator[Job]:
    seen.answered.clear()
    job = Job(cluster, seen, tmp_path / "run")
    yield job
    job.end()


def complete(process: subprocess.Popen[str]) -> None:
    """The job ends by itself, with everything accounted for."""
    output = finished(process)
    assert process.returncode == 0, output
    assert f"{QUESTIONS} planned = {QUESTIONS} ok + 0 failed + 0 limited + 0 owed + 0 pending" in output


def test_a_worker_the_checkpoint_actor_the_model_server_and_a_node_die_one_after_the_other(
    cluster: Cluster, expected: Answers, job: Job
) -> None:
    rng = random.Random(SEED)
    process = job.start(concurrency=12)
    killed: list[Kill] = []

    @contextmanager
    def one_dies() -> Iterator[None]:
        # A worker and the checkpoint actor within the time of one sync are one loss of both.
        for _ in range(rng.randint(3, 7)):
            until(process, DONE)
        while killed and time.time() - killed[-1].done < LOST_S:
            until(process, DONE)
        began = time.time()
        yield
        killed.append(Kill(began, time.time()))

    for title in rng.sample(["ray::Worker", "ray::Checkpoint", "ray::ServeReplica:baseline:baseline"], 3):
        with one_dies():
            rng.choice(titled(cluster, title, "head")).kill()
    with one_dies():
        assert titled(cluster, "ray::Worker", "second"), "a node without workers is no loss"
        cluster.kill("second")
    cluster.join("second")
    complete(process)

    job.told.check(expected)
    assert job.told.repeated() == 0
    assert job.witness.repeated(*killed, settled_s=HANDLED_S) == 0
    assert max(row["attempt"] for row in job.told.rows("result")) >= 2
    assert {row["epoch"] for row in job.told.rows("result")} == {1}


def test_dialogues_cut_by_the_death_of_a_worker_and_of_the_driver_go_on_in_their_middle(
    cluster: Cluster, seen: Witness, tmp_path: Path
) -> None:
    """tau2 by the same engine: an environment comes back to the state in which it was lost."""
    seen.answered.clear()
    quiet, job = (Job(cluster, seen, tmp_path / name, "jobs/tau2.py") for name in ("quiet", "killed"))
    output = finished(quiet.start(concurrency=20))
    expected, dialogues = quiet.told.answers(), quiet.told.dialogues()
    assert len(expected) == len(dialogues) == 20 and len({state for state, _ in dialogues.values()}) > 10, (
        output
    )
    assert len(seen.answered) == len(quiet.told.answered()), "the witness knows a call by its body"
    seen.answered.clear()

    first = job.start(concurrency=6)
    until(first, SIMULATED, times=2)
    began = time.time()
    titled(cluster, "ray::Worker")[0].kill()
    killed = [Kill(began, time.time())]
    until(first, SIMULATED, times=6)
    began = time.time()
    first.kill()
    first.wait()
    killed.append(Kill(began, time.time()))
    cut = {(row["task_id"], row["trial"]) for row in job.told.rows("tool_call")} - {*job.told.answers()}
    output = finished(job.start(concurrency=6))
    job.end()

    job.told.check(expected)
    assert job.told.dialogues() == dialogues, output
    assert "20 planned simulations: 20 count, 0 infrastructure errors left out" in output
    assert json.loads((job.run_dir / "analysis" / "tau2.json").read_text())["overall"]["tasks"] == 20
    assert cut, "the driver left dialogues in their middle"
    assert {row["epoch"] for row in job.told.rows("result")} == {1, 2}
    assert max(row["attempt"] for row in job.told.rows("attempt") if row["epoch"] == 1) >= 2
    assert job.witness.repeated(*killed, settled_s=HANDLED_S) == 0


def test_everything_dies_at_once_and_the_same_command_on_a_new_cluster_goes_on(
    cluster: Cluster, expected: Answers, job: Job
) -> None:
    done = random.Random(SEED).randint(15, 35)
    process = job.start(concurrency=12)
    until(process, DONE, times=done)
    killed = time.time()
    process.kill()
    cluster.kill()
    process.wait()
    gone = time.time()
    assert done <= len(job.told.rows("result")) < QUESTIONS

    cluster.start()
    complete(job.start(concurrency=12))
    job.told.check(expected)
    assert {row["epoch"] for row in job.told.rows("result")} == {1, 2}
    assert job.told.repeated_of_ended(killed - LOST_S) == 0
    assert job.witness.repeated(Kill(killed, gone), settled_s=LOST_S) == 0


def test_a_driver_that_is_stopped_past_its_lease_loses_the_run_and_harms_nothing(
    cluster: Cluster, expected: Answers, job: Job
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
    checkpoint = titled(cluster, "ray::Checkpoint")
    first.send_signal(signal.SIGCONT)
    output = finished(first)
    assert first.returncode == 1
    assert (
        "error: this driver's lease (epoch 1) was replaced by epoch 2: another driver has the run" in output
    )
    assert second.poll() is None and titled(cluster, "ray::Checkpoint") == checkpoint != []

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
