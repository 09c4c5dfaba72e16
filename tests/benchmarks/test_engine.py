from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine import planning_s, run, session, write_finished
from benchmarks.figures import Figure, report
from benchmarks.load import Load, makespan_s
from benchmarks.stub_model import MODEL, Behaviour, serving
from ray_app.chat import ChatRequest, Router
from ray_app.config import ModelConfig, Sampling
from ray_app.records import Message

TINY = Load(tasks=8, turns=3, in_flight=4, behaviour=Behaviour(0.1, 300))


@pytest.mark.parametrize(("slots", "expected"), [(1, 10.0), (2, 7.0), (3, 5.0), (4, 4.0), (9, 4.0)])
def test_each_task_starts_in_order_on_the_slot_that_is_free_first(slots: int, expected: float) -> None:
    assert makespan_s([3.0, 1.0, 2.0, 4.0], slots) == pytest.approx(expected)


def test_the_order_of_the_tasks_decides_the_ideal_makespan() -> None:
    assert makespan_s([4.0, 1.0, 1.0, 2.0], 2) < makespan_s([1.0, 1.0, 2.0, 4.0], 2)


def test_latencies_depend_on_the_seed_alone_and_have_the_given_mean() -> None:
    behaviour = Behaviour(2.0, 0)
    latencies = [behaviour.latency_s(seed) for seed in range(4000)]
    assert latencies == [Behaviour(2.0, 9).latency_s(seed) for seed in range(4000)]
    assert statistics.fmean(latencies) == pytest.approx(2.0, rel=0.05)
    assert len(set(latencies)) == len(latencies)


def test_no_two_calls_of_a_load_share_their_latency_or_their_text() -> None:
    seeds = {TINY.call_seed(task, turn) for task in range(TINY.tasks) for turn in range(TINY.turns)}
    texts = {TINY.behaviour.text(seed) for seed in seeds}
    assert len(seeds) == len(texts) == TINY.calls
    assert sum(map(len, texts)) == TINY.text_bytes


async def test_the_server_answers_the_real_client_as_its_seed_says() -> None:
    behaviour = Behaviour(0.2, 5000)
    with serving(behaviour) as server:
        model = ModelConfig.model_validate({"endpoints": [{"base_url": server.url}]})
        router = Router({MODEL: model}, {}, environ={})
        try:
            assert await router.probe(MODEL) == ""
            for seed in (5, 6):  # on one connection
                sampling = Sampling.model_validate({"seed": seed})
                started = time.monotonic()
                reply = await router.complete(ChatRequest(MODEL, (Message("user", "x" * 100_000),), sampling))
                assert reply.content == behaviour.text(seed)
                assert time.monotonic() - started >= behaviour.latency_s(seed)
                assert 0 < reply.prefill_s < behaviour.latency_s(seed)
                assert reply.usage.completion_tokens > 0
        finally:
            await router.close()


def test_a_report_names_what_is_missed_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Figure("speed", 0.96, ">=", 0.95), Figure("memory", 11.0, "<=", 10.0, "%")
    assert report([good, Figure("told", 1.0)]) == 0
    assert report([good, bad], tmp_path / "f.json") == 1
    assert "MISSED (<= 10)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert rows[1] == {"name": "memory", "value": 11.0, "op": "<=", "target": 10.0}
    assert not Figure("unknown", float("nan"), "<=", 1.0).is_reached


async def test_the_log_of_a_finished_run_leaves_nothing_to_plan(tmp_path: Path) -> None:
    await write_finished(TINY, tmp_path)
    assert planning_s(TINY, tmp_path) > 0
    with pytest.raises(RuntimeError, match="1 tasks of a finished run"):
        planning_s(replace(TINY, tasks=TINY.tasks + 1), tmp_path)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_real_run_is_clocked_and_metered_to_its_last_commit(tmp_path: Path) -> None:
    with session():
        ran = run(TINY, tmp_path / "run")
        bare = run(replace(TINY, is_journalled=False), tmp_path / "bare")
    # An event loop's timer may be a millisecond early.
    assert 0.1 < ran.ratio < 1.02
    assert len(ran.lateness_s) == len(ran.meter.waits_s) == TINY.calls
    assert min(ran.lateness_s) > -0.002
    assert {"driver", "workers", "checkpoint actor", "raylet", "GCS"} <= ran.cpu_ms.keys()
    assert ran.meter.log_bytes > TINY.text_bytes
    assert bare.meter.log_bytes < ran.meter.log_bytes - TINY.text_bytes
    assert planning_s(TINY, tmp_path / "run") > 0
