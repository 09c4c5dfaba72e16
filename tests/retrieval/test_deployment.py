"""The retriever as Serve runs it: over HTTP and by handle, with the real encoder.

Ray is imported inside the fixtures: its import warns, and warnings of a test module's import are errors
before any mark of the module counts.
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from ray_app.errors import DatasetError, RetrieverError
from ray_app.retrieval.search import BadQuery
from tests.ray_marks import RAY
from tests.retrieval.data import document, rows, write_examples, write_jsonl
from tests.retrieval.serving import serving

if TYPE_CHECKING:
    from ray_app.retrieval.client import HandleRetriever

pytestmark = RAY

APP = "retriever-under-test"


@dataclass(frozen=True)
class Running:
    url: str
    client: HandleRetriever


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from ray import serve

    from ray_app.retrieval.client import HandleRetriever
    from ray_app.retrieval.config import RetrieverConfig
    from ray_app.retrieval.deployment import retriever_app

    folder = tmp_path_factory.mktemp("retriever")
    config = RetrieverConfig(
        corpus_jsonl=write_jsonl(folder / "corpus.jsonl", rows()),
        examples=write_examples(folder / "examples.json"),
        cache_dir=folder / "cache",
        max_ongoing_requests=32,
        max_queued_requests=64,
    )
    with serving(num_cpus=4) as url:
        serve.run(retriever_app(config, "digest-of-the-service"), name=APP, route_prefix="/")
        yield Running(url, HandleRetriever(APP, timeout_s=30))


async def test_http_answers_with_the_documents_of_the_scope(running: Running) -> None:
    question = "What did surveyors say about the glacier in the south?"
    body = {"queries": [question], "topk": 3, "return_scores": True, "eid": "odd"}
    async with httpx.AsyncClient(base_url=running.url) as http:
        answer = await http.post("/retrieve", json=body)
        unknown = await http.post("/retrieve", json={"queries": [question], "eid": "../nobody"})
        missing = await http.post("/retrieve", json={"queries": [question]})
    [hits] = answer.json()
    assert answer.status_code == 200
    assert hits[0]["document"] == {"id": 1000 + 7 * 13, "content": document("glacier", "south")}
    assert [hit["source"] for hit in hits] == ["local"] * 3
    assert all(hit["score"] > 0.1 for hit in hits)
    assert unknown.status_code == 404
    assert "'../nobody'" in unknown.json()["detail"]
    assert missing.status_code == 422


async def test_health_tells_what_is_served(running: Running) -> None:
    async with httpx.AsyncClient(base_url=running.url) as http:
        answer = await http.get("/health")
    assert answer.status_code == 200
    health = answer.json()
    assert (health["status"], health["documents"], health["encoder"]) == ("ok", 48, "minilm")
    assert health["digest"] == "digest-of-the-service"


async def test_the_handle_finds_what_http_finds(running: Running) -> None:
    body = {"queries": ["the old railway"], "topk": 7, "return_scores": True, "eid": "even"}
    async with httpx.AsyncClient(base_url=running.url) as http:
        [by_http] = (await http.post("/retrieve", json=body)).json()
    from ray import serve

    found = await running.client.retrieve("the old railway", "even", 7)
    handle = serve.get_app_handle(APP)
    assert await handle.retrieve.remote("the old railway", scope_id="even", top_k=7) == found
    by_handle = found.hits
    assert [hit.document_id for hit in by_handle] == [hit["document"]["id"] for hit in by_http]
    assert [hit.text for hit in by_handle] == [hit["document"]["content"] for hit in by_http]
    assert (await running.client.info())["digest"] == "digest-of-the-service"


async def test_mistakes_arrive_by_handle_as_our_own_errors_and_are_not_repeated(running: Running) -> None:
    from ray_app.retrieval.client import HandleRetriever

    repeats: list[RetrieverError] = []
    client = HandleRetriever(APP, on_retry=repeats.append)
    with pytest.raises(DatasetError, match=r"^unknown question id 'nobody'") as unknown:
        await client.retrieve("glacier", "nobody", 5)
    with pytest.raises(BadQuery, match=r"^the query is empty"):
        await client.retrieve("", "odd", 5)
    assert str(pickle.loads(pickle.dumps(unknown.value))) == str(unknown.value)
    assert repeats == []


async def test_many_at_once_are_all_answered_each_with_its_own(running: Running) -> None:
    texts = [
        document(topic, place) for topic in ("glacier", "library") for place in ("north", "south", "east")
    ]
    asked = [texts[i % len(texts)] for i in range(60)]
    answers = await asyncio.gather(*(running.client.retrieve(text, "all", 1) for text in asked))
    assert [found.hits[0].text for found in answers] == asked


async def test_beyond_its_bounds_the_service_says_503_with_retry_after(running: Running) -> None:
    # 200 queries of one request against the 32 that a replica holds.
    async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
        flood = await http.post("/retrieve", json={"queries": ["the glacier"] * 200, "eid": "odd"})
        after = await http.post("/retrieve", json={"queries": ["the glacier"] * 32, "eid": "odd"})
    assert flood.status_code == 503
    assert flood.headers["retry-after"] == "1"
    assert after.status_code == 200
    assert len(after.json()) == 32


async def test_an_application_that_is_not_there_is_a_retriever_error_after_three_tries(
    running: Running,
) -> None:
    from ray_app.retrieval.client import HandleRetriever

    repeats: list[RetrieverError] = []
    with pytest.raises(RetrieverError, match="'nowhere' failed"):
        await HandleRetriever("nowhere", on_retry=repeats.append).retrieve("x", None, 1)
    assert len(repeats) == 2


async def test_a_call_over_its_time_is_a_retriever_error(running: Running) -> None:
    from ray_app.retrieval.client import HandleRetriever

    with pytest.raises(RetrieverError, match=r"did not answer in 0\.0001 s"):
        await HandleRetriever(APP, timeout_s=0.0001).retrieve("x", "odd", 1)


async def test_an_async_actor_can_call_it(running: Running) -> None:
    import ray

    from ray_app.retrieval.client import HandleRetriever

    class Worker:
        def __init__(self) -> None:
            self.client = HandleRetriever(APP, timeout_s=30)

        async def first(self, query: str) -> Any:
            return (await self.client.retrieve(query, "odd", 1)).hits[0]

        def pid(self) -> int:
            return os.getpid()

    worker = ray.remote(Worker).options(num_cpus=0).remote()
    hit = await worker.first.remote("glacier in the south")
    assert hit.text == document("glacier", "south")
    assert await worker.pid.remote() != os.getpid()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "give index_dir or corpus_jsonl"),
        ({"index_dir": "a", "corpus_jsonl": "b", "unscoped": "search"}, "and not both"),
        ({"index_dir": "a"}, "set unscoped: search"),
        ({"index_dir": "a", "unscoped": "search", "mode": "postfilter"}, "expected 'exact' or"),
        ({"index_dir": "a", "unscoped": "search", "topk": 5}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_starts(settings: dict[str, str], complaint: str) -> None:
    from ray_app.retrieval.config import RetrieverConfig

    with pytest.raises(ValueError, match=complaint):
        RetrieverConfig.model_validate(settings)
