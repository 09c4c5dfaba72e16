"""A small corpus about made-up places, and an encoder that needs no model."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ray_app.retrieval.build import build_index
from ray_app.retrieval.encoder import Encoder, FloatArray, Tokens
from ray_app.retrieval.search import Filters, Searcher, open_searcher

TOPICS = ("lighthouse", "orchard", "glacier", "railway", "library", "volcano", "harbour", "desert")
FILTERS = Filters()
PLACES = ("north", "south", "east", "west", "upper", "lower")


def document(topic: str, place: str) -> str:
    return (
        f"The {topic} in the {place} province was first described by surveyors who mapped the region. "
        f"Visitors to the {place} {topic} arrive by the old road and leave before dusk."
    )


def rows() -> list[dict[str, object]]:
    """48 documents with ids 1000, 1007, ...; the last one is too short to be a hit."""
    texts = [document(topic, place) for topic in TOPICS for place in PLACES]
    texts[-1] = "A desert."
    return [{"id": 1000 + 7 * i, "content": text} for i, text in enumerate(texts)]


def write_jsonl(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def write_examples(path: Path) -> Path:
    ids = [1000 + 7 * i for i in range(48)]
    scopes = {"even": ids[::2] + ids[:4:2], "odd": ids[1::2], "none": [], "all": ids}
    path.write_text(json.dumps(scopes), "utf-8")
    return path


def unit(vectors: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, dtype=np.float32)


class WordEncoder:
    """Bag of hashed words: texts that share words are close. Remembers the batches it was given."""

    name = "words"
    dim = 64

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        self.batches.append(list(texts))
        return [self._tokens(text) for text in texts]

    def encode(self, queries: list[Tokens]) -> FloatArray:
        return self._vectors(queries)

    def _vectors(self, queries: list[Tokens]) -> FloatArray:
        vectors = np.full((len(queries), self.dim), 1e-3, dtype=np.float32)
        for vector, tokens in zip(vectors, queries, strict=True):
            np.add.at(vector, tokens, 1)
        return unit(vectors)

    def encode_documents(self, texts: list[str]) -> FloatArray:
        self.batches.append(list(texts))
        return self._vectors([self._tokens(text) for text in texts])

    def _tokens(self, text: str) -> Tokens:
        words = text.lower().replace(".", "").split()
        return [zlib.crc32(word.encode()) % self.dim for word in words]


def build_searcher(folder: Path, encoder: Encoder, filters: Filters = FILTERS) -> Searcher:
    """The small corpus, indexed with `encoder` in `folder`."""
    build_index(write_jsonl(folder / "corpus.jsonl", rows()), encoder, folder)
    return open_searcher(folder, write_examples(folder / "examples.json"), encoder, filters)
