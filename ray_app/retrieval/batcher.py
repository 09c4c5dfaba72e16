"""Gathers single queries into encoder batches: take all that waits, sort by length, cut, resolve.

Owns the waiting queue and three threads, so that tokenising, encoding and finishing (scoring) overlap. No
timer: a lone query starts at once, and while the encoder works the next batch collects itself. It refuses
work beyond its bound instead of queueing without end. A micro-batch that is being encoded is not interrupted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from ray_app.errors import RetrieverError
from ray_app.retrieval.encoder import FloatArray, Tokens


class HasText(Protocol):
    @property
    def text(self) -> str: ...


class QueryEncoder(Protocol):
    """The part of an Encoder that batching needs."""

    def tokenize(self, texts: list[str]) -> list[Tokens]: ...

    def encode(self, queries: list[Tokens]) -> FloatArray: ...


Q = TypeVar("Q", bound=HasText)
R = TypeVar("R")


# Micro-batches that are encoded and not finished: one in work, one that waits.
HANDED_ON = 2


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


class Batch(NamedTuple):
    """What one micro-batch was: its size, with padding and without, and where its time went.

    `waited_s` is the longest time from the arrival of one of its queries to its encoding, `left` the
    number of queries that still wait.
    """

    queries: int
    tokens: int
    padded_tokens: int
    waited_s: float
    encode_s: float
    finish_s: float
    left: int


@dataclass(eq=False)
class _Item(Generic[Q, R]):
    query: Q
    future: asyncio.Future[R]
    loop: asyncio.AbstractEventLoop
    arrived: float = field(default_factory=time.monotonic)
    tokens: Tokens = field(default_factory=list)
    waits: bool = True


class Batcher(Generic[Q, R]):
    """Encodes the queries that coroutines submit and hands each micro-batch to `finish`.

    `finish(queries, vectors)` turns one micro-batch (vectors float32 [n, dim]) into n results. Where a
    micro-batch fails, its queries are tried one by one, so that only the bad one fails. `limits` may be
    set at any time. `observe` is told of every micro-batch that was answered, on a thread of its own.
    """

    def __init__(
        self,
        encoder: QueryEncoder,
        finish: Callable[[list[Q], FloatArray], Sequence[R]],
        limits: Limits = Limits(),
        observe: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self._encoder = encoder
        self._finish = finish
        self.limits = limits
        self._observe = observe
        self._arrived: deque[_Item[Q, R]] = deque()
        self._ready: list[_Item[Q, R]] = []
        self._waiting = 0
        self._is_closed = self._is_tokenized = False
        lock = threading.Lock()
        self._has_arrived, self._is_ready = threading.Condition(lock), threading.Condition(lock)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
        # Where finishing is slower than encoding, queries wait where they are counted and may be cancelled.
        self._handed_on = threading.BoundedSemaphore(HANDED_ON)
        self._busy_since = 0.0
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("tokenize", self._tokenize_all), ("encode", self._encode_all))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def busy_s(self) -> float:
        """How long the encoder has been at its present micro-batch, seconds; 0.0 where it has none."""
        since = self._busy_since
        return time.monotonic() - since if since else 0.0

    @property
    def waiting(self) -> int:
        """Queries that nothing has begun to encode."""
        return self._waiting

    @property
    def ready(self) -> int:
        """Those of them that are tokenised, and will be in the encoder's next round."""
        return len(self._ready)

    def submit(self, query: Q) -> asyncio.Future[R]:
        """Queues `query`; call it on the event loop. Cancelling the future spares the encoding.

        Raises QueueFull when `limits.waiting` queries wait, RetrieverError after `close`.
        """
        loop = asyncio.get_running_loop()
        item: _Item[Q, R] = _Item(query, loop.create_future(), loop)
        with self._has_arrived:
            if self._is_closed:
                raise RetrieverError("the retriever is shutting down; ask again when it is back")
            if self._waiting >= self.limits.waiting:
                raise QueueFull(f"{self._waiting} queries wait, which is the limit; ask again in a second")
            self._waiting += 1
            self._arrived.append(item)
            self._has_arrived.notify()
        # A caller who gives up makes room at once, not when the encoder gets there.
        item.future.add_done_callback(lambda future: self._leave([item]) if future.cancelled() else None)
        return item.future

    def close(self) -> None:
        """Answers what was submitted, then stops all threads."""
        with self._has_arrived:
            self._is_closed = True
            self._has_arrived.notify()
        for thread in self._threads:
            thread.join()
        self._finisher.shutdown()

    def _tokenize_all(self) -> None:
        while True:
            with self._has_arrived:
                while not self._arrived and not self._is_closed:
                    self._has_arrived.wait()
                taken = list(self._arrived)
                self._arrived.clear()
            kept = self._dropping(taken, lambda item: item.future.cancelled())
            tokenized = self._tokenized(kept)
            with self._is_ready:
                self._ready += tokenized
                self._is_tokenized = self._is_closed and not taken
                self._is_ready.notify()
            if self._is_tokenized:
                return

    def _tokenized(self, items: list[_Item[Q, R]]) -> list[_Item[Q, R]]:
        try:
            for item, tokens in zip(items, self._tokens_of(items), strict=True):
                item.tokens = tokens
        except Exception:
            return self._dropping(items, lambda item: not self._is_tokenized_alone(item))
        return items

    def _is_tokenized_alone(self, item: _Item[Q, R]) -> bool:
        try:
            [item.tokens] = self._tokens_of([item])
        except Exception as error:
            _reject(item, error)
            return False
        return True

    def _tokens_of(self, items: list[_Item[Q, R]]) -> list[Tokens]:
        return self._encoder.tokenize([item.query.text for item in items]) if items else []

    def _encode_all(self) -> None:
        # One round: everything short that waits, then at most one micro-batch of long queries, so
        # that a burst of long ones delays the short ones by one micro-batch at a time.
        long: list[_Item[Q, R]] = []
        lane: list[list[_Item[Q, R]]] = []
        while True:
            ready = self._take_ready(may_wait=not long and not lane)
            if not (ready or long or lane):
                return
            limits = self.limits
            long += [item for item in ready if len(item.tokens) > limits.long_tokens]
            for batch in cut([item for item in ready if len(item.tokens) <= limits.long_tokens], limits):
                self._encode(batch)
            # The lane is refilled only when it is empty: later, less long queries overtake nobody.
            if not lane:
                lane, long = cut(long, limits), []
            if lane:
                self._encode(lane.pop(0))

    def _take_ready(self, may_wait: bool) -> list[_Item[Q, R]]:
        with self._is_ready:
            while may_wait and not self._ready and not self._is_tokenized:
                self._is_ready.wait()
            taken, self._ready = self._ready, []
        return taken

    def _dropping(
        self, items: list[_Item[Q, R]], is_dropped: Callable[[_Item[Q, R]], bool]
    ) -> list[_Item[Q, R]]:
        dropped = [item for item in items if is_dropped(item)]
        self._leave(dropped)
        return [item for item in items if item not in dropped] if dropped else items

    def _leave(self, items: Iterable[_Item[Q, R]]) -> None:
        """They wait no more."""
        with self._has_arrived:
            for item in items:
                self._waiting -= item.waits
                item.waits = False

    def _encode(self, batch: list[_Item[Q, R]]) -> None:
        self._busy_since = time.monotonic()
        try:
            self._encode_or_reject(batch)
        finally:
            self._busy_since = 0.0

    def _encode_or_reject(self, batch: list[_Item[Q, R]]) -> None:
        self._leave(batch)
        batch = [item for item in batch if not item.future.cancelled()]
        if not batch:
            return
        began = time.monotonic()
        try:
            vectors = self._encoder.encode([item.tokens for item in batch])
        except Exception as error:
            if len(batch) == 1:
                _reject(batch[0], error)
                return
            for item in batch:
                self._encode_or_reject([item])
        else:
            self._hand_on(batch, vectors, began)

    def _hand_on(self, batch: list[_Item[Q, R]], vectors: FloatArray, began: float) -> None:
        encoded = time.monotonic()
        self._handed_on.acquire()
        self._finisher.submit(self._finish_and_tell, batch, vectors, began, encoded)

    def _finish_and_tell(
        self, batch: list[_Item[Q, R]], vectors: FloatArray, began: float, encoded: float
    ) -> None:
        try:
            is_answered = self._finish_batch(batch, vectors)
        finally:
            self._handed_on.release()
        if not is_answered:
            return
        lengths = [len(item.tokens) for item in batch]
        self._observe(
            Batch(
                len(batch),
                sum(lengths),
                len(batch) * max(lengths),
                began - min(item.arrived for item in batch),
                encoded - began,
                time.monotonic() - encoded,
                self._waiting,
            )
        )

    def _finish_batch(self, batch: list[_Item[Q, R]], vectors: FloatArray) -> bool:
        """Whether any of its queries has an answer."""
        try:
            results = self._finish([item.query for item in batch], vectors)
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} queries")
        except Exception as error:
            if len(batch) == 1:
                _reject(batch[0], error)
                return False
            alone = [self._finish_batch([item], vectors[i : i + 1]) for i, item in enumerate(batch)]
            return any(alone)
        _resolve(batch, results)
        return True


def cut(items: Sequence[_Item[Q, R]], limits: Limits) -> list[list[_Item[Q, R]]]:
    """Micro-batches of `items` by rising length, each within the limits or of one item."""
    batches: list[list[_Item[Q, R]]] = []
    for item in sorted(items, key=lambda item: len(item.tokens)):
        # The list rises, so the newest item is the longest and sets the padded width.
        size = len(batches[-1]) + 1 if batches else 1
        is_full = size > limits.batch_items or size * len(item.tokens) > limits.batch_tokens
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
