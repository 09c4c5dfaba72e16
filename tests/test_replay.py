"""A run replayed by the real engine: equal decisions from the record alone, or the first other one named."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from analysis.log import open_run
from analysis.summary import summarise
from ray_app import events
from ray_app.chat import ChatRequest
from ray_app.comparison import compare, traces
from ray_app.planning import Key
from ray_app.prompting import load_prompts
from ray_app.recording import Recording, counted
from ray_app.records import ChatReply
from ray_app.tau2.run import ReplayInWorker, Tau2Solver
from tests.ray_marks import RAY
from tests.replayed_runs import ENDS, TASKS, LiveInWorker, drive, replayed
from tests.tau2 import desk
from tests.tau2.replays import PROMPTS

pytestmark = RAY


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def recorded(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of end, stopped half-way and resumed, one worker of which was killed."""
    folder = tmp_path_factory.mktemp("recorded")
    run_dir, live = folder / "run", LiveInWorker(folder)
    first = asyncio.run(drive(run_dir, live, stop_after=3))
    assert 3 <= len(first.results) < len(TASKS)
    asyncio.run(drive(run_dir, live, attempts=2))
    results = events.results(run_dir).to_pylist()
    assert {row["task_id"]: (row["outcome"], row["error_kind"]) for row in results} == ENDS
    return run_dir


async def test_a_run_that_was_killed_and_resumed_replays_to_equal_decisions_and_ends(
    recorded: Path, tmp_path: Path
) -> None:
    found = await replayed(recorded, tmp_path / "replay")
    assert (found.replayed, found.diverged) == (len(TASKS), ())
    results = {row["task_id"]: row for row in events.results(tmp_path / "replay").to_pylist()}
    old = {row["task_id"]: row for row in events.results(recorded).to_pylist()}
    for name, end in ENDS.items():
        assert (results[name]["outcome"], results[name]["error_kind"]) == end
        assert (results[name]["error"], results[name]["payload_hash"]) == (
            old[name]["error"],
            old[name]["payload_hash"],
        )
    totals = summarise(open_run(tmp_path / "replay")).totals
    assert (totals.model_calls, totals.cost_usd, totals.counted_cost_usd) == (0, 0.0, 0.0)
    # A replay is a run like any other: it holds the whole record, byte for byte.
    for task in TASKS:
        there, here = (outputs(run, (task.rollout_key, 0)) for run in (recorded, tmp_path / "replay"))
        assert here and here.items() <= there.items()


async def test_dialogues_replay_to_equal_ones_and_another_prompt_or_seed_diverges(
    cluster: None, tmp_path: Path
) -> None:
    """One reply of each dialogue could not be used, and was asked for again."""
    tasks, run_dir = [desk.task(name) for name in list(desk.RAW)[:4]], tmp_path / "run"
    await drive(run_dir, DialoguesInWorker(), tasks)
    settings = desk.config()
    for name, now, diverged in (
        ("same", settings, 0),
        ("seed", settings.model_copy(update={"seed": 5}), len(tasks)),
    ):
        make = ReplayInWorker(now, PROMPTS, None)
        await drive(tmp_path / name, make, tasks, replays=run_dir)
        found = compare(traces(run_dir), traces(tmp_path / name), len(tasks))
        assert (found.replayed, len(found.diverged)) == (len(tasks), diverged)
    rows = events.read(tmp_path / "same").read_all().to_pylist()
    refused = [row for row in rows if row["status"] == "error"]
    assert len(refused) == len(tasks) and all(row["is_replayed"] for row in refused)


class DialoguesInWorker:
    """The service desk, with an agent whose first reply of a dialogue is empty."""

    def __call__(self) -> Tau2Solver:
        return desk.solver(desk.BaselineModel(_at_first_empty))


def _at_first_empty(request: ChatRequest) -> ChatReply | None:
    is_agent = request.messages[0].content.startswith("You are an agent")
    is_first = sum(message.role == "assistant" for message in request.messages) == 1
    is_told = "could not be used" in request.messages[-1].content
    return ChatReply(" ") if is_agent and is_first and not is_told else None


def outputs(run_dir: Path, key: Key) -> dict[tuple[int, str], tuple[str, object]]:
    record = Recording(run_dir, counted(run_dir)).records([key])[key]
    return {(call.call_seq, call.request_hash): (call.body, call.error) for call in record.calls}


async def test_a_changed_prompt_diverges_where_it_is_first_used_and_nowhere_else(
    recorded: Path, tmp_path: Path
) -> None:
    ours = load_prompts()
    changed = replace(ours, texts=ours.texts | {"reasoning": ours.texts["reasoning"] + "Be brief.\n"})
    found = await replayed(recorded, tmp_path / "replay", changed)
    reached = {"exact", "judged", "unsure", "flaky", "lost", "refused", "long"}
    assert {one.task_id for one in found.diverged} == reached and found.equal == len(TASKS) - len(reached)
    exact = next(one for one in found.diverged if one.task_id == "exact")
    # Turn 0: choice, query, retrieval; turn 1: choice, and then the program is asked for.
    assert (exact.turn, exact.call) == (1, 4)
    assert exact.recorded.startswith("enhance_reasoning/reasoner-1 model_call, request ")
    assert exact.now.startswith("the same, request ")
    results = events.results(tmp_path / "replay").to_pylist()
    kinds = Counter(row["error_kind"] for row in results if row["task_id"] in reached)
    assert kinds == {"replay": len(reached)}
    assert all("diverged: turn 1, call" in row["error"] for row in results if row["error_kind"] == "replay")
