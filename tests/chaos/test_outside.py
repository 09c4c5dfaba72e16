"""The outside of the chaos suite: answers that never change, and faults that end when they are told to."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ray_app.app import RetrieverArgs
from ray_app.retrieval.web import WebSearcher
from ray_app.retrieval.web_config import WebConfig
from tests.chaos.outside import Web, bucket, web
from tests.retrieval.tavily_server import KEY
from tests.s3_server import BUCKET


async def test_the_web_answers_alike_until_it_is_told_to_fail_and_again_after(tmp_path: Path) -> None:
    with web() as outside:
        first = await _texts(outside, tmp_path / "1", "ice")
        assert len(first) == 4
        assert await _texts(outside, tmp_path / "2", "ice") == first
        assert await _texts(outside, tmp_path / "2", "fire") != first
        for number, fault in enumerate((outside.refused(), outside.failing(), outside.hanging())):
            cold = tmp_path / f"cold-{number}"
            with fault:
                assert await _texts(outside, cold, "ice", patience_s=0.4) == []
            assert await _texts(outside, cold, "ice") == first

        arguments = outside.serve_config(tmp_path)["applications"][0]["args"]
        config = RetrieverArgs.model_validate(arguments).web
        assert config is not None and config.base_url == outside.door.url


async def _texts(outside: Web, cache: Path, query: str, patience_s: float = 10.0) -> list[str]:
    config = WebConfig(base_url=outside.door.url, timeout_s=patience_s, cache_dir=cache)
    searcher = WebSearcher(config, KEY)
    try:
        return [hit.text for hit in (await searcher.search(query, 10)).hits]
    finally:
        await searcher.close()


async def test_a_store_is_stopped_or_refused_only_inside() -> None:
    with bucket() as store:
        url = f"{store.environ['AWS_ENDPOINT_URL']}/{BUCKET}"
        assert await asyncio.to_thread(_status, url) == 200
        with store.stopped(), pytest.raises(TimeoutError):
            await asyncio.to_thread(_status, url)
        with store.refused(), pytest.raises(urllib.error.URLError, match="refused"):
            await asyncio.to_thread(_status, url)
        assert await asyncio.to_thread(_status, url, 10) == 200


def _status(url: str, timeout_s: float = 0.5) -> int:
    with urllib.request.urlopen(url, timeout=timeout_s) as reply:
        return int(reply.status)
