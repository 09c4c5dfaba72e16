"""From a run config to the retriever that its workers call: a Serve application, or a URL."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping

import aiohttp

from ray_app.config import Retriever
from ray_app.errors import DatasetError, EvalError, RetrieverError, ToolError
from ray_app.records import Hit, Retrieval
from ray_app.retrieval.client import HandleRetriever
from ray_app.retrieval.http_api import CALLS_HEADER, COST_HEADER, ERROR_HEADER
from ray_app.tools.search import DocumentSource


def connect(config: Retriever) -> DocumentSource:
    """The retriever of `config`. Connects at the first call."""
    if config.url is not None:
        return HttpRetriever(config.url, config.timeout_s)
    return HandleRetriever(config.service or "retriever", config.timeout_s)


class HttpRetriever:
    """Any server with the `/retrieve` contract. One try a call: the engine repeats the attempt.

    What the server paid to the web is known only where it says so in its headers, as ours does.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        """What the server found.

        Raises ToolError (bad query), DatasetError (unknown scope), RetrieverError.
        """
        body = {"queries": [query], "topk": top_k, "return_scores": True}
        if scope_id is not None:
            body["eid"] = scope_id
        self._session = self._session or aiohttp.ClientSession()
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.post(f"{self._url}/retrieve", json=body) as reply,
            ):
                if reply.status >= 400:
                    text = " ".join((await reply.text()).split())[:300]
                    raise _kind(reply.status)(f"retriever {self._url}: HTTP {reply.status}: {text}")
                return _retrieval((await reply.json())[0], reply.headers)
        except TimeoutError:
            raise RetrieverError(f"retriever {self._url}: no answer in {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError) as error:
            raise RetrieverError(f"retriever {self._url}: {type(error).__name__}: {error}") from None

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()


def _kind(status: int) -> type[EvalError]:
    if status == 404:
        return DatasetError  # the retriever was started with other scopes than the run
    return ToolError if status in {400, 413, 422} else RetrieverError


def _retrieval(items: list[dict[str, object]], headers: Mapping[str, str]) -> Retrieval:
    cost_usd = float(headers.get(COST_HEADER, 0))
    if not (math.isfinite(cost_usd) and cost_usd >= 0):
        raise ValueError(f"{COST_HEADER} is {cost_usd:g}; expected US dollars")
    calls, error = int(headers.get(CALLS_HEADER, 0)), headers.get(ERROR_HEADER, "")
    return Retrieval(tuple(_hit(item) for item in items), cost_usd, calls, error)


def _hit(item: dict[str, object]) -> Hit:
    document = item["document"]
    if not isinstance(document, dict):
        raise TypeError(f"expected a document, got {document!r}")
    text = document.get("content", document.get("contents", ""))
    score = float(str(item["score"]))
    is_web = item.get("source") == "tavily" or score < 0
    return Hit(int(document.get("id", -1)), str(text), score, "tavily" if is_web else "local")
