"""The web behind a retriever on Serve: who is sent there, who pays, and who must not notice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from ray_app.errors import DatasetError
from ray_app.retrieval.web_config import WebConfig
from tests.ray_marks import RAY
from tests.retrieval.data import document, rows, write_jsonl
from tests.retrieval.serving import free_port, serving
from tests.retrieval.tavily_server import KEY, TavilyServer, serving_tavily, text_of

if TYPE_CHECKING:
    from ray_app.retrieval.client import HandleRetriever

pytestmark = RAY

GLACIER = document("glacier", "south")
APP = "retriever-with-web"


@dataclass(frozen=True)
class Running:
    url: str
    client: HandleRetriever
    web_port: int

    def web(self, *urls: str) -> AbstractAsyncContextManager[TavilyServer]:
        """What the retriever finds on the web meanwhile, the best first."""
        scores = [(url, 1 - place / 10) for place, url in enumerate(urls)]
        return serving_tavily(*scores, port=self.web_port)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from ray import serve

    from ray_app.retrieval.client import HandleRetriever
    from ray_app.retrieval.config import RetrieverConfig
    from ray_app.retrieval.deployment import retriever_app

    folder, port = tmp_path_factory.mktemp("retriever"), free_port()
    ids = [row["id"] for row in rows()]
    examples = folder / "examples.json"
    examples.write_text(json.dumps({"few": ids[13:15], "many": ids}), "utf-8")
    config = RetrieverConfig(
        corpus_jsonl=write_jsonl(folder / "corpus.jsonl", rows()),
        examples=examples,
        cache_dir=folder / "indexes",
        encoder="tests.retrieval.data:WordEncoder",
        web=WebConfig(api_key_env="WEB_KEY", base_url=f"http://127.0.0.1:{port}", cache_dir=folder / "web"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEB_KEY", KEY)  # before Ray starts, as its user would
        with serving(num_cpus=2) as url:
            serve.run(retriever_app(config), name=APP, route_prefix="/")
            yield Running(url, HandleRetriever(APP, timeout_s=30), port)


async def test_a_known_question_with_few_hits_gets_pages_once_paid_and_others_get_none(
    running: Running,
) -> None:
    ask = running.client.retrieve
    async with running.web("https://a.example", "https://b.example", "https://c.example") as web:
        many = await ask(GLACIER, "many", 5)
        with pytest.raises(DatasetError, match="unknown question id 'nobody'"):
            await ask(GLACIER, "nobody", 5)
        assert (many.cost_usd, many.web_error, web.asked) == (0.0, "", 0)
        found = await asyncio.gather(*(ask(GLACIER, "few", 4) for _ in range(5)))
        assert (len(web.searches), len(web.pages)) == (1, 2)
    assert [(hit.text, hit.score, hit.source) for hit in found[0].hits[2:]] == [
        (text_of("https://a.example").strip(), -1.0, "tavily"),
        (text_of("https://b.example").strip(), -2.0, "tavily"),
    ]
    assert (found[0].hits[0].text, found[0].hits[0].source) == (GLACIER, "local")
    assert sum(each.cost_usd for each in found) == pytest.approx(0.014)


@pytest.mark.long
async def test_a_fallback_that_dies_with_its_question_is_asked_again(running: Running) -> None:
    async with running.web("https://e.example") as web:
        web.gate.clear()
        asked = asyncio.create_task(running.client.retrieve("eastern glacier", "few", 3))
        await asyncio.wait_for(web.arrived.wait(), 20)
        [replica] = [
            each
            for each in psutil.Process().children(recursive=True)
            if each.cmdline()[:1] and each.cmdline()[0].startswith(f"ray::ServeReplica:{APP}:web")
        ]
        replica.kill()
        web.gate.set()
        found = await asked
    assert (found.web_error, [hit.source for hit in found.hits]) == ("", ["local", "local", "tavily"])


async def test_over_http_headers_tell_the_cost_and_a_repeat_is_free(running: Running) -> None:
    body = {"queries": ["south glacier"], "topk": 3, "eid": "few", "return_scores": True}
    async with (
        running.web("https://d.example"),
        httpx.AsyncClient(base_url=running.url, timeout=30) as http,
    ):
        paid, free = [await http.post("/retrieve", json=body) for _ in range(2)]
    text = text_of("https://d.example").strip()
    assert paid.json()[0][2] == {"document": {"content": text}, "score": -1.0, "source": "tavily"}
    assert paid.json() == free.json()
    assert [answer.headers["x-web-cost-usd"] for answer in (paid, free)] == ["0.012000", "0.000000"]


async def test_ordinary_queries_do_not_wait_for_a_fallback_and_a_failed_one_fails_nothing(
    running: Running,
) -> None:
    ask = running.client.retrieve
    async with running.web() as web:
        web.faults["/search"] = [(403, {})]
        web.gate.clear()
        waiting = asyncio.create_task(ask("glacier in the south", "few", 5))
        await asyncio.wait_for(web.arrived.wait(), 20)
        ordinary = await asyncio.gather(*(ask(GLACIER, "many", 5) for _ in range(20)))
        assert not waiting.done()
        assert {len(each.hits) for each in ordinary} == {5}
        web.gate.set()
        failed = await waiting
    assert [hit.source for hit in failed.hits] == ["local", "local"]
    assert (failed.web_error, failed.cost_usd) == ("Tavily /search: HTTP 403: refused Bearer ***", 0.0)
