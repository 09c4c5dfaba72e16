"""What the retriever tells Prometheus, through Ray's own metrics port.

Every micro-batch is one observation: its size, what padding wasted, how long its queries waited and how long
each stage took. `Totals` are the same as plain sums, for those who ask by handle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.serve import metrics

from ray_app.retrieval.batcher import Batch

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
SHARES = [0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8]


@dataclass
class Totals:
    """Sums since the replica started; times in seconds. One thread adds batches, one counts fallbacks."""

    batches: int = 0
    queries: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    encode_s: float = 0.0
    finish_s: float = 0.0
    fallbacks: int = 0

    def add(self, batch: Batch) -> None:
        self.batches += 1
        self.queries += batch.queries
        self.tokens += batch.tokens
        self.padded_tokens += batch.padded_tokens
        self.encode_s += batch.encode_s
        self.finish_s += batch.finish_s


class Meters:
    """The Prometheus side. Made inside a replica: Serve adds its labels there."""

    def __init__(self) -> None:
        self.totals = Totals()
        self._size = _histogram("batch_size", "queries of a micro-batch", SIZES)
        self._waste = _histogram("padding_waste", "share of a micro-batch that is padding", SHARES)
        self._waited = _histogram("queue_s", "longest wait of a micro-batch's queries, seconds", SECONDS)
        self._stages = {
            name: _histogram(f"{name}_s", f"time that a micro-batch took to {name}, seconds", SECONDS)
            for name in ("encode", "finish")
        }
        self._waiting = metrics.Gauge("retriever_waiting", description="queries that nothing encodes yet")
        self._fallbacks = metrics.Counter("retriever_fallbacks", description="queries that went to the web")

    def batch(self, batch: Batch) -> None:
        """One micro-batch is finished."""
        self.totals.add(batch)
        self._size.observe(batch.queries)
        self._waste.observe(1 - batch.tokens / max(1, batch.padded_tokens))
        self._waited.observe(batch.waited_s)
        self._stages["encode"].observe(batch.encode_s)
        self._stages["finish"].observe(batch.finish_s)
        self._waiting.set(batch.left)

    def fallback(self) -> None:
        self.totals.fallbacks += 1
        self._fallbacks.inc()


def _histogram(name: str, description: str, boundaries: list[Any]) -> metrics.Histogram:
    return metrics.Histogram(f"retriever_{name}", description=description, boundaries=boundaries)
