from __future__ import annotations

from ray_app.records import Hit, Retrieval
from ray_app.retrieval.group_wire import packed, unpacked
from ray_app.retrieval.index import UnknownScope


def test_answers_and_errors_come_back_as_they_were() -> None:
    found = Retrieval(
        (Hit(7, "a text", 0.5), Hit(-1, "a page", -1.0, "tavily")), 0.012, 2, "one page was slow"
    )
    [part] = packed([(3, found), (0, UnknownScope("unknown question id 'x'"))])
    [first, (position, error)] = unpacked(part)
    assert first == (3, found)
    assert (position, type(error), str(error)) == (0, UnknownScope, "unknown question id 'x'")


def test_parts_of_an_answer_stay_below_what_a_message_holds() -> None:
    big = Retrieval((Hit(1, "x" * 400_000, 0.5),))
    parts = [unpacked(part) for part in packed([(i, big) for i in range(5)])]
    assert [[position for position, _ in part] for part in parts] == [[0, 1], [2, 3], [4]]
    assert list(packed([])) == []
