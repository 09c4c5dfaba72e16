"""The plan of a chaos pass: every kind has its share, and a number always means the same."""

from __future__ import annotations

from collections import Counter

from tests.chaos.plan import BLOCK, BLOWS, SHARES, Round, every_kind_once, rounds

FULL = range(1, 51)


def kinds(found: list[Round]) -> Counter[str]:
    return Counter(blow.kind for one in found for blow in one.blows)


def test_a_full_pass_has_200_blows_and_each_block_of_it_every_kind() -> None:
    whole = list(rounds(FULL[0], FULL[-1]))
    assert [one.number for one in whole] == list(FULL)
    assert kinds(whole).total() == 200 and kinds(whole)["cluster"] >= 15
    for first in range(0, len(whole), BLOCK):
        assert kinds(whole[first : first + BLOCK]) == Counter(SHARES)


def test_a_round_follows_from_its_number_alone() -> None:
    (alone,) = rounds(17, 17)
    assert alone == list(rounds(11, 20))[6]
    assert len({one.blows for one in rounds(1, 50)}) == 50


def test_no_round_is_hit_by_what_it_does_not_have() -> None:
    for one in rounds(1, 200):
        named = [blow.kind for blow in one.blows]
        assert len(named) == BLOWS and [blow.at for blow in one.blows] == sorted(
            blow.at for blow in one.blows
        )
        assert one.storage == "s3" or "s3" not in named
        assert one.storage == "disk" or not {"full disk", "slow disk"} & set(named)
        assert one.benchmark == "hle" or not {"retriever", "web"} & set(named)
        assert named.count("cluster") <= 1


def test_the_short_form_has_every_kind_once() -> None:
    assert kinds(every_kind_once(1)) == Counter(list(SHARES))
    assert every_kind_once(1) != every_kind_once(2)
