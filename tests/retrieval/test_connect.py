"""The retriever behind a url: our own server, and foreign ones with the same contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from ray_app.errors import DatasetError, RetrieverError, ToolError
from ray_app.hle import make_solver
from ray_app.prompting import load_prompts
from ray_app.records import Hit, Retrieval
from ray_app.retrieval.connect import HttpRetriever
from tests.stand_ins import ScriptedModel, config, says

LOCAL = {"document": {"id": "7", "contents": "a local text"}, "score": 0.5}
PAGE = {"document": {"content": "a page"}, "score": -1, "source": "tavily"}


@asynccontextmanager
async def answering(body: Any, status: int = 200, **headers: str) -> AsyncIterator[HttpRetriever]:
    """A retriever whose server gives this one answer."""

    async def retrieve(request: web.Request) -> web.Response:
        named = {f"X-Web-{name.replace('_', '-')}": value for name, value in headers.items()}
        return web.json_response(body, status=status, headers=named)

    app = web.Application()
    app.router.add_post("/retrieve", retrieve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    retriever = HttpRetriever(f"http://127.0.0.1:{runner.addresses[0][1]}", 5.0)
    try:
        yield retriever
    finally:
        await retriever.close()
        await runner.cleanup()


async def asked(retriever: HttpRetriever) -> Retrieval:
    return await retriever.retrieve("ice", scope_id="q1", top_k=5)


async def test_our_server_says_what_the_web_cost() -> None:
    async with answering(
        [[LOCAL, PAGE]], Cost_USD="0.012000", Calls="2", Error="1 page was late"
    ) as retriever:
        assert await asked(retriever) == Retrieval(
            (Hit(7, "a local text", 0.5), Hit(-1, "a page", -1.0, "tavily")), 0.012, 2, "1 page was late"
        )


async def test_a_foreign_server_says_nothing_of_costs() -> None:
    async with answering([[LOCAL, PAGE]]) as retriever:
        found = await asked(retriever)
    assert (found.cost_usd, found.web_calls, found.web_error, len(found.hits)) == (0.0, 0, "", 2)


@pytest.mark.parametrize("cost", ["-1", "nan", "inf", "a lot"])
async def test_a_cost_that_is_none_is_an_error_and_not_free(cost: str) -> None:
    async with answering([[LOCAL]], Cost_USD=cost) as retriever:
        with pytest.raises(RetrieverError, match="ValueError"):
            await asked(retriever)


@pytest.mark.parametrize("body", [[], {}, [7], [["x"]], [[{"score": 1}]], [[{"document": 5, "score": 1}]]])
async def test_an_answer_of_another_shape_is_a_retriever_error(body: Any) -> None:
    async with answering(body) as retriever:
        with pytest.raises(RetrieverError):
            await asked(retriever)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, DatasetError), (422, ToolError), (413, ToolError), (503, RetrieverError)]
)
async def test_a_refusal_has_the_kind_of_its_status(status: int, kind: type[Exception]) -> None:
    async with answering({"detail": "no"}, status) as retriever:
        with pytest.raises(kind, match=f"HTTP {status}"):
            await asked(retriever)


async def test_a_solver_that_ends_closes_the_connections_to_its_retriever() -> None:
    async with answering([[]]) as retriever:
        held = make_solver(config(), load_prompts(), ScriptedModel(lambda request: says("")), retriever, None)
        await asked(retriever)
        await held.close()
        with pytest.raises(RuntimeError, match="closed"):
            await asked(retriever)
