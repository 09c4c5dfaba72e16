"""The design that ours replaces, as its description has it: everything is searched, then filtered.

FastAPI, one queue, one worker thread. The worker takes up to `max_batch` requests or what came within
`max_wait_s` of the first, encodes all of them as one batch, searches the whole index for the best `depth`
of each and walks down each ranking: score, row, id, text. A question with few hits is looked for on the
web by the same thread, here a sleep. Rows come from a `datasets` split, read before their id is checked,
or from an array of ids with the texts behind it.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import uvloop
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from benchmarks.child import argument
from benchmarks.uvicorn_child import serve_until_closed
from ray_app.retrieval.build import CORPUS, VECTORS
from ray_app.retrieval.corpus import Corpus
from ray_app.retrieval.encoder import Encoder, load_encoder

MIN_SCORE = 0.1
MIN_CHARS = 100
DEFAULT_TOP_K = 5
# Questions with fewer local hits than this are looked for on the web.
ENOUGH_HITS = 3

Row = Mapping[str, Any]


class Rows(Protocol):
    """The documents by row number."""

    def id_of(self, row: int) -> int: ...

    def document(self, row: int) -> Row: ...


class DatasetRows:
    """Rows of a `datasets` split: each look at an id reads the whole row."""

    def __init__(self, jsonl: Path, cache_dir: Path) -> None:
        import datasets  # takes a second, and the other source needs none of it

        datasets.disable_progress_bars()
        self._split = datasets.load_dataset(
            "json", data_files=str(jsonl), split="train", cache_dir=str(cache_dir)
        )
        self._read: tuple[int, Row] = (-1, {})

    def id_of(self, row: int) -> int:
        self._read = row, self._split[row]
        return int(self._read[1]["id"])

    def document(self, row: int) -> Row:
        """The row whose id was asked for last is not read twice."""
        return self._read[1] if self._read[0] == row else self._split[row]


class ArrayRows:
    """Ids from an array in memory; texts only of what is kept."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def id_of(self, row: int) -> int:
        return int(self._corpus.ids[row])

    def document(self, row: int) -> Row:
        return {"id": self.id_of(row), "content": self._corpus.text(row)}


class Asked(BaseModel):
    """A request body."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False
    eid: str = ""


@dataclass
class Item:
    """A request that waits for the worker."""

    asked: Asked
    future: asyncio.Future[list[Any]]
    loop: asyncio.AbstractEventLoop


@dataclass(frozen=True)
class Knobs:
    """How much is searched and waited for, in candidates, requests and seconds."""

    depth: int = 1000
    max_batch: int = 256
    max_wait_s: float = 0.005
    fallback_s: float = 0.0  # 0: no key, no web search


def keep(
    rows: Rows, scores: Sequence[float], places: Sequence[int], allowed: Collection[int], top_k: int
) -> list[dict[str, Any]]:
    """The hits in a ranking of everything: those with a good score, an allowed id and a text, best first."""
    hits: list[dict[str, Any]] = []
    for score, place in zip(scores, places, strict=True):
        if score <= MIN_SCORE or rows.id_of(place) not in allowed:
            continue
        document = rows.document(place)
        text = document.get("content", document.get("contents"))
        if not isinstance(text, str) or len(text) <= MIN_CHARS:
            continue
        hits.append({"document": dict(document), "score": score, "source": "local"})
        if len(hits) == top_k:
            break
    return hits


class Reference:
    """Index, encoder, rows and the one worker."""

    def __init__(
        self, vectors: npt.NDArray[np.float32], rows: Rows, examples: Path, encoder: Encoder, knobs: Knobs
    ) -> None:
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)
        self._rows, self._encoder, self._knobs = rows, encoder, knobs
        self._allowed = {eid: set(ids) for eid, ids in json.loads(examples.read_text()).items()}
        self._waiting: queue.Queue[Item] = queue.Queue()
        self.batches = self.queries = self.fallbacks = 0
        threading.Thread(target=self._work, daemon=True).start()

    async def search(self, asked: Asked) -> list[Any]:
        loop = asyncio.get_running_loop()
        item = Item(asked, loop.create_future(), loop)
        self._waiting.put(item)
        return await item.future

    def _work(self) -> None:
        while True:
            batch = self._gather()
            self.batches, self.queries = self.batches + 1, self.queries + len(batch)
            try:
                answers = self._answer_all(batch)
            except Exception as error:
                for item in batch:
                    item.loop.call_soon_threadsafe(item.future.set_exception, error)
            else:
                for item, hits in zip(batch, answers, strict=True):
                    item.loop.call_soon_threadsafe(item.future.set_result, hits)

    def _gather(self) -> list[Item]:
        batch = [self._waiting.get()]
        ends = time.monotonic() + self._knobs.max_wait_s
        while len(batch) < self._knobs.max_batch and (left_s := ends - time.monotonic()) > 0:
            try:
                batch.append(self._waiting.get(timeout=left_s))
            except queue.Empty:
                break
        return batch

    def _answer_all(self, batch: list[Item]) -> list[list[Any]]:
        texts = [item.asked.queries[0] for item in batch]
        vectors = self._encoder.encode(self._encoder.tokenize(texts))
        scores, places = self._index.search(vectors, min(self._knobs.depth, self._index.ntotal))
        ranked = zip(batch, scores.tolist(), places.tolist(), strict=True)
        return [self._hits(item.asked, own_scores, own_places) for item, own_scores, own_places in ranked]

    def _hits(self, asked: Asked, scores: list[float], places: list[int]) -> list[Any]:
        allowed = self._allowed.get(asked.eid, set())
        hits = keep(self._rows, scores, places, allowed, asked.topk or DEFAULT_TOP_K)
        if len(hits) < ENOUGH_HITS and self._may_fall_back(asked):
            self.fallbacks += 1
            time.sleep(self._knobs.fallback_s)
        return hits if asked.return_scores else [hit["document"] for hit in hits]

    def _may_fall_back(self, asked: Asked) -> bool:
        # Kinder than the design: a question that has documents, of which the depth cut off too many, would
        # go out too. Then no request of the benchmark would be an ordinary one beside a fallback.
        return bool(self._knobs.fallback_s and asked.eid and not self._allowed.get(asked.eid))


def build_app(reference: Reference) -> FastAPI:
    """The server's two paths, and what the benchmark counts."""
    app = FastAPI()

    @app.post("/retrieve")
    async def retrieve(asked: Asked) -> JSONResponse:
        if len(asked.queries) != 1:
            raise HTTPException(500, "expected one query")
        return JSONResponse([await reference.search(asked)])

    @app.get("/stats")
    async def stats() -> dict[str, int]:
        return {name: getattr(reference, name) for name in ("batches", "queries", "fallbacks")}

    return app


async def main(
    folder: str, encoder: str, threads: int, rows: str, knobs: dict[str, Any], cache_dir: str
) -> None:
    """Serve until the input ends. `rows`: "datasets" or "ids"."""
    where = Path(folder)
    faiss.omp_set_num_threads(threads)
    loaded = load_encoder(encoder, threads=threads)
    source: Rows = (
        DatasetRows(where / "corpus.jsonl", Path(cache_dir))
        if rows == "datasets"
        else ArrayRows(Corpus.open(where / CORPUS))
    )
    vectors = np.load(where / VECTORS, mmap_mode="r")
    reference = Reference(vectors, source, where / "examples.json", loaded, Knobs(**knobs))
    await serve_until_closed(build_app(reference))


if __name__ == "__main__":
    uvloop.run(main(**argument()))
