from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from ray_app.config import Endpoint, ModelConfig
from ray_app.engine_metrics import EngineMetrics, Source, own_page, parse
from ray_app.governor import Pressure
from ray_app.route_limits import bounds, sources
from ray_app.slots import RouteKey

BARE = """# HELP vllm:kv_cache_usage_perc KV-cache usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.93
vllm:num_requests_waiting{engine="0",model_name="tiny"} 7.0
vllm:num_preemptions_total{engine="0",model_name="tiny"} 3.0
vllm:request_num_preemptions_sum{model_name="tiny"} 999
"""
NODE = """ray_vllm_kv_cache_usage_perc{NodeAddress="10.0.0.1",ReplicaId="a",model_name="big"} 0.2
ray_vllm_kv_cache_usage_perc{NodeAddress="10.0.0.1",ReplicaId="b",model_name="big"} 0.9
ray_vllm_num_requests_waiting{ReplicaId="a",model_name="big"} 2
ray_vllm_num_requests_waiting{ReplicaId="b",model_name="big"} 3
ray_vllm_num_requests_waiting_by_reason{ReplicaId="b",model_name="big",reason="capacity"} 3
ray_vllm_kv_cache_usage_perc{model_name="broken"} nothing
ray_tasks{State="RUNNING"} 3.0
"""


def test_a_page_of_either_kind_tells_the_pressure_of_each_model() -> None:
    assert parse(BARE) == {"tiny": Pressure(0.93, 7.0, 3.0)}
    # Replicas: the fullest, and all that wait; a model whose preemptions are not exported yet has none.
    assert parse(NODE) == {"big": Pressure(0.9, 5.0, 0.0)}


@pytest.mark.parametrize(
    ("base_url", "page"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/metrics"),
        ("http://localhost:8000/v1", "http://localhost:8000/metrics"),
        ("http://10.1.2.3:8000/v1", "http://10.1.2.3:8000/metrics"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/metrics"),
        ("https://api.example.com/v1", None),
        ("https://8.8.8.8/v1", None),
        ("http://127.0.0.1.example.com/v1", None),
        ("http://user@api.example.com/v1", None),
    ],
)
def test_only_private_addresses_are_asked_unbidden(base_url: str, page: str | None) -> None:
    assert own_page(base_url) == page


def test_the_config_decides_the_bounds_of_a_route_and_who_is_asked() -> None:
    endpoints = [
        {"base_url": "https://api.example.com/v1", "concurrency": 40},
        {"base_url": "http://127.0.0.1:9/v1", "concurrency": {"start": 8, "max": 16}},
        {"service": "llm", "metrics_url": None},
        {"base_url": "http://gpu-box:9/v1", "metrics_url": "http://gpu-box:9/metrics"},
    ]
    model = ModelConfig.model_validate({"endpoints": endpoints, "served_name": "tiny"})
    urls = {"llm": "http://127.0.0.1:8000/llm/v1"}
    found = {key.url: (b.start, b.floor, b.most) for key, b in bounds({"m": model}, urls).items()}
    assert found == {
        "https://api.example.com/v1": (40, 40, 40),
        "http://127.0.0.1:9/v1": (8, 1, 16),
        "http://127.0.0.1:8000/llm/v1": (128, 1, 1024),
        "http://gpu-box:9/v1": (128, 1, 1024),
    }
    asked = sources({"m": model}, urls, ["http://node:8080/metrics"])
    assert [[source.url for source in sources] for sources in asked.values()] == [
        [],
        ["http://127.0.0.1:9/metrics"],
        ["http://node:8080/metrics"],
        ["http://gpu-box:9/metrics"],
    ]
    assert {source.served_name for sources in asked.values() for source in sources} == {"tiny"}


@pytest.mark.parametrize("value", [0, -3, "much", {"start": 9, "max": 3}])
def test_a_limit_that_means_nothing_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        Endpoint.model_validate({"base_url": "http://127.0.0.1:9/v1", "concurrency": value})


async def test_an_engine_that_stops_telling_is_unknown_and_no_error() -> None:
    pages = [web.Response(text=BARE)]

    async def page(request: web.Request) -> web.Response:
        asked.set()
        return pages.pop() if pages else web.Response(status=500)

    asked = asyncio.Event()
    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    key, gone = RouteKey("tiny", "a"), RouteKey("tiny", "b")
    metrics = EngineMetrics(
        {
            key: [Source(f"http://{host}:{port}/metrics", "tiny", every_s=0.01)],
            gone: [Source("http://127.0.0.1:1/metrics", "tiny", every_s=0.01)],
        }
    )
    assert metrics.of(key) is None
    following = asyncio.create_task(metrics.follow())
    async with asyncio.timeout(20):
        while metrics.of(key) is None:  # noqa: ASYNC110  (another task reads the page)
            await asyncio.sleep(0.001)
        assert metrics.of(key) == Pressure(0.93, 7.0, 3.0)
        while metrics.of(key) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert metrics.of(gone) is None and not following.done()
    following.cancel()
    await runner.cleanup()
