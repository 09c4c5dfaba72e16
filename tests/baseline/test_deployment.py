"""The baseline as Serve runs it: over HTTP under a route prefix, and `info` by handle.

Ray is imported inside the fixture: its import warns, and warnings of a test module's import are errors
before any mark of the module counts.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.baseline.prompts import answer_request, context
from tests.ray_marks import RAY

pytestmark = RAY

APP = "baseline-under-test"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    import ray
    from ray import serve

    from ray_app.baseline.deployment import BaselineConfig, baseline_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    root = str(Path(__file__).parents[2])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(baseline_app(BaselineConfig(), "digest-of-the-service"), name=APP, route_prefix="/baseline")
    yield f"http://127.0.0.1:{port}/baseline"
    serve.shutdown()
    ray.shutdown()


def test_http_answers_whole_and_streamed(url: str) -> None:
    request = answer_request("Which exception does `heapq.heappop` raise when the heap is empty?", context())
    whole = httpx.post(f"{url}/v1/chat/completions", json=request)
    assert whole.json()["choices"][0]["message"]["content"] == "<answer>IndexError</answer>"
    streamed = httpx.post(f"{url}/v1/chat/completions", json={**request, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "baseline"


def test_a_bad_request_keeps_its_openai_error_body(url: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "baseline", "messages": []})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


def test_the_handle_tells_what_is_deployed(url: str) -> None:
    from ray import serve

    info = serve.get_app_handle(APP).info.remote().result(timeout_s=30)
    assert info == {"digest": "digest-of-the-service", "models": "baseline"}
