"""The HLE job as a user runs it: on a real cluster of two raylets, stopped, killed, submitted."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_app import events
from ray_app.prompting import load_prompts
from tests.jobs.cluster import Cluster, finished, running, until
from tests.model_server import serving

pytestmark = pytest.mark.cluster
DONE = r"^\[HLE_TASK_COMPLETE\] .* status=done"
QUESTIONS = 60
NOWHERE = "[{base_url: http://127.0.0.1:9/v1}]"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("cluster"), latency_s=0.15) as found:
        yield found


def figures(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def counted(run_dir: Path) -> list[str]:
    """The task id of every counted result."""
    ids: list[str] = events.results(run_dir)["task_id"].to_pylist()
    return ids


def rows(run_dir: Path, *columns: str) -> list[dict[str, Any]]:
    return [row for batch in events.read(run_dir, columns) for row in batch.to_pylist()]


def test_a_run_on_two_raylets_is_scored_and_the_second_makes_no_call(
    cluster: Cluster, tmp_path: Path
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "figures.json"
    arguments = ("--run-dir", str(run_dir), "--json", str(out))
    output = finished(cluster.job(*arguments, "--pictures"))
    first = figures(out)
    assert (first["planned"], first["ok"], first["exit_code"]) == (QUESTIONS, QUESTIONS, 0), output
    assert first["model_calls"] == first["model_calls_total"] > 3 * QUESTIONS
    assert 0.35 <= first["accuracy"] <= 0.75
    assert first["interval"][0] < first["accuracy"] < first["interval"][1]
    assert "60 planned = 60 ok + 0 failed + 0 limited + 0 owed + 0 pending" in output
    assert (run_dir / "analysis" / "overview.png").stat().st_size > 10_000
    assert json.loads((run_dir / "provenance.json").read_text())["dataset_sha256"]
    assert list((run_dir / "logs").glob("replica_baseline*.log"))
    workers = {
        row["worker"].split(":")[0] for row in rows(run_dir, "worker", "kind") if row["kind"] == "attempt"
    }
    assert len(workers) == 2, "both raylets take part"

    again = finished(cluster.job(*arguments))
    assert "No model is called." in again
    assert figures(out)["model_calls"] == 0
    assert sorted(counted(run_dir)) == sorted(set(counted(run_dir)))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long),  # test_chaos.py has it, too
    ],
)
def test_a_driver_that_is_stopped_or_killed_half_way_is_finished_by_the_same_command(
    cluster: Cluster, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "figures.json"
    arguments = ("--run-dir", str(run_dir), "--json", str(out), "--set", "concurrency=6")
    job = cluster.job(*arguments)
    until(job, DONE, times=QUESTIONS // 3)
    job.send_signal(number)
    output = finished(job)
    assert job.returncode == code
    if number != signal.SIGKILL:
        assert "stays pending for the next run" in output and " pending" in output
        assert 0 < figures(out)["pending"] < QUESTIONS
    done_before = len(counted(run_dir))
    assert QUESTIONS // 3 <= done_before < QUESTIONS

    output = finished(cluster.job(*arguments))
    last = figures(out)
    assert (last["ok"], last["pending"], last["exit_code"]) == (QUESTIONS, 0, 0), output
    assert Counter(counted(run_dir)).most_common(1)[0][1] == 1
    assert len(counted(run_dir)) == QUESTIONS
    # What was finished is not run again, and what was in flight goes on from its recorded calls.
    results = [row for row in rows(run_dir, "kind", "epoch", "task_id") if row["kind"] == "result"]
    assert len(results) == QUESTIONS
    ok_calls = [
        (row["rollout_key"], row["call_seq"])
        for row in rows(run_dir, "kind", "status", "rollout_key", "call_seq")
        if row["kind"] == "model_call" and row["status"] == "ok"
    ]
    repeated = len(ok_calls) - len(set(ok_calls))
    assert repeated == 0 if number != signal.SIGKILL else repeated <= 6


def test_a_run_is_replayed_without_services_and_another_prompt_is_found_out(
    cluster: Cluster, tmp_path: Path
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "figures.json"
    output = finished(cluster.job("--run-dir", str(run_dir), "--set", "dataset.limit=6"))
    assert "6 planned = 6 ok" in output
    # A Ray of its own, in which nothing is served; a key that is not there is not missed.
    keyed = "models.baseline.endpoints=[{base_url: http://127.0.0.1:9/v1, api_key_env: NO_SUCH_KEY}]"
    replay = ("--replay", str(run_dir), "--set", keyed, "--json", str(out))

    output = finished(cluster.job(*replay, RAY_ADDRESS="local"))
    told = figures(out)
    assert (told["replayed"], told["equal"], told["diverged"], told["exit_code"]) == (6, 6, [], 0), output
    assert "6 tasks, 6 equal, 0 diverged" in output and "not on this machine" not in output
    assert (
        events.results(Path(told["run_dir"]))["is_correct"].sort()
        == events.results(run_dir)["is_correct"].sort()
    )

    (tmp_path / "prompts").mkdir()
    ours = load_prompts().texts["search"]
    (tmp_path / "prompts" / "search.txt").write_text(ours + "Be brief.\n")
    job = cluster.job(*replay, "--set", f"prompts={tmp_path / 'prompts'}")
    output, told = finished(job), figures(out)
    assert (job.returncode, told["exit_code"], told["equal"]) == (1, 1, 0), output
    assert told["differences"] == ["prompt_digest"]
    assert {(one["turn"], one["call"]) for one in told["diverged"]} == {(0, 1)}
    expected = "search/search-1 model_call, request "
    assert all(one["recorded"].startswith(expected) for one in told["diverged"])


def test_a_pilot_counts_foretells_the_rest_and_the_plain_command_goes_on_with_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "figures.json"
    arguments = ("--run-dir", str(run_dir), "--json", str(out), "--limit", "24")
    job = cluster.job(*arguments, "--pilot", "9")
    output, told = finished(job), figures(out)
    assert (job.returncode, told["ok"], told["pending"]) == (0, 9, 15), output
    assert "Forecast (90% intervals, from 9 finished tasks of this run)" in output
    assert "Bottleneck so far: " in output and "At n=24 " in output and "Pilot done: 15 of 24" in output
    sample = set(counted(run_dir))

    output = finished(cluster.job("--run-dir", str(run_dir)))
    assert "tasks_chosen ('24 of 60' there, None now)" in output, "all tasks would be another run"
    planned = finished(cluster.job(*arguments, "--plan"))
    assert "15 to run" in planned and "from 9 finished tasks of this run" in planned

    output, told = finished(cluster.job(*arguments)), figures(out)
    assert (told["ok"], told["pending"], told["exit_code"]) == (24, 0, 0), output
    assert sample < set(counted(run_dir)) and len(counted(run_dir)) == 24
    assert "Foretold" in output, "beside what came"


def verdicts(run_dir: Path) -> dict[str, bool]:
    return {row["task_id"]: row["is_correct"] for row in events.results(run_dir).to_pylist()}


def test_both_forms_of_submission_run_the_job_and_resume_it(cluster: Cluster) -> None:
    services = ("--set", f"services={cluster.serve_config}")
    packaged = ("--address", cluster.dashboard, "--working-dir", ".")
    for name, script, form in (("typed", "jobs/hle.py", ()), ("packaged", "jobs/tau2.py", packaged)):
        command = ("--", "env", f"RUN_NAME={name}", "python", script, "--limit", "8", *services)
        first = cluster.submit(*form, *command)
        assert first.returncode == 0, first.stdout
        assert "8 planned = 8 ok" in first.stdout and "succeeded" in first.stdout
        record = json.loads((cluster.folder / "home" / "runs" / name / "provenance.json").read_text())
        assert record["commit"] != "unknown", "a submitted copy finds its commit by its code digest"
    again = cluster.submit(*form, *command)
    assert again.returncode == 0 and "No model is called." in again.stdout


def test_services_that_differ_are_deployed_again_and_equal_ones_are_used(
    cluster: Cluster, tmp_path: Path
) -> None:
    output = finished(cluster.job("--run-dir", str(tmp_path / "a"), "--set", "dataset.limit=1"))
    assert output.count("running, same config and code") == 2, output
    output = finished(cluster.job("--run-dir", str(tmp_path / "b"), "--set", "dataset.limit=1", "--fresh"))
    assert output.count("redeployed (--fresh)") == 2 and "1 ok" in output, output


def test_endpoints_that_are_down_are_found_before_anything_is_paid(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.job("--run-dir", str(tmp_path / "run"), "--set", f"models.baseline.endpoints={NOWHERE}")
    output = finished(job)
    assert job.returncode == 2
    assert "error: model baseline: http://127.0.0.1:9/v1: " in output and "Connect call failed" in output, (
        output
    )
    job = cluster.job("--run-dir", str(tmp_path / "run"), "--set", "retriever.url=http://127.0.0.1:9")
    output = finished(job)
    assert job.returncode == 2 and "error: retriever http://127.0.0.1:9" in output, output


async def test_an_endpoint_that_dies_is_a_failure_of_infrastructure_and_the_resume_mends_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    arguments = ("--run-dir", str(tmp_path / "run"), "--json", str(out), "--set", "dataset.limit=3")
    async with serving((500, {"message": "dead"}, {}), name="baseline") as broken:
        dead = f"models.baseline.endpoints=[{{base_url: {broken.url}}}]"
        job = cluster.job(*arguments, "--set", dead, "--set", "attempts=1")
        output = await asyncio.to_thread(finished, job)
    assert job.returncode == 1, output
    assert figures(out)["failed"] == 3 and "infrastructure" in output
    job = cluster.job(*arguments)
    output = finished(job)
    assert (job.returncode, figures(out)["ok"]) == (0, 3), output


def test_a_signal_while_services_start_ends_the_command_at_once(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.job("--run-dir", str(tmp_path / "run"), "--set", "dataset.limit=1", "--fresh")
    until(job, r"service retriever: redeployed|service retriever: is redeployed")
    job.send_signal(signal.SIGTERM)
    output = finished(job)
    assert job.returncode == 143 and "stopped before the first task" in output, output
    output = finished(cluster.job("--run-dir", str(tmp_path / "run"), "--set", "dataset.limit=1"))
    assert "1 ok" in output


def test_a_tau2_run_whose_driver_is_killed_is_finished_by_the_same_command(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The second benchmark, on the services of the first."""
    run_dir, out = tmp_path / "run", tmp_path / "figures.json"
    arguments = ("--run-dir", str(run_dir), "--json", str(out), "--set", "concurrency=4")
    job = cluster.job(*arguments, script="jobs/tau2.py")
    until(job, r"^\[TAU2_TASK_COMPLETE\] .* status=done", times=6)
    job.send_signal(signal.SIGKILL)
    finished(job)
    output = finished(cluster.job(*arguments, script="jobs/tau2.py"))
    last = figures(out)
    assert (last["ok"], last["planned"], last["exit_code"]) == (20, 20, 0), output
    assert 0.5 <= last["accuracy"] < 1.0
    assert last["protocol"] == "service_desk (built in, not tau2-bench)"
    assert sorted(counted(run_dir)) == sorted(set(counted(run_dir)))
    written = json.loads((run_dir / "tau2" / "service_desk.json").read_text())
    rewards = [simulation["reward_info"]["reward"] for simulation in written["simulations"]]
    assert (len(rewards), sum(rewards)) == (20, 20 * last["accuracy"])
    replayed = [
        json.loads(row["detail"])["replayed_calls"]
        for row in rows(run_dir, "kind", "detail")
        if row["kind"] == "result"
    ]
    assert max(replayed) > 0, "a dialogue that was cut goes on in its middle"
    assert "No model is called." in finished(cluster.job(*arguments, script="jobs/tau2.py"))
