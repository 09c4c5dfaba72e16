from __future__ import annotations

import time

import pytest

from ray_app import sse
from ray_app.sse import EventParser

STREAM = (
    b"\xef\xbb\xbfdata: first\r\n\r\n"
    b": a comment, to keep the connection\n\n"
    b"data:no space\n\n"
    b"event: message\nid: 7\nretry: 10\ndata:  two spaces\n\n"
    b"data: of two\rdata: lines\r\r"
    b"data: of two\r\ndata: more\r\n\r\n"
    b"data:\n\n"
    b"data: caf\xc3\xa9\r\n\r\n"
    b"database: another field\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [
    b"first",
    b"no space",
    b" two spaces",
    b"of two\nlines",
    b"of two\nmore",
    b"",
    "café".encode(),
    b"[DONE]",
]


def parsed(packets: list[bytes]) -> list[bytes]:
    parser = EventParser()
    return [event for packet in packets for event in parser.feed(packet)] + parser.close()


def test_events_are_the_same_wherever_the_network_cuts_them() -> None:
    assert parsed([STREAM]) == EVENTS
    assert parsed([STREAM[n : n + 1] for n in range(len(STREAM))]) == EVENTS
    for first in range(len(STREAM)):
        for size in (1, 2, 7):
            cut = [STREAM[:first], STREAM[first : first + size], STREAM[first + size :]]
            assert parsed(cut) == EVENTS, cut


def test_an_event_comes_as_soon_as_it_is_whole() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\ndata: b") == [b"a"]
    assert parser.feed(b"\n\n") == [b"b"]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
def test_the_last_event_counts_without_its_blank_line(end: bytes) -> None:
    assert parsed([b"data: a\n\ndata: [DONE]" + end]) == [b"a", b"[DONE]"]


def test_a_very_long_line_takes_time_in_proportion_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    packets = [b"data: "] + [b"x" * 100] * 100_000 + [b"\n\n"]
    started = time.process_time()
    (event,) = parsed(packets)
    assert len(event) == 10_000_000
    assert time.process_time() - started < 2  # joined anew for each packet, it is 500 GB of copying
    monkeypatch.setattr(sse, "MAX_HELD_BYTES", 1000)
    with pytest.raises(ValueError, match="one line of more than"):
        parsed(packets)
