from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from ray_app.errors import RetrieverError
from ray_app.retrieval.batcher import Batch, Batcher, Limits, QueueFull
from ray_app.retrieval.encoder import FloatArray, Tokens


@dataclass(frozen=True)
class Text:
    text: str


class GatedEncoder:
    """Encodes a text as its length; a character is a token. Stops before each batch until the gate opens."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def encode(self, queries: list[Tokens]) -> FloatArray:
        texts = ["".join(map(chr, tokens)) for tokens in queries]
        self.batches.append(texts)
        self.entered.release()
        assert self.gate.acquire(timeout=20)
        if "bad" in texts:
            raise ValueError("cannot encode 'bad'")
        return np.array([[len(text)] for text in texts], dtype=np.float32)

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        if "no word" in texts:
            raise ValueError("cannot tokenize 'no word'")
        return [[ord(character) for character in text] for text in texts]

    def open(self, batches: int = 1000) -> None:
        self.gate.release(batches)

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=20)


def echo(queries: list[Text], vectors: FloatArray) -> list[str]:
    return [f"{query.text}={vector[0]:g}" for query, vector in zip(queries, vectors, strict=True)]


@pytest.fixture
def encoder() -> GatedEncoder:
    return GatedEncoder()


@pytest.fixture
def batcher(encoder: GatedEncoder) -> Iterator[Batcher[Text, str]]:
    limits = Limits(waiting=100, batch_items=8, batch_tokens=100, long_tokens=40)
    batcher = Batcher(encoder, echo, limits)
    yield batcher
    encoder.open()
    batcher.close()


async def queued(batcher: Batcher[Text, str], *texts: str) -> list[asyncio.Future[str]]:
    """Submits texts and returns when only the encoder is waited for."""
    before = batcher.ready
    futures = [batcher.submit(Text(text)) for text in texts]
    async with asyncio.timeout(20):
        while batcher.ready < before + len(texts):  # noqa: ASYNC110  (threads set no event)
            await asyncio.sleep(0.001)
    return futures


async def hold(batcher: Batcher[Text, str], encoder: GatedEncoder) -> asyncio.Future[str]:
    """Keeps the encoder busy with one query until the gate is opened."""
    first = batcher.submit(Text("first"))
    await encoder.until_entered()
    return first


async def test_all_that_waited_goes_in_one_batch_sorted_by_length(
    batcher: Batcher[Text, str], encoder: GatedEncoder
) -> None:
    first = await hold(batcher, encoder)
    rest = await queued(batcher, *("x" * n for n in (5, 2, 9, 1)))
    encoder.open()
    assert await asyncio.gather(first, *rest) == ["first=5", "xxxxx=5", "xx=2", "xxxxxxxxx=9", "x=1"]
    assert encoder.batches == [["first"], ["x", "xx", "xxxxx", "xxxxxxxxx"]]


async def test_micro_batches_keep_to_items_and_padded_tokens(
    batcher: Batcher[Text, str], encoder: GatedEncoder
) -> None:
    first = await hold(batcher, encoder)
    rest = await queued(batcher, *("x" * n for n in [1] * 10 + [30] * 5))
    encoder.open()
    await asyncio.gather(first, *rest)
    assert [len(batch) for batch in encoder.batches] == [1, 8, 3, 3, 1]
    assert all(len(batch) * len(batch[-1]) <= 100 for batch in encoder.batches)


async def test_each_micro_batch_is_answered_while_the_next_is_encoded(
    batcher: Batcher[Text, str], encoder: GatedEncoder
) -> None:
    first = await hold(batcher, encoder)
    rest = await queued(batcher, *("x" * n for n in [1] * 8 + [20]))
    encoder.open(2)
    await asyncio.gather(first, *rest[:8])
    await encoder.until_entered()
    assert not rest[8].done()
    encoder.open()
    assert await rest[8] == "x" * 20 + "=20"


async def test_one_long_micro_batch_at_most_goes_between_short_ones(
    batcher: Batcher[Text, str], encoder: GatedEncoder
) -> None:
    first = await hold(batcher, encoder)
    *long, early = await queued(batcher, *["y" * 60] * 3, "early")
    for _ in range(2):  # lets "first" and "early" pass; a long one is in work
        encoder.open(1)
        await encoder.until_entered()
    [late] = await queued(batcher, "late")
    encoder.open()
    await asyncio.gather(first, early, late, *long)
    assert [batch[0][0] for batch in encoder.batches] == ["f", "e", "y", "l", "y", "y"]


async def test_a_long_query_is_not_overtaken_for_ever_by_shorter_long_ones(
    batcher: Batcher[Text, str], encoder: GatedEncoder
) -> None:
    first = await hold(batcher, encoder)
    early = await queued(batcher, "y" * 90, "y" * 80)
    encoder.open(1)
    await encoder.until_entered()
    [late] = await queued(batcher, "y" * 70)
    encoder.open()
    await asyncio.gather(first, late, *early)
    assert [len(batch[0]) for batch in encoder.batches] == [5, 80, 90, 70]


async def test_a_bad_query_fails_alone(batcher: Batcher[Text, str], encoder: GatedEncoder) -> None:
    first = await hold(batcher, encoder)
    good, bad, fine = await queued(batcher, "good", "bad", "fine")
    encoder.open()
    answers = await asyncio.gather(first, good, bad, fine, return_exceptions=True)
    assert [answers[0], answers[1], answers[3]] == ["first=5", "good=4", "fine=4"]
    assert isinstance(answers[2], ValueError)


async def test_a_query_that_cannot_be_tokenized_fails_alone_and_leaves_no_place_taken(
    encoder: GatedEncoder,
) -> None:
    batcher = Batcher(encoder, echo, Limits(waiting=3))
    first = await hold(batcher, encoder)
    for _ in range(3):  # one more would be refused if a place stayed taken
        good, bad = batcher.submit(Text("good")), batcher.submit(Text("no word"))
        with pytest.raises(ValueError, match="cannot tokenize"):
            await bad
        encoder.open(2)
        assert await good == "good=4"
    assert await first == "first=5" and batcher.waiting == 0
    batcher.close()


async def test_each_micro_batch_is_told_with_its_padding(
    encoder: GatedEncoder,
) -> None:
    told: list[Batch] = []
    batcher = Batcher(encoder, echo, observe=told.append)
    first = await hold(batcher, encoder)
    rest = await queued(batcher, "x", "xxxxx")
    encoder.open()
    await asyncio.gather(first, *rest)
    batcher.close()
    assert [(batch.queries, batch.tokens, batch.padded_tokens) for batch in told] == [(1, 5, 5), (2, 6, 10)]
    assert told[1].waited_s > 0 and told[0].encode_s > 0


async def test_a_batch_that_nobody_got_an_answer_from_is_no_progress(encoder: GatedEncoder) -> None:
    def broken(queries: list[Text], vectors: FloatArray) -> list[str]:
        raise OSError("the index is away")

    told: list[Batch] = []
    batcher = Batcher(encoder, broken, observe=told.append)
    encoder.open()
    failed = await asyncio.gather(*(batcher.submit(Text("x")) for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in failed] == ["the index is away"] * 3
    batcher.close()
    assert told == []


async def test_queries_wait_and_are_counted_where_finishing_is_slow(encoder: GatedEncoder) -> None:
    gate = threading.Event()

    def slow(queries: list[Text], vectors: FloatArray) -> list[str]:
        assert gate.wait(20)
        return echo(queries, vectors)

    batcher = Batcher(encoder, slow, Limits(waiting=8, batch_items=1))
    encoder.open()
    asked = [batcher.submit(Text("x")) for _ in range(8)]
    # Two are handed on, one is encoded and waits for that.
    async with asyncio.timeout(20):
        while len(encoder.batches) < 3:  # noqa: ASYNC110  (threads set no event)
            await asyncio.sleep(0.001)
    assert batcher.waiting == 5 and batcher.busy_s > 0
    gate.set()
    assert await asyncio.gather(*asked) == ["x=1"] * 8
    batcher.close()
    assert batcher.busy_s == 0


async def test_limits_can_be_changed_while_it_works(
    batcher: Batcher[Text, str], encoder: GatedEncoder
) -> None:
    first = await hold(batcher, encoder)
    batcher.limits = replace(batcher.limits, batch_items=2)
    rest = await queued(batcher, "a", "b", "c")
    encoder.open()
    await asyncio.gather(first, *rest)
    assert [len(batch) for batch in encoder.batches] == [1, 2, 1]


async def test_a_query_whose_finish_fails_fails_alone(encoder: GatedEncoder) -> None:
    def picky(queries: list[Text], vectors: FloatArray) -> list[str]:
        if any(query.text == "odd" for query in queries):
            raise KeyError("odd")
        return echo(queries, vectors)

    batcher = Batcher(encoder, picky)
    first = await hold(batcher, encoder)
    odd, even = await queued(batcher, "odd", "even")
    encoder.open()
    answers = await asyncio.gather(first, odd, even, return_exceptions=True)
    assert [answers[0], answers[2]] == ["first=5", "even=4"]
    assert isinstance(answers[1], KeyError)
    batcher.close()


async def test_a_result_count_that_is_wrong_is_an_error_and_no_hang(encoder: GatedEncoder) -> None:
    batcher: Batcher[Text, str] = Batcher(encoder, lambda queries, vectors: ["one", "too many"])
    encoder.open()
    with pytest.raises(RuntimeError, match="2 results for 1 queries"):
        await batcher.submit(Text("x"))
    batcher.close()


async def test_a_cancelled_query_is_not_encoded(batcher: Batcher[Text, str], encoder: GatedEncoder) -> None:
    first = await hold(batcher, encoder)
    gone, kept = await queued(batcher, "gone", "kept")
    gone.cancel()
    await asyncio.sleep(0)  # one turn of the loop
    assert batcher.waiting == 1, "who gave up takes nobody's place"
    encoder.open()
    assert [await first, await kept] == ["first=5", "kept=4"]
    assert encoder.batches == [["first"], ["kept"]]


async def test_a_full_queue_refuses_and_takes_again_once_it_has_room(encoder: GatedEncoder) -> None:
    batcher = Batcher(encoder, echo, Limits(waiting=2))
    first = await hold(batcher, encoder)
    waiting = [batcher.submit(Text("a")), batcher.submit(Text("b"))]
    with pytest.raises(QueueFull, match="2 queries wait"):
        batcher.submit(Text("c"))
    encoder.open()
    await asyncio.gather(first, *waiting)
    assert await batcher.submit(Text("c")) == "c=1"
    batcher.close()


async def test_closing_answers_what_was_submitted_and_refuses_the_rest(encoder: GatedEncoder) -> None:
    batcher = Batcher(encoder, echo)
    encoder.open()
    submitted = [batcher.submit(Text(text)) for text in ("a", "b")]
    await asyncio.to_thread(batcher.close)
    assert [await answer for answer in submitted] == ["a=1", "b=1"]
    assert not batcher.is_alive
    with pytest.raises(RetrieverError, match="shutting down"):
        batcher.submit(Text("c"))


async def test_callers_on_two_event_loops_each_get_their_answer(
    batcher: Batcher[Text, str], encoder: GatedEncoder
) -> None:
    async def elsewhere() -> str:
        return await batcher.submit(Text("there"))

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
    encoder.open()
    assert await batcher.submit(Text("here")) == "here=4"
    assert await other == "there=5"
