"""The documents, scopes and queries that the retriever's benchmark is loaded with, all from one seed.

Owns the sizes of scopes (those of the HLE scope map) and the geometry: every document leans a little to
where queries point, as real embeddings do, so that most of a scope scores over the threshold, and the
documents of a scope lean, each differently, to their question. Texts are word salad. Imports no Ray.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from benchmarks.stub_encoder import DIM, common_direction, unit
from ray_app.records import digest
from ray_app.retrieval.build import CORPUS, MANIFEST, VECTORS
from ray_app.retrieval.corpus import SCHEMA, IntArray
from ray_app.retrieval.encoder import FloatArray

EXAMPLES, JSONL, QUERIES, PLACES = "examples.json", "corpus.jsonl", "queries.json", "scope_rows.npz"
# Unique documents per question in the HLE scope map: (share of the questions, at most so many).
SCOPE_SIZES = ((0, 0), (0.002, 3), (0.068, 50), (0.1, 74), (0.5, 100), (0.75, 125))
SCOPE_TAIL = ((0.9, 163), (0.95, 186), (0.99, 240), (0.999, 400), (1, 675))
REPEATED = 0.68  # entries that the map lists once more, as a share of the unique ones
QUERY_TOKENS = 64
SPECIAL_TOKENS = 2  # that the tokenizer puts around a text
TOPIC_SHARE = 0.5  # of a query's words that are its question's
SHORT_SHARE = 0.01  # of the texts that are too short to be a hit
# Questions without any document, for which a web fallback goes out.
EMPTY_EIDS = tuple(f"none-{number}" for number in range(8))
# Documents of a question that is asked. With fewer, a query might find too few and go out to the web.
FEWEST = 10
PIECE_ROWS = 10_000
FORMAT = 3


class TextEncoder(Protocol):
    """The part of an Encoder that lays documents where its queries are."""

    @property
    def name(self) -> str: ...

    def encode_documents(self, texts: list[str]) -> FloatArray: ...


@dataclass(frozen=True)
class Query:
    """One query and the id of the question whose documents it may find."""

    text: str
    eid: str


@dataclass(frozen=True)
class Sizes:
    """How much data there is."""

    rows: int = 176_522
    questions: int = 1900
    queries: int = 8192
    seed: int = 4


@dataclass(frozen=True)
class Data:
    """A folder with everything: an index folder of ours, the same rows as JSONL, scopes and queries."""

    folder: Path
    queries: Sequence[Query]

    @property
    def examples(self) -> Path:
        return self.folder / EXAMPLES

    @property
    def jsonl(self) -> Path:
        return self.folder / JSONL

    @property
    def vectors(self) -> Path:
        return self.folder / VECTORS

    def scope_rows(self) -> dict[str, IntArray]:
        """The rows of each question's documents."""
        with np.load(self.folder / PLACES) as arrays:
            return {eid: arrays[eid] for eid in arrays.files}


def prepare(folder: Path, sizes: Sizes, encoder: TextEncoder, words: Sequence[str]) -> Data:
    """The data of `sizes` in `folder`, made there unless it is there already.

    `words` are words of one token each, in the encoder's own tokenizer.
    """
    target = folder / digest([FORMAT, asdict(sizes), encoder.name])
    if not (target / QUERIES).exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        _Maker(target, sizes, encoder, words).make()
    listed = json.loads((target / QUERIES).read_text())
    return Data(target, [Query(text, eid) for text, eid in listed])


def single_token_words(vocabulary: Sequence[str]) -> list[str]:
    """The plain words of a WordPiece vocabulary, which its tokenizer leaves whole."""
    return sorted(
        word for word in vocabulary if word.isascii() and word.isalpha() and word.islower() and len(word) > 2
    )


def draw_scopes(rng: np.random.Generator, count: int, total: int) -> list[IntArray]:
    """Sorted distinct rows per question, sized as the HLE scope map's; the last has the most it has."""
    shares, sizes = zip(*SCOPE_SIZES, *SCOPE_TAIL, strict=True)
    drawn = np.interp(rng.random(count), shares, sizes).astype(int)
    drawn[-1] = sizes[-1]
    return [np.sort(rng.choice(total, min(size, total), replace=False)) for size in drawn]


class _Maker:
    """Makes one folder of data, each file from the one generator, in a fixed order."""

    def __init__(self, folder: Path, sizes: Sizes, encoder: TextEncoder, words: Sequence[str]) -> None:
        self._folder, self._sizes, self._encoder = folder, sizes, encoder
        self._words = np.array(words)
        self._rng = np.random.default_rng(sizes.seed)

    def make(self) -> None:
        rng, sizes = self._rng, self._sizes
        topics = [self._draw_words() for _ in range(sizes.questions)]
        scopes = draw_scopes(rng, sizes.questions, sizes.rows)
        eids = [rng.bytes(12).hex() for _ in scopes]
        self._write_vectors(topics, scopes)
        ids = spread_ids(sizes.rows)
        write_corpus(self._folder / CORPUS, ids, texts(rng, sizes.rows, list(self._words)))
        _write_jsonl(self._folder / CORPUS, self._folder / JSONL)
        write_manifest(self._folder, sizes.rows)
        listed = [[int(ids[row]) for row in self._with_repeats(rows)] for rows in scopes]
        examples = dict(zip(eids, listed, strict=True)) | {eid: [] for eid in EMPTY_EIDS}
        (self._folder / EXAMPLES).write_text(json.dumps(examples))
        np.savez(self._folder / PLACES, **dict(zip(eids, scopes, strict=True)))  # type: ignore[arg-type]
        asked = [place for place, rows in enumerate(scopes) if len(rows) >= FEWEST]
        pairs = [(topics[place], eids[place]) for place in asked]
        (self._folder / QUERIES).write_text(json.dumps(self._queries(pairs)))

    def _draw_words(self) -> list[str]:
        count = QUERY_TOKENS - SPECIAL_TOKENS
        return [str(word) for word in self._rng.choice(self._words, count, replace=False)]

    def _with_repeats(self, rows: IntArray) -> IntArray:
        again = self._rng.choice(rows, int(len(rows) * REPEATED)) if len(rows) else rows
        return self._rng.permutation(np.concatenate([rows, again]))

    def _queries(self, questions: list[tuple[list[str], str]]) -> list[tuple[str, str]]:
        """Distinct queries, each of words of its question and of words of its own."""
        made: dict[str, str] = {}
        while len(made) < self._sizes.queries:
            topic, eid = questions[int(self._rng.integers(len(questions)))]
            words = self._draw_words()
            kept = int(len(words) * TOPIC_SHARE)
            words[:kept] = [str(w) for w in self._rng.choice(topic, kept, replace=False)]
            made[" ".join(words)] = eid
        return list(made.items())

    def _write_vectors(self, topics: list[list[str]], scopes: list[IntArray]) -> None:
        rng, rows = self._rng, self._sizes.rows
        encoded = [
            self._encoder.encode_documents([" ".join(words) for words in topics[start : start + 64]])
            for start in range(0, len(topics), 64)
        ]
        vectors = np.concatenate(encoded)
        middle = vectors.mean(axis=0)
        own = unit(vectors - middle)
        shared = 0.45 * (unit(middle) + common_direction())
        open_memmap: Any = np.lib.format.open_memmap  # numpy ships it without types
        path = self._folder / VECTORS
        held = open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, DIM))
        for start in range(0, rows, PIECE_ROWS):
            count = min(PIECE_ROWS, rows - start)
            held[start : start + count] = 0.6 * unit(rng.standard_normal((count, DIM), dtype=np.float32))
        for vector, places in zip(own, scopes, strict=True):
            held[places] += rng.uniform(0, 0.5, (len(places), 1)).astype(np.float32) * vector
        for start in range(0, rows, PIECE_ROWS):
            held[start : start + PIECE_ROWS] = unit(held[start : start + PIECE_ROWS] + shared)
        held.flush()


def spread_ids(rows: int) -> IntArray:
    """A document id per row, none of which is its row: each of 0 .. rows - 1 once, out of order."""
    step = next(prime for prime in (7919, 7907, 7901) if rows % prime)
    return (np.arange(rows, dtype=np.int64) * step + 1) % rows


def texts(rng: np.random.Generator, rows: int, words: Sequence[str]) -> Iterator[str]:
    """A text for each row, of 500 to 2,000 characters, but for a few that are too short to be hits."""
    source = " ".join(str(word) for word in rng.choice(np.array(words), 400_000))
    lengths = rng.integers(500, 2001, rows)
    lengths[rng.random(rows) < SHORT_SHARE] = 80
    starts = rng.integers(0, len(source) - 2000, rows)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        yield f"{row} {source[start : start + length]}"[:length]


def write_corpus(path: Path, ids: IntArray, documents: Iterator[str]) -> None:
    """The Arrow file that `build_corpus` would write of these rows."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for start in range(0, len(ids), PIECE_ROWS):
            part = ids[start : start + PIECE_ROWS]
            held = [text for _, text in zip(part, documents, strict=False)]
            writer.write_batch(pa.record_batch([part, held, [len(text) for text in held]], schema=SCHEMA))


def write_manifest(folder: Path, documents: int) -> None:
    """Says that the folder's vectors are its corpus'. It names no encoder, for several are used with it."""
    (folder / MANIFEST).write_text(json.dumps({"documents": documents, "dim": DIM, "made_by": __name__}))


def _write_jsonl(corpus: Path, out: Path) -> None:
    with pa.memory_map(str(corpus)) as source, out.open("w") as file:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            for row in reader.get_batch(number).select(["id", "text"]).to_pylist():
                file.write(json.dumps({"id": row["id"], "content": row["text"]}) + "\n")
