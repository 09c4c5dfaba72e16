from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest

from ray_app import balance
from ray_app.balance import HEADROOM, Homes

SESSIONS = [f"{number:032x}" for number in range(4000)]


@dataclass
class Replica:
    """An endpoint as far as the choice is concerned."""

    url: str
    open: int = 0
    is_healthy: bool = True


def replicas(number: int) -> list[Replica]:
    return [Replica(f"http://10.0.0.{n}:8000/v1") for n in range(number)]


def homes_of(targets: list[Replica], *, is_loaded: bool = False) -> dict[str, str]:
    """Where each session goes first, in a process of its own; the call stays open if `is_loaded`."""
    homes, found = Homes(), {}
    for session in SESSIONS:
        target = homes.pick(session, targets)
        target.open += is_loaded
        found[session] = target.url
    return found


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("number", [2, 4, 8])
def test_one_more_replica_moves_at_most_two_nths_of_the_sessions(number: int, is_loaded: bool) -> None:
    before = homes_of(replicas(number), is_loaded=is_loaded)
    after = homes_of(replicas(number + 1), is_loaded=is_loaded)
    moved = sum(before[session] != after[session] for session in SESSIONS) / len(SESSIONS)
    assert 0 < moved <= 2 / (number + 1)


def test_every_process_and_every_later_call_chooses_the_same_home() -> None:
    targets = replicas(4)
    homes = Homes()
    first = {session: homes.pick(session, targets).url for session in SESSIONS}
    for target, load in zip(targets, (900, 0, 30, 5), strict=True):
        target.open = load  # however the load has changed since
    assert {session: homes.pick(session, targets).url for session in SESSIONS} == first
    assert homes_of(list(reversed(replicas(4)))) == first


def test_no_replica_gets_much_more_than_its_share() -> None:
    targets = replicas(4)
    homes = Homes()
    for number, session in enumerate(SESSIONS[:512], 1):
        homes.pick(session, targets).open += 1
        assert max(target.open for target in targets) <= max(HEADROOM * number / 4, math.ceil(number / 4))
    assert sum(target.open for target in targets) == 512


def test_a_call_without_a_session_goes_where_the_fewest_are_open() -> None:
    targets = replicas(3)
    targets[0].open, targets[1].open, targets[2].open = 4, 1, 2
    assert Homes().pick("", targets) is targets[1]


def test_a_session_leaves_an_unhealthy_home_for_good_and_others_stay() -> None:
    targets, homes = replicas(4), Homes()
    before = {session: homes.pick(session, targets).url for session in SESSIONS}
    targets[0].is_healthy = False
    during = {session: homes.pick(session, targets).url for session in SESSIONS}
    targets[0].is_healthy = True
    after = {session: homes.pick(session, targets).url for session in SESSIONS}
    lost = {session for session, url in before.items() if url == targets[0].url}
    assert {session for session in SESSIONS if before[session] != during[session]} == lost
    assert after == during
    assert set(Counter(during[session] for session in lost)) == {target.url for target in targets[1:]}


def test_a_failed_call_tries_elsewhere_and_the_next_one_is_at_home_again() -> None:
    targets, homes = replicas(3), Homes()
    home = homes.pick("s", targets)
    detour = homes.pick("s", targets, {home.url})
    assert detour is not home
    last = homes.pick("s", targets, {home.url, detour.url})
    assert len({home.url, detour.url, last.url}) == 3
    assert homes.pick("s", targets, {target.url for target in targets}) is home
    assert homes.pick("s", targets) is home


def test_only_so_many_homes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "MAX_HOMES", 10)
    targets, homes = replicas(2), Homes()
    home = homes.pick("busy", targets)
    home.open = 100  # chosen anew, it would go elsewhere
    for session in SESSIONS[:30]:
        homes.pick(session, targets)
        assert homes.pick("busy", targets) is home
    for session in SESSIONS[:30]:
        homes.pick(session, targets)
    assert homes.pick("busy", targets) is not home
