from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import chat
from benchmarks.chat import QUICK, Round, Watch, measure, measured, soaked
from benchmarks.stub_model import packets, serving

TINY = replace(QUICK, in_flight=4, soak_calls=40, rounds=1, calls=16, sdk_calls=8)


async def test_all_ways_are_asked_the_same_and_answer_the_same() -> None:
    with serving(TINY.behaviour) as server:
        figures = {figure.name: figure for figure in await measure(server.url, TINY)}
        ratio = figures["CPU per streamed call, ours / bare aiohttp"]
        assert (ratio.op, ratio.target) == ("<=", 2.0) and ratio.value > 0
        assert {way for way in chat.WAYS if f"  CPU per call, {way}" in figures} == set(chat.WAYS)
        # An answer that is not the stub's, or not whole, is no measurement.
        for way in chat.WAYS:
            with pytest.raises(RuntimeError, match="another text"):
                await measured(way, server.url, TINY, ["something else"] * 40)


async def test_the_watch_sees_the_connections_and_no_more_than_the_pool() -> None:
    expected = [TINY.behaviour.text(number) for number in range(TINY.soak_calls)]
    with serving(TINY.behaviour) as server:
        watch = await soaked(server.url, TINY, expected)
    before = watch.descriptors[-1] - TINY.in_flight
    assert before < max(watch.descriptors) <= before + TINY.in_flight + 1
    assert len(watch.rss) == len(watch.descriptors) >= 2


def test_the_figures_miss_where_descriptors_or_memory_grow() -> None:
    good, bad = Watch([20, 30], [100, 104]), Watch([20, 600], [100, 106])
    assert [figure.is_reached for figure in chat._held(good, chat.Size())] == [True, True, True]
    assert [figure.is_reached for figure in chat._held(bad, chat.Size())] == [False, False, True]
    seen = {way: [Round(cost, 1.0)] * 3 for way, cost in zip(chat.WAYS, (2.1, 1.0, 9.0), strict=True)}
    ratio, sdk, *_ = chat._cost(seen)
    assert not ratio.is_reached and sdk.value == pytest.approx(2.1 / 9)


def test_a_gradual_stub_sends_each_piece_in_a_packet_of_its_own() -> None:
    text = TINY.behaviour.text(3)
    gradual = packets(text, TINY.behaviour)
    assert len(gradual) == TINY.behaviour.chunks + 3  # and the end, the usage, [DONE]
    at_once = packets(text, replace(TINY.behaviour, is_gradual=False))
    assert len(at_once) == 2 and b"".join(at_once) == b"".join(gradual)
