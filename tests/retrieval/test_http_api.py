from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from ray_app.errors import RetrieverError
from ray_app.records import Hit, Retrieval
from ray_app.retrieval.batcher import QueueFull
from ray_app.retrieval.http_api import MAX_BODY_BYTES, build_http_app
from ray_app.retrieval.index import UnknownScope
from ray_app.retrieval.search import BadQuery, Query


class Recorder:
    """Answers each query with two hits and remembers it; a query that names an error raises it.

    A query about the web has brought one hit from there, or none and the reason.
    """

    def __init__(self) -> None:
        self.asked: list[Query] = []

    async def search(self, query: Query) -> Retrieval:
        self.asked.append(query)
        match query.text:
            case "unknown":
                raise UnknownScope("unknown question id 'q9'")
            case "full":
                raise QueueFull("9 queries wait")
            case "bad":
                raise BadQuery("the query is empty")
            case "web":
                return Retrieval((Hit(3, "local", 0.5), Hit(-1, "page", -1.0, "tavily")), 0.012, 2)
            case "cached web":
                return Retrieval((Hit(-1, "page", -1.0, "tavily"),))
            case "no web":
                return Retrieval((), 0.01, 1, "Tavily /extract: naïve\nrefusal")
        return Retrieval((Hit(3, f"about {query.text}", 0.5), Hit(4, "more", 0.25)))

    async def health(self) -> Mapping[str, Any]:
        if self.asked:
            raise RetrieverError("a trial search failed")
        return {"status": "ok", "documents": 2}


@pytest.fixture
def service() -> Recorder:
    return Recorder()


@pytest.fixture
async def client(service: Recorder) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://retriever") as client:
        yield client


async def test_one_query_gives_a_list_of_one_hit_list(client: httpx.AsyncClient, service: Recorder) -> None:
    body = {"queries": ["ice"], "topk": 50, "return_scores": True, "eid": "q1", "new_cache_dir": "x", "y": 1}
    answer = await client.post("/retrieve", json=body)
    assert answer.status_code == 200
    assert answer.json() == [
        [
            {"document": {"id": 3, "content": "about ice"}, "score": 0.5, "source": "local"},
            {"document": {"id": 4, "content": "more"}, "score": 0.25, "source": "local"},
        ]
    ]
    assert service.asked == [Query("ice", "q1", 50)]


async def test_without_scores_hits_are_bare_documents(client: httpx.AsyncClient) -> None:
    answer = await client.post("/retrieve", json={"queries": ["ice"]})
    assert answer.json() == [[{"id": 3, "content": "about ice"}, {"id": 4, "content": "more"}]]


async def test_a_hit_of_the_web_has_a_negative_score_and_no_id(client: httpx.AsyncClient) -> None:
    answer = await client.post("/retrieve", json={"queries": ["web"], "return_scores": True})
    assert answer.json() == [
        [
            {"document": {"id": 3, "content": "local"}, "score": 0.5, "source": "local"},
            {"document": {"content": "page"}, "score": -1.0, "source": "tavily"},
        ]
    ]
    bare = await client.post("/retrieve", json={"queries": ["web"]})
    assert bare.json() == [[{"id": 3, "content": "local"}, {"content": "page"}]]


@pytest.mark.parametrize(
    ("queries", "cost", "calls", "error"),
    [
        (["ice"], None, None, None),
        (["web"], "0.012000", "2", None),
        (["cached web"], "0.000000", "0", None),
        (["ice", "web", "no web", "no web"], "0.032000", "4", "Tavily /extract: na?ve refusal"),
    ],
)
async def test_headers_tell_what_the_web_cost_and_what_went_wrong(
    client: httpx.AsyncClient, queries: list[str], cost: str | None, calls: str | None, error: str | None
) -> None:
    answer = await client.post("/retrieve", json={"queries": queries})
    names = ("x-web-cost-usd", "x-web-calls", "x-web-error")
    assert tuple(answer.headers.get(name) for name in names) == (cost, calls, error)


@pytest.mark.parametrize("body", [{}, {"topk": None, "eid": None}, {"topk": 0}])
async def test_absent_null_and_zero_topk_mean_five(
    client: httpx.AsyncClient, service: Recorder, body: dict[str, Any]
) -> None:
    await client.post("/retrieve", json={"queries": ["ice"], **body})
    assert service.asked == [Query("ice", None, 5)]


async def test_several_queries_are_answered_in_order(client: httpx.AsyncClient) -> None:
    answer = await client.post("/retrieve", json={"queries": ["ice", "fire", "sand"]})
    assert [hits[0]["content"] for hits in answer.json()] == ["about ice", "about fire", "about sand"]


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 422, "body: Invalid JSON"),
        (b"\xff\xfe", 422, "body: Invalid JSON"),
        (b'{"queries": ["\xff"]}', 422, "body: Invalid JSON"),
        (b"[]", 422, "body: Input should be"),
        (b"{}", 422, "queries: Field required"),
        (b'{"queries": []}', 422, "queries: List should have at least 1 item"),
        (b'{"queries": "ice"}', 422, "queries: Input should be a valid"),
        (b'{"queries": [null]}', 422, "queries.0: Input should be a valid string"),
        (b'{"queries": ["ice"], "topk": -1}', 422, "topk: Input should be greater than or equal to 0"),
        (b'{"queries": ["ice"], "topk": 1001}', 422, "topk: Input should be less than or equal to 1000"),
        (b'{"queries": ["ice"], "topk": 1e99}', 422, "topk: "),
        (b'{"queries": ["ice", "bad"]}', 422, "the query is empty"),
        (b'{"queries": ["unknown"]}', 404, "unknown question id 'q9'"),
        (b'{"queries": ["full"]}', 503, "9 queries wait"),
        (b'{"queries": ["' + b"x" * MAX_BODY_BYTES + b'"]}', 413, "the request is larger than"),
    ],
)
async def test_a_refusal_has_its_status_and_one_line(
    client: httpx.AsyncClient, body: bytes, status: int, detail: str
) -> None:
    answer = await client.post("/retrieve", content=body)
    assert answer.status_code == status
    assert answer.json()["detail"].startswith(detail)
    assert "\n" not in answer.json()["detail"]
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)


async def test_health_is_503_when_the_service_cannot_search(client: httpx.AsyncClient) -> None:
    fine = await client.get("/health")
    assert (fine.status_code, fine.json()) == (200, {"status": "ok", "documents": 2})
    await client.post("/retrieve", json={"queries": ["ice"]})
    broken = await client.get("/health")
    assert (broken.status_code, broken.json()) == (503, {"detail": "a trial search failed"})


async def test_the_schema_names_the_request_fields(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/retrieve"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"queries", "topk", "return_scores", "eid"}
