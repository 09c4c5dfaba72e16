"""The HLE job over vLLM itself, on a CPU: engine, tool parsing, streaming, usage and errors are real.

The model is tiny and random; a strict schema makes what it calls valid, and nothing makes it right.
One cluster and one start of the engine for all.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ray_app import events
from ray_app.chat import ChatRequest, Router
from ray_app.config import Endpoint, ModelConfig, Sampling
from ray_app.errors import AccessDenied, ContextOverflow
from ray_app.records import Message
from tests.jobs.cluster import ROOT, Cluster, finished, made
from tests.tiny_model import CONTEXT, make_tiny_model

pytestmark = pytest.mark.cluster

QUESTIONS = 60
REPLY_TOKENS = 32
# Builds every application of the Serve configs that it is given, as `serve run` does.
BUILD = """
import sys
from ray_app import ray_cluster, services
ray_cluster.connect(print)
for path in sys.argv[1:]:
    for service in services.read_serve_config(path).services.values():
        services._builder(service)(services._arguments(service))
        print("built", path, service.name)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Cluster]:
    """configs/serve_cpu.yaml with the tiny model in place of its own, and a judge that gives verdicts."""
    values = yaml.safe_load((ROOT / "configs" / "serve_cpu.yaml").read_text())
    for app in values["applications"]:
        if app["name"] == "models":
            app["args"]["models"][0] |= {
                "name": "tiny",
                "source": str(tiny),
                "max_model_len": CONTEXT,
                "kv_cache_gib": 1,
                "reasoning_parser": None,
            }
    judge = {"name": "baseline", "route_prefix": "/baseline", "import_path": "ray_app.app:baseline"}
    values["applications"].append(judge)
    with made(tmp_path_factory.mktemp("vllm"), values) as found:
        found.start_head(num_cpus=6)
        yield found


@pytest.fixture(scope="module")
def first_run(cluster: Cluster, tiny: Path) -> tuple[Path, str]:
    """The run directory of a run of the whole sample, and what it printed."""
    expert = {"model": "tiny", "sampling": {"max_tokens": REPLY_TOKENS}}
    config = {
        "models": {
            "tiny": {
                "endpoints": [{"service": "models"}],
                "context_length": CONTEXT,
                "tokenizer": str(tiny),
                "tool_choice": "required",
                "strict_tools": True,
            },
            "baseline": {"endpoints": [{"service": "baseline"}], "context_length": 131072},
        },
        "orchestrator": {"model": "tiny", "sampling": {"max_tokens": 300}},
        "judge": {"model": "baseline"},
        "tools": {
            "enhance_reasoning": {"reasoner-1": expert},
            "search": {"search-1": expert},
            "answer": {"answer-1": expert},
        },
        "limits": {"max_rounds": 3},
        "concurrency": 32,
    }
    (cluster.folder / "run.yaml").write_text(yaml.safe_dump(config))
    return cluster.folder / "first", run(cluster, cluster.folder / "first")


def run(cluster: Cluster, run_dir: Path, *more: str) -> str:
    config = str(cluster.folder / "run.yaml")
    out = str(run_dir.with_suffix(".json"))
    job = cluster.job("--config", config, "--run-dir", str(run_dir), "--json", out, *more)
    output = finished(job)
    assert job.returncode == 0, output
    return output


def test_a_run_of_the_whole_sample_through_the_engine_is_accounted_for(first_run: tuple[Path, str]) -> None:
    run_dir, output = first_run
    figures = json.loads(run_dir.with_suffix(".json").read_text())
    assert "service models: ready after" in output
    assert figures["planned"] == QUESTIONS == figures["ok"] + figures["limited"]
    assert figures["ok"] > 0, "some task was answered"
    rows = [row for batch in events.read(run_dir) for row in batch.to_pylist()]
    calls = [row for row in rows if row["kind"] == "model_call" and row["model"] == "tiny"]
    assert {row["status"] for row in calls} == {"ok"}
    assert {row["endpoint"].rpartition("/models/")[2] for row in calls} == {"v1"}
    assert all(row["prompt_tokens"] > 0 and row["completion_tokens"] > 0 for row in calls)
    assert all(row["prefill_s"] > 0 for row in calls)
    assert sum(row["cached_tokens"] for row in calls) > 0, "turns of a task share their beginning"
    assert not [row for row in rows if row["kind"] == "turn" and row["status"] == "invalid"]


def test_what_runs_is_what_the_job_would_deploy_and_is_used(
    cluster: Cluster, first_run: tuple[Path, str]
) -> None:
    output = run(cluster, cluster.folder / "second", "--set", "dataset.limit=1")
    assert output.count("running, same config and code") == 3, output


async def test_errors_of_the_engine_end_in_their_class_and_its_usage_is_exact(
    cluster: Cluster, first_run: tuple[Path, str], tiny: Path
) -> None:
    endpoint = Endpoint(base_url=f"{cluster.http}/models/v1")
    model = ModelConfig(endpoints=(endpoint,), context_length=CONTEXT)
    unknown = model.model_copy(update={"served_name": "nobody"})
    router = Router({"tiny": model, "unknown": unknown}, {})

    def asked(name: str, text: str) -> ChatRequest:
        return ChatRequest(name, (Message("user", text),), Sampling(max_tokens=REPLY_TOKENS))

    try:
        with pytest.raises(ContextOverflow):
            await router.complete(asked("tiny", "x" * CONTEXT))
        with pytest.raises(AccessDenied):
            await router.complete(asked("unknown", "hello"))
        reply = await router.complete(asked("tiny", "hello"))
    finally:
        await router.close()
    # One token a character; the template's marks are one each.
    marks = ["<|im_start|>", "user\n", "hello", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
    assert reply.usage.prompt_tokens == sum(1 if mark[0] == "<" else len(mark) for mark in marks)
    assert 0 < reply.usage.completion_tokens <= REPLY_TOKENS
    assert reply.model == "tiny"


def test_the_pressure_on_the_engine_is_on_rays_metrics_port_under_the_served_name(
    cluster: Cluster, first_run: tuple[Path, str]
) -> None:
    [target] = json.loads((cluster.temporary / "prom_metrics_service_discovery.json").read_text())
    pages = [
        urllib.request.urlopen(f"http://{address}/metrics", timeout=30).read().decode()
        for address in target["targets"]
        if address.count(":") == 1
    ]
    text = "\n".join(pages)
    for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"):
        assert re.search(rf'^ray_vllm_{name}{{[^}}]*model_name="tiny"[^}}]*}} ', text, re.MULTILINE), name


def test_every_application_of_every_serve_config_is_built_without_a_gpu(
    cluster: Cluster, first_run: tuple[Path, str]
) -> None:
    configs = [ROOT / "serve_config.yaml", *sorted((ROOT / "configs").glob("serve_*.yaml"))]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *map(str, configs)],
        cwd=ROOT,
        env=cluster.environ(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    named = [app for path in configs for app in yaml.safe_load(path.read_text())["applications"]]
    assert done.stdout.count("built ") == len(named) > len(configs)
