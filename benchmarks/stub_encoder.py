"""Encoders that only take time, for the retriever's benchmark.

Named to the retriever as `benchmarks.stub_encoder:noop` and `benchmarks.stub_encoder:paced`. What `paced`
costs is read from the environment of the process that loads it; it sleeps, so that, as beside a GPU, the
cores are free meanwhile. Its vectors depend on the text alone and point, in part, where the documents do.
"""

from __future__ import annotations

import os
import time
import zlib
from dataclasses import dataclass

import numpy as np

from ray_app.retrieval.encoder import FloatArray, Tokens

NOOP = "benchmarks.stub_encoder:noop"
PACED = "benchmarks.stub_encoder:paced"
COST_VARIABLE = "BENCH_ENCODER_COST"
DIM = 384
# Different vectors that there are; texts share them by hash.
BANK = 1024
# As many as make the benchmark's queries of 64 MiniLM tokens about as long here.
CHARS_PER_TOKEN = 7


@dataclass(frozen=True)
class Cost:
    """What one encoding takes: a part for the batch, a part for each token, padding included."""

    batch_ms: float = 0.0
    token_ms: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Cost:
        """Reads "batch_ms,token_ms". Raises ValueError for anything else."""
        try:
            batch_ms, token_ms = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"{COST_VARIABLE} is {text!r}; expected two numbers, e.g. '20,0.02'") from None
        return cls(batch_ms, token_ms)

    def __str__(self) -> str:
        return f"{self.batch_ms:g},{self.token_ms:g}"

    def seconds(self, items: int, longest: int) -> float:
        return (self.batch_ms + self.token_ms * items * longest) / 1000


class StubEncoder:
    """An Encoder without a model. A token is some characters; there is no limit on their number."""

    dim = DIM

    def __init__(self, cost: Cost) -> None:
        self.name = f"stub@{cost}"
        self._cost = cost
        self._bank = bank()

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """See Encoder. A text's tokens are all its hash."""
        return [[zlib.crc32(text.encode())] * -(-len(text) // CHARS_PER_TOKEN) for text in texts]

    def encode(self, queries: list[Tokens]) -> FloatArray:
        """See Encoder."""
        wait_s = self._cost.seconds(len(queries), max(map(len, queries), default=0))
        if wait_s:
            time.sleep(wait_s)
        return self._bank[[tokens[0] % BANK for tokens in queries]]

    def encode_documents(self, texts: list[str]) -> FloatArray:
        """See Encoder."""
        return self.encode(self.tokenize(texts))


def noop() -> StubEncoder:
    """An encoder that takes no time: what is left is the transport."""
    return StubEncoder(Cost())


def paced() -> StubEncoder:
    """An encoder of the cost that the environment names."""
    return StubEncoder(Cost.parse(os.environ[COST_VARIABLE]))


def bank() -> FloatArray:
    """All vectors that stubs give: half along the common direction, half each its own."""
    own = unit(np.random.default_rng(11).standard_normal((BANK, DIM), dtype=np.float32))
    return unit(common_direction() + own)


def common_direction() -> FloatArray:
    """The direction that stub queries share and that the benchmark's documents have a part of."""
    return unit(np.random.default_rng(12).standard_normal(DIM, dtype=np.float32))


def unit(vectors: FloatArray) -> FloatArray:
    """The rows of `vectors`, each of length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / lengths, dtype=np.float32)
