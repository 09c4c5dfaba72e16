from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from benchmarks.thrash import CURVES, best
from benchmarks.thrash_runs import Part, Scene, play
from ray_app.concurrency import Bounds, Controller, Observation
from ray_app.governor import Governor, Policy
from ray_app.joint_limits import GATHER_S, LEASE_S, JointLimits, RunShare, RunUse
from ray_app.quotas import Use, WorkerReport
from ray_app.slots import RouteKey, Sample

KEY = RouteKey("m", "http://127.0.0.1:1/v1")
REFUSED = Sample("congested", 0.1)
DEFAULT, FROM_100 = Bounds(), Bounds(start=100)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def use(
    in_flight: int,
    waiting: int = 0,
    *,
    bounds: Bounds = DEFAULT,
    had: int | None = None,
    samples: tuple[Sample, ...] = (),
) -> RunUse:
    return RunUse(bounds, Observation(0.0, samples, in_flight, waiting), had)


def asked(joint: JointLimits, run: str, told: RunUse) -> RunShare:
    return joint.exchange(run, {KEY: told})[KEY]


@pytest.mark.parametrize("name", CURVES)
def test_two_runs_on_an_engine_that_thrashes_in_silence_share_evenly_and_stay_at_its_peak(name: str) -> None:
    """One begins long after the other, with a limit far beyond the peak; then the first is killed."""
    curve, second_s, killed_s, end_s = CURVES[name], 1200.0, 2400.0, 3300.0
    parts = Part(8, ends_s=killed_s, is_killed=True), Part(256, begins_s=second_s)
    played = play(curve, Scene(parts), seconds=end_s, seed=1)
    assert min(played.shares(second_s + 60, killed_s)) >= 0.4
    rates = [played.rate(*span) for span in ((second_s, killed_s), (killed_s + LEASE_S, end_s))]
    assert min(rates) >= 0.9 * best(curve).rate


def test_shares_of_runs_keep_to_the_joint_limit_and_to_the_bounds_of_each() -> None:
    rng = random.Random(3)
    for _ in range(300):
        clock = Clock()
        joint = JointLimits(clock)
        runs = {
            f"run{n}": Bounds(most=rng.choice([4, 60, 1024])) if rng.random() < 0.8 else Bounds(9, 9, 9)
            for n in range(rng.randint(1, 5))
        }
        for _ in range(6):
            clock.now += 1.0
            told = {
                name: use(rng.choice([0, 1, 5, 40]), rng.choice([0, 3, 500]), bounds=bounds)
                for name, bounds in runs.items()
            }
            for _ in range(2):  # the second time all have been heard of
                shares = {name: asked(joint, name, one) for name, one in told.items()}
            taken = [
                max(share.now, told[name].seen.in_flight)
                for name, share in shares.items()
                if not runs[name].is_fixed
            ]
            fixed = sum(bounds.floor for bounds in runs.values() if bounds.is_fixed)
            limit = shares["run0"].limit
            flying = sum(one.seen.in_flight for one in told.values())
            assert sum(taken) <= max(limit, flying) and len({share.limit for share in shares.values()}) == 1
            assert limit <= sum(bounds.most for bounds in runs.values())
            for name, share in shares.items():
                assert runs[name].floor == share.now if runs[name].is_fixed else share.now <= runs[name].most
                # Somebody who wants to begin is not left without a place for another who has more than two.
                if told[name].wanted and not told[name].seen.in_flight and limit - fixed - flying >= 4:
                    assert share.now > 0


def test_a_run_alone_is_decided_for_as_by_its_own_controller() -> None:
    rng, clock = random.Random(5), Clock()
    joint, own, bounds = JointLimits(clock), Controller(Bounds(start=20, most=300)), Bounds(20, 1, 300)
    limits = []
    for second in range(900):
        clock.now = float(second)
        flying = min(own.limit, 250)
        ended = tuple(
            Sample("ok", rng.uniform(2, 9), completion_tokens=rng.randint(50, 900))
            for _ in range(flying // 5)
        )
        ended += (REFUSED,) if second in (300, 301, 700) else ()
        share = asked(joint, "a", use(flying, 250 - flying, bounds=bounds, samples=ended))
        own.observe(Observation(clock.now, ended, flying, 250 - flying))
        limits.append((share.now, share.limit, share.reason) == (own.limit, own.limit, own.reason))
    assert all(limits) and share.runs == 1


def test_a_run_that_ends_or_is_silent_leaves_its_places_and_one_that_wants_little_holds_none() -> None:
    clock = Clock()
    joint, bounds = JointLimits(clock), Bounds(start=40, most=40)

    def settled(seconds: int, **wanted: int) -> dict[str, int]:
        """What they have open once each has had the time to begin what it may."""
        opened = dict.fromkeys(wanted, 0)
        for _ in range(seconds):
            clock.now += 1.0
            for name, want in wanted.items():
                told = use(min(opened[name], want), want - min(opened[name], want), bounds=bounds)
                opened[name] = min(want, asked(joint, name, told).now)
        return opened

    assert settled(3, a=500) == {"a": 40}
    assert settled(8, a=500, b=500) == {"a": 40, "b": 40}  # joint bounds are the sum of both
    joint.leave("b")
    assert settled(3, a=500) == {"a": 40}
    small = Bounds(start=10, most=10)
    joint, bounds = JointLimits(clock), small
    for name in ("c", "d", "e"):  # each of 10, and a joint limit that begins with that of the first
        assert settled(4, **{name: 3})[name] == 3
        joint.leave(name)
    assert settled(6, f=3, g=500)["f"] == 3
    assert asked(joint, "g", use(7, 400, bounds=bounds)).runs == 2
    # One that has nothing to do yet can begin at once, where there is room for a place more.
    assert settled(6, f=0, g=500)["g"] == 9 and asked(joint, "f", use(0, bounds=bounds)).now == 1
    clock.now += LEASE_S + 1
    assert asked(joint, "g", use(7, 400, bounds=bounds)).runs == 1 and joint.runs == 1


def test_after_a_restart_runs_keep_what_they_had_until_all_were_heard_of() -> None:
    clock = Clock()
    joint = JointLimits(clock)
    assert asked(joint, "a", use(6, 100, had=7))[:2] == (7, 7)
    assert asked(joint, "b", use(5, 100, had=5)).now == 5
    assert asked(joint, "c", use(0, 100)).now == 1  # which is new
    assert asked(joint, "d", use(2, 0, had=3)).now == 3
    joint.leave("d")  # what it had is the others' then
    clock.now = GATHER_S
    assert asked(joint, "b", use(5, 100, had=5)).limit == 16
    # From there on the limit is looked for, and is not what a new run would start with.
    for _ in range(4):
        clock.now += 1.0
        shares = [asked(joint, name, use(4, 100, had=4)).now for name in "abc"]
    assert sorted(shares) == [5, 5, 6]


def governed(clock: Clock, bounds: Bounds = FROM_100) -> Governor:
    return Governor(Policy({KEY: bounds}), clock=clock, is_shared=True)


def test_a_run_that_hears_nothing_goes_on_with_no_more_than_it_had_and_joins_again() -> None:
    clock = Clock()
    governor = governed(clock)
    assert governor.uses()[KEY].had is None
    limits = set()
    governor.follow({KEY: RunShare(30, 80, 2, "climb: more")})
    for second in range(1, 90):
        clock.now = float(second)
        samples = [Sample("ok", 2.0, completion_tokens=100)] * 15
        governor.hear("w", WorkerReport("n", {KEY: Use(samples, governor.limits()[KEY], 500)}))
        governor.tick()
        assert governor.grant("w").shares[KEY].now == governor.limits()[KEY] <= 30
        assert second > LEASE_S + 1 or governor.limits()[KEY] == 30
        limits.add(governor.limits()[KEY])
        assert governor.uses()[KEY].had == 30  # all runs together go on from where they were
    assert len(limits) > 1  # searched for by what it yields, within that
    governor.follow({KEY: RunShare(50, 90, 2, "climb: more")})
    assert governor.limits()[KEY] == 50 and governor.figures()["limits"] == [[*KEY, 50, 90, 2]]


def test_a_run_that_was_alone_is_bounded_by_its_config_only_and_a_fixed_one_never_moves() -> None:
    for bounds, share, expected in (
        (Bounds(start=100), RunShare(64, 64, 1, "climb: more"), 64),
        (Bounds(9, 9, 9), RunShare(9, 50, 3, "climb: more"), 9),
    ):
        clock = Clock()
        governor = governed(clock, bounds)
        governor.follow({KEY: share})
        clock.now = LEASE_S + 1
        governor.tick()
        assert governor.limits()[KEY] == expected
        for second in range(20, 200):
            clock.now = float(second)
            samples = [Sample("ok", 2.0, completion_tokens=100)] * 40
            governor.hear("w", WorkerReport("n", {KEY: Use(samples, governor.limits()[KEY], 500)}))
            governor.tick()
        assert (governor.limits()[KEY] > 64) == (not bounds.is_fixed)


def test_a_decision_is_an_event_and_a_share_that_moves_with_the_demand_is_none() -> None:
    clock = Clock()
    governor = governed(clock)
    moves = [
        RunShare(100, 100, 1, "start"),
        RunShare(60, 100, 2, "start"),
        RunShare(97, 100, 2, "start"),
        RunShare(31, 50, 2, "climb: fewer"),
    ]
    changes = []
    for second, share in enumerate(moves, 1):
        clock.now = float(second)
        governor.follow({KEY: share})
        changes += [json.loads(event.detail) for event in governor.tick()]
    assert [(d["old"], d["new"], d.get("all_runs"), d.get("runs")) for d in changes] == [
        (None, 100, None, None),
        (100, 50, 100, 2),
        (50, 25, 50, 2),
    ]
    assert all(before["reason"] != after["reason"] for before, after in pairwise(changes))


def test_calls_are_told_once_and_what_waits_for_money_wants_no_place() -> None:
    clock = Clock()
    governor = Governor(Policy({KEY: Bounds()}, run_cost_usd=1.0), clock=clock, is_shared=True)
    governor.follow({KEY: RunShare(8, 8, 1, "start")})
    governor.hear("w", WorkerReport("n", {KEY: Use([REFUSED], 8, 40)}))
    clock.now = 1.0
    governor.tick()
    told = governor.uses()[KEY].seen
    assert (list(told.samples), told.in_flight, told.waiting) == ([REFUSED], 8, 40)
    governor.hear("w", WorkerReport("n", {KEY: Use([], 8, 40)}, spent_usd=1.0))
    assert governor.uses()[KEY].seen == Observation(1.0, [], 8, 0)
