"""Replicas while things change: knobs are turned, versions roll, callers give up, encoders break."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ray_app.errors import RetrieverError
from ray_app.records import Retrieval
from ray_app.retrieval.batcher import QueueFull
from ray_app.retrieval.search import Query
from tests.ray_marks import RAY
from tests.retrieval.data import document, rows, write_examples, write_jsonl
from tests.retrieval.serving import WAIT_S, serving, until

if TYPE_CHECKING:
    from ray_app.retrieval.client import HandleRetriever
    from ray_app.retrieval.config import RetrieverConfig

pytestmark = RAY

ENCODER = "tests.retrieval.gated_encoder:GatedEncoder"
GLACIER = document("glacier", "south")
APP = "replicas-under-test"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with serving(num_cpus=4) as url:
        yield url


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RetrieverConfig:
    from ray_app.retrieval.config import RetrieverConfig

    folder = tmp_path_factory.mktemp("index")
    return RetrieverConfig(
        corpus_jsonl=write_jsonl(folder / "corpus.jsonl", rows()),
        examples=write_examples(folder / "examples.json"),
        cache_dir=folder / "cache",
        encoder=ENCODER,
        long_tokens=1000,
    )


@pytest.fixture
def client(cluster: str, config: RetrieverConfig) -> HandleRetriever:
    from ray_app.retrieval.client import HandleRetriever

    deploy(config)
    return HandleRetriever(APP, timeout_s=30)


def deploy(config: RetrieverConfig, **user_config: Any) -> None:
    from ray import serve

    from ray_app.retrieval.deployment import retriever_app

    serve.run(retriever_app(config, "", user_config), name=APP, route_prefix="/")


async def stats() -> dict[str, Any]:
    from ray import serve

    told: dict[str, Any] = await serve.get_app_handle(APP).stats.remote()
    return told


async def hold(client: HandleRetriever, gate: Path) -> asyncio.Task[Retrieval]:
    """Keeps the encoder busy until the file `gate` is made."""
    held = asyncio.create_task(client.retrieve(f"gate {gate}", "all", 1))
    await until(gate.with_suffix(".entered").exists)
    return held


async def waiting(count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await stats())["waiting"] != count:
            pass


async def test_a_serve_config_turns_knobs_without_a_restart(
    client: HandleRetriever, config: RetrieverConfig
) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationStatus, ServeDeploySchema

    args = config.model_dump(mode="json", include=config.model_fields_set)

    async def deploy_file(**user_config: Any) -> None:
        """As `serve deploy` does with a file of this content."""
        deployments = [{"name": "retriever", "user_config": user_config}]
        app = {
            "name": APP,
            "import_path": "ray_app.app:retriever",
            "args": args,
            "deployments": deployments,
        }
        schema = ServeDeploySchema.model_validate({"applications": [app]})
        await asyncio.to_thread(_get_global_client().deploy_apps, schema, _blocking=True)
        await until(lambda: serve.status().applications[APP].status == ApplicationStatus.RUNNING)

    await deploy_file()
    before, replica = await client.retrieve(GLACIER, "all", 50), (await stats())["pid"]
    await deploy_file(min_score=0.99, faiss_k=7)
    after = await client.retrieve(GLACIER, "all", 50)
    assert [hit.text for hit in after.hits] == [GLACIER] and len(before.hits) > 10
    assert "postfilter:7, score > 0.99" in (await client.info())["policy"]
    assert (await stats())["pid"] == replica
    await deploy_file(min_scores=0.5)
    info = await client.info()
    assert "unknown key 'min_scores'" in info["knobs_error"] and "score > 0.99" in info["policy"]
    assert (await stats())["pid"] == replica, "a mistake in a knob takes no service down"


async def test_answers_leave_a_group_as_they_come(client: HandleRetriever, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    held = await hold(client, gate)
    quick = asyncio.create_task(client.retrieve(GLACIER, "nobody", 1))
    slow = asyncio.create_task(client.retrieve(GLACIER, "all", 1))
    with pytest.raises(Exception, match="unknown question id 'nobody'"):
        await quick
    assert not slow.done()
    gate.touch()
    assert (await slow).hits[0].text == GLACIER
    await held


async def test_queries_of_callers_who_gave_up_are_not_encoded(
    client: HandleRetriever, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    held = await hold(client, gate)
    encoded = (await stats())["queries"]
    asked = [asyncio.create_task(client.retrieve(f"query {i}", "all", 1)) for i in range(30)]
    await waiting(30)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await waiting(0)
    gate.touch()
    await held
    assert (await client.retrieve(GLACIER, "all", 1)).hits[0].text == GLACIER
    assert (await stats())["queries"] == encoded + 2


async def test_a_full_replica_refuses_each_query_by_itself_and_the_client_asks_again(
    client: HandleRetriever, config: RetrieverConfig, tmp_path: Path
) -> None:
    deploy(config.model_copy(update={"max_ongoing_requests": 4}))
    gate = tmp_path / "gate"
    held = await hold(client, gate)
    refused: list[RetrieverError] = []
    client._on_retry = refused.append
    asked = [asyncio.create_task(client.retrieve(GLACIER, "all", 1)) for _ in range(6)]
    await until(lambda: len(refused) >= 8)  # four times the two that find no room, and none gives up
    gate.touch()
    assert [found.hits[0].text for found in await asyncio.gather(*asked)] == [GLACIER] * 6
    await held
    assert {type(error) for error in refused} == {QueueFull}
    with pytest.raises(RetrieverError, match=r"^ValueError: this encoder is broken"):
        await client.retrieve("broken", "all", 1)


async def test_a_new_version_takes_over_without_losing_a_query(
    client: HandleRetriever, config: RetrieverConfig, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    held = await hold(client, gate)
    asked = [asyncio.create_task(client.retrieve(GLACIER, "all", 1)) for _ in range(50)]
    await waiting(50)
    rollout = asyncio.create_task(asyncio.to_thread(deploy, config.model_copy(update={"drain_s": 61.0})))
    gate.touch()
    answers = await asyncio.gather(held, *asked)
    assert [found.hits[0].text for found in answers[1:]] == [GLACIER] * 50
    await rollout
    assert (await client.retrieve(GLACIER, "all", 1)).hits[0].text == GLACIER


async def test_batches_and_waits_are_on_rays_metrics_port(client: HandleRetriever) -> None:
    import ray

    await client.retrieve(GLACIER, "all", 1)
    port = ray.nodes()[0]["MetricsExportPort"]

    def exported() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            text = reply.read().decode()
        names = ("batch_size", "padding_waste", "queue_s", "encode_s", "finish_s")
        return (
            all(f"ray_retriever_{name}_count" in text for name in names) and "ray_retriever_waiting" in text
        )

    await until(exported)


async def test_an_encoder_that_breaks_is_seen_by_the_health_check(config: RetrieverConfig) -> None:
    from ray_app.retrieval.deployment import RetrieverDeployment

    replica = RetrieverDeployment(config, "")
    await replica.check_health()
    await until(lambda: replica._progressed_at > 0)
    replica._retriever.probe = lambda: replica._retriever.batcher.submit(Query("broken", "all", 1))  # type: ignore[method-assign]
    await replica.check_health()  # it has answered a moment ago
    replica._progressed_at -= 60
    with pytest.raises(RetrieverError, match="a trial search failed: ValueError: this encoder is broken"):
        await replica.check_health()
    replica._retriever.close()
    with pytest.raises(RetrieverError, match="has ended"):
        await replica.check_health()


def test_replicas_follow_the_queries_that_wait() -> None:
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    from ray_app.retrieval.deployment import replicas_for

    def context(waiting: dict[str, float] | None, queued: float | None) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=None,
            deployment_name="retriever",
            app_name=APP,
            current_num_replicas=2,
            target_num_replicas=2,
            running_replicas=[],
            total_num_requests=0.0,
            total_queued_requests=queued,
            aggregated_metrics=None if waiting is None else {"waiting": waiting},
            raw_metrics=None,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=9,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=None,
            config=AutoscalingConfig(target_ongoing_requests=100),
        )

    assert replicas_for(context({"a": 250.0, "b": 90.0}, 10.0)) == (3.5, {})
    assert replicas_for(context(None, None)) == (0.0, {})
