"""The plain server that ours is held against: FastAPI, our scoped search and batching, one process, no Ray.

What Serve costs is the difference: index, encoder, batching, limits, threads and the HTTP layer are those
of the deployment. Refuses to run where Ray was imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.child import argument
from benchmarks.retriever_data import EXAMPLES
from benchmarks.uvicorn_child import serve_until_closed
from ray_app.records import Retrieval
from ray_app.retrieval.batcher import Batch, Limits
from ray_app.retrieval.encoder import load_encoder
from ray_app.retrieval.http_api import build_http_app
from ray_app.retrieval.search import LocalRetriever, Query, open_searcher


class Counted:
    """What the batcher did since the start."""

    def __init__(self) -> None:
        self.batches = self.queries = 0
        self.encode_s = 0.0

    def add(self, batch: Batch) -> None:
        self.batches, self.queries = self.batches + 1, self.queries + batch.queries
        self.encode_s += batch.encode_s


class PlainService:
    """A LocalRetriever behind the HTTP layer."""

    def __init__(self, retriever: LocalRetriever) -> None:
        self._retriever = retriever

    async def search(self, query: Query) -> Retrieval:
        return Retrieval(tuple(await self._retriever.submit(query)))

    async def health(self) -> Mapping[str, Any]:
        return {"status": "ok"}


async def main(folder: str, encoder: str, threads: int, limits: dict[str, int]) -> None:
    """Serve the index in `folder` until the input ends."""
    loaded, counted = load_encoder(encoder, threads=threads), Counted()
    searcher = open_searcher(Path(folder), Path(folder) / EXAMPLES, loaded)
    service = PlainService(LocalRetriever(searcher, loaded, Limits(**limits), counted.add))
    app = build_http_app(service)

    @app.get("/stats")
    async def stats() -> dict[str, float]:
        return vars(counted)

    if "ray" in sys.modules:
        raise RuntimeError("the plain server imported ray; it must show what a server without it does")
    await serve_until_closed(app)


if __name__ == "__main__":
    uvloop.run(main(**argument()))
