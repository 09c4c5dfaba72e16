"""Gathers single queries into encoder batches: take all that waits, sort by length, cut, resolve.

Owns the waiting queue, the encoder's thread and the thread behind it, so that scoring one micro-batch
overlaps with encoding the next. No timer: a lone query starts at once, and while the encoder works the
next batch collects itself. It refuses work beyond its bound instead of queueing without end.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ray_app.errors import RetrieverError

FloatArray = npt.NDArray[np.float32]


class HasText(Protocol):
    @property
    def text(self) -> str: ...


class TextEncoder(Protocol):
    """The part of an Encoder that batching needs."""

    def encode(self, texts: list[str]) -> FloatArray: ...

    def token_counts(self, texts: list[str]) -> list[int]: ...


Q = TypeVar("Q", bound=HasText)
R = TypeVar("R")


class QueueFull(RetrieverError):
    """As many queries wait as may; the caller comes again later."""


@dataclass(frozen=True)
class Limits:
    """Bounds of the queue and of one micro-batch.

    `batch_tokens` counts padding: items times the longest item. A query of more than `long_tokens`
    goes to the lane of long ones; the search tool cuts its queries to 390 characters, about 100 tokens.
    """

    waiting: int = 512
    batch_items: int = 64
    batch_tokens: int = 4096
    long_tokens: int = 128


@dataclass(eq=False)
class _Item(Generic[Q, R]):
    query: Q
    future: asyncio.Future[R]
    loop: asyncio.AbstractEventLoop
    tokens: int = 0


class Batcher(Generic[Q, R]):
    """Encodes the queries that coroutines submit and hands each micro-batch to `finish`.

    `finish(queries, vectors)` turns one micro-batch (vectors float32 [n, dim]) into n results. Where a
    micro-batch fails, its queries are tried one by one, so that only the bad one fails.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        finish: Callable[[list[Q], FloatArray], Sequence[R]],
        limits: Limits = Limits(),
    ) -> None:
        self._encoder = encoder
        self._finish = finish
        self._limits = limits
        self._arrived: deque[_Item[Q, R]] = deque()
        self._waiting = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, query: Q) -> asyncio.Future[R]:
        """Queues `query`; call it on the event loop. Cancelling the future spares the encoding.

        Raises QueueFull when `limits.waiting` queries wait, RetrieverError after `close`.
        """
        loop = asyncio.get_running_loop()
        item: _Item[Q, R] = _Item(query, loop.create_future(), loop)
        with self._changed:
            if self._is_closed:
                raise RetrieverError("the retriever is shutting down; ask again when it is back")
            if self._waiting >= self._limits.waiting:
                raise QueueFull(f"{self._waiting} queries wait, which is the limit; ask again in a second")
            self._waiting += 1
            self._arrived.append(item)
            self._changed.notify()
        return item.future

    def close(self) -> None:
        """Answers what was submitted, then stops both threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._finisher.shutdown()

    def _run(self) -> None:
        # One round: everything short that waits, then at most one micro-batch of long queries, so
        # that a burst of long ones delays the short ones by one micro-batch at a time.
        long: list[_Item[Q, R]] = []
        lane: list[list[_Item[Q, R]]] = []
        while True:
            arrived = self._take_all(may_wait=not long and not lane)
            if not (arrived or long or lane):
                return
            self._measure(arrived)
            long += [item for item in arrived if item.tokens > self._limits.long_tokens]
            for batch in cut([i for i in arrived if i.tokens <= self._limits.long_tokens], self._limits):
                self._encode(batch)
            # The lane is refilled only when it is empty: later, less long queries overtake nobody.
            if not lane:
                lane, long = cut(long, self._limits), []
            if lane:
                self._encode(lane.pop(0))

    def _take_all(self, may_wait: bool) -> list[_Item[Q, R]]:
        with self._changed:
            while may_wait and not self._arrived and not self._is_closed:
                self._changed.wait()
            taken = list(self._arrived)
            self._arrived.clear()
        return taken

    def _measure(self, items: list[_Item[Q, R]]) -> None:
        try:
            counts = self._encoder.token_counts([item.query.text for item in items])
        except Exception:  # each in a batch of its own, where the one that fails harms no other
            counts = [self._limits.batch_tokens] * len(items)
        for item, count in zip(items, counts, strict=True):
            item.tokens = count

    def _encode(self, batch: list[_Item[Q, R]]) -> None:
        with self._changed:
            self._waiting -= len(batch)
        batch = [item for item in batch if not item.future.cancelled()]
        if not batch:
            return
        try:
            vectors = self._encoder.encode([item.query.text for item in batch])
        except Exception as error:
            self._retry_singly(batch, error, self._encode_one)
        else:
            self._finisher.submit(self._finish_batch, batch, vectors)

    def _encode_one(self, item: _Item[Q, R]) -> None:
        vectors = self._encoder.encode([item.query.text])
        self._finisher.submit(self._finish_batch, [item], vectors)

    def _finish_batch(self, batch: list[_Item[Q, R]], vectors: FloatArray) -> None:
        try:
            results = self._finish([item.query for item in batch], vectors)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} queries")
        except Exception as error:
            rows = {id(item): vectors[i : i + 1] for i, item in enumerate(batch)}
            self._retry_singly(batch, error, lambda item: self._finish_batch([item], rows[id(item)]))
        else:
            _resolve(batch, results)

    def _retry_singly(
        self, batch: list[_Item[Q, R]], error: Exception, handle: Callable[[_Item[Q, R]], None]
    ) -> None:
        if len(batch) == 1:
            _reject(batch[0], error)
            return
        for item in batch:
            try:
                handle(item)
            except Exception as own:
                _reject(item, own)


def cut(items: Sequence[_Item[Q, R]], limits: Limits) -> list[list[_Item[Q, R]]]:
    """Micro-batches of `items` by rising length, each within the limits or of one item."""
    batches: list[list[_Item[Q, R]]] = []
    for item in sorted(items, key=lambda item: item.tokens):
        # The list rises, so the newest item is the longest and sets the padded width.
        size = len(batches[-1]) + 1 if batches else 1
        is_full = size > limits.batch_items or size * item.tokens > limits.batch_tokens
        if not batches or is_full:
            batches.append([])
        batches[-1].append(item)
    return batches


def _resolve(batch: Sequence[_Item[Q, R]], results: Sequence[R]) -> None:
    pairs = list(zip(batch, results, strict=True))
    for loop in {item.loop for item in batch}:

        def settle(loop: asyncio.AbstractEventLoop = loop) -> None:
            for item, result in pairs:
                if item.loop is loop and not item.future.done():
                    item.future.set_result(result)

        _on_loop(loop, settle)  # one wake-up for the whole micro-batch


def _reject(item: _Item[Q, R], error: Exception) -> None:
    def settle() -> None:
        if not item.future.done():
            item.future.set_exception(error)

    _on_loop(item.loop, settle)


def _on_loop(loop: asyncio.AbstractEventLoop, settle: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        return  # the loop is closed: nobody waits any more
