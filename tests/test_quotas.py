from __future__ import annotations

import asyncio
import json
import math
import random

import pytest

from ray_app.allowance import HEARSAY_S, Allowance, use_of
from ray_app.concurrency import Bounds
from ray_app.governor import Governor, Policy
from ray_app.quotas import Grant, Share, Use, WorkerReport, alone, held_back, split
from ray_app.slots import RouteKey, Sample, Slots

KEY = RouteKey("m", "http://127.0.0.1:1/v1")


def test_shares_never_exceed_the_limit_and_reach_all_who_want_some() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        demands = [rng.choice([0, 0, 1, 5, 50, 1000]) for _ in range(rng.randint(1, 9))]
        limit = rng.randint(1, 200)
        shares = split(limit, demands, rng.randint(0, 20))
        assert sum(shares) == limit and min(shares) >= 0
        wanting = [share for share, demand in zip(shares, demands, strict=True) if demand]
        if len(wanting) <= limit:
            assert all(wanting)
        # Nobody waits for what another does not use.
        short = [share for share, demand in zip(shares, demands, strict=True) if share < demand]
        assert not short or max((s - d for s, d in zip(shares, demands, strict=True)), default=0) <= 0
        # What others still have open is not given away twice.
        flying = [rng.randint(0, min(60, demand)) for demand in demands]
        left = held_back(shares, flying)
        open_at_most = sum(max(share, n) for share, n in zip(left, flying, strict=True))
        assert open_at_most <= max(limit, sum(flying)) and all(
            a <= b for a, b in zip(left, shares, strict=True)
        )
    # Where there are fewer places than workers, each has its turn.
    assert {split(1, [3, 3, 3], turn).index(1) for turn in range(3)} == {0, 1, 2}
    # However little it wants.
    assert {split(1, [1, 50, 9], turn).index(1) for turn in range(3)} == {0, 1, 2}


def test_workers_that_start_are_granted_no_more_than_the_limit_between_them() -> None:
    governor = Governor(Policy({KEY: Bounds(3, 3, 3)}), workers=8)
    assert sum(governor.grant(f"w{number}").shares[KEY].now for number in range(8)) == 3
    governor.lose("w0")
    assert [governor.grant(name).shares[KEY].now for name in ("w8", "w9")] == [1, 0]


def test_shares_that_workers_fall_back_to_are_safe_whatever_the_others_have() -> None:
    for limit in range(4, 300, 7):
        for workers in (1, 2, 4):
            # All but one of the driver's grants are in force, and one worker is alone.
            assert alone(limit, workers) * workers <= max(limit // 2, workers)


def test_an_unused_share_flows_to_the_others_within_an_interval() -> None:
    now = [0.0]
    governor = Governor(Policy({KEY: Bounds(100, 100, 100)}), workers=2, clock=lambda: now[0])
    assert [governor.grant(name).shares[KEY].now for name in ("a", "b")] == [50, 50]
    governor.hear("a", WorkerReport("n", {KEY: Use((), 50, 400)}))
    governor.hear("b", WorkerReport("n", {KEY: Use((), 3, 0)}))
    now[0] = 1.0
    governor.tick()
    shares = [governor.grant(name).shares[KEY].now for name in ("a", "b")]
    assert shares == [97, 3]
    # What one gives up is the other's when its calls have ended.
    governor.hear("a", WorkerReport("n", {KEY: Use((), 97, 0)}))
    governor.hear("b", WorkerReport("n", {KEY: Use((), 3, 400)}))
    now[0] = 2.0
    governor.tick()
    assert [governor.grant(name).shares[KEY].now for name in ("a", "b")] == [50, 3]
    governor.lose("a")
    now[0] = 3.0
    governor.tick()
    assert governor.grant("b").shares[KEY].now == 100


def test_a_change_of_a_limit_is_an_event_with_its_reason() -> None:
    now = [0.0]
    governor = Governor(Policy({KEY: Bounds(start=10)}), clock=lambda: now[0])
    now[0] = 1.0
    first = governor.tick()
    governor.hear("a", WorkerReport("n", {KEY: Use([Sample("congested", 0.1)], 10, 5)}))
    now[0] = 2.0
    changes = first + governor.tick()
    assert [(event.kind, event.model, event.endpoint) for event in changes] == [("limit", *KEY)] * 2
    details = [json.loads(event.detail) for event in changes]
    assert [(d["old"], d["new"]) for d in details] == [(None, 10), (10, 7)]
    assert "congested" in details[1]["reason"] and governor.figures()["limits"] == [["m", KEY.url, 7]]


def test_spending_stops_at_the_limit_and_waits_for_what_is_out() -> None:
    governor = Governor(Policy(run_cost_usd=1.0, spent_before_usd=0.5), workers=2)
    governor.hear("a", WorkerReport("n", spent_usd=0.3))
    governor.hear("b", WorkerReport("n", spent_usd=0.1))
    assert governor.may_spend and governor.grant("a").may_spend
    governor.lose("b")  # what a dead worker spent stays spent, what it had not told yet too
    governor.settle("b", 0.15)
    assert governor.spent_usd == pytest.approx(0.95) and governor.may_spend
    governor.settle("b", 0.1)  # of a log that could be read in part only
    assert governor.gone_usd == {"b": 0.15}
    governor.hear("a", WorkerReport("n", spent_usd=0.4, open_calls=2))
    assert not governor.may_spend and not governor.grant("a").may_spend and not governor.is_spent_out
    governor.hear("a", WorkerReport("n", spent_usd=0.45, open_calls=1, has_stopped=True))
    assert not governor.is_spent_out
    governor.hear("a", WorkerReport("n", spent_usd=0.5, has_stopped=True))
    assert governor.is_spent_out


def test_an_endpoint_that_denies_its_calls_is_told_of_once() -> None:
    now, said = [0.0], list[str]()
    governor = Governor(Policy({KEY: Bounds(3, 3, 3)}), warn=said.append, clock=lambda: now[0])
    use = Use((), 0, 0, denial="HTTP 401: bad key")
    for worker in ("a", "b", "a"):
        governor.hear(worker, WorkerReport("n", {KEY: use}))
    now[0] = 1.0
    rows = [(row.model, row.endpoint, row.error) for row in governor.tick() if row.kind == "warning"]
    assert rows == [(*KEY, "HTTP 401: bad key")] and governor.may_spend
    assert said == ["warning: model m: HTTP 401: bad key; its tasks go to the other endpoints"]


def test_a_model_whose_endpoints_are_away_stops_the_run_as_money_does() -> None:
    governor = Governor(workers=2)
    slots = Slots()
    slots.pausing, slots.refusal = 3, "HTTP 429: busy"
    allowance = Allowance({KEY: slots}, open_calls=lambda: 5)
    assert allowance.may_fail
    slots.away = "m answered nothing"
    # What fails from now on stays pending, before the driver knows of it.
    assert allowance.may_spend and not allowance.may_fail
    use = use_of(slots)
    governor.hear("a", WorkerReport("n", {KEY: Use((), 2, 3, 3, slots.refusal)}, open_calls=2))
    assert governor.may_spend and governor.refused() == [[*KEY, 3, "HTTP 429: busy"]]
    governor.hear("b", WorkerReport("n", {KEY: use}, open_calls=2))
    assert not governor.grant("a").may_spend and governor.stopped_for == "m answered nothing"
    assert governor.refused() == [[*KEY, 6, "HTTP 429: busy"]] and not governor.is_spent_out
    for name in ("a", "b"):  # calls that wait have not gone out
        governor.hear(name, WorkerReport("n", {KEY: use}, has_stopped=True))
    assert governor.is_spent_out


async def test_what_answers_other_workers_is_not_away_but_hearsay_makes_no_answer_younger() -> None:
    now, slots = [100.0], Slots()
    governor = Governor(Policy({KEY: Bounds(3, 3, 3)}), workers=2, clock=lambda: now[0])
    allowance = Allowance({KEY: slots}, clock=lambda: now[0])
    governor.hear("a", WorkerReport("n", {KEY: Use([Sample("congested", 1.0)], 0, 0)}))
    assert governor.grant("b").answered == {} and slots.answered_at == -math.inf
    governor.hear("a", WorkerReport("n", {KEY: Use([Sample("ok", 1.0)], 0, 0)}))
    now[0] = 103.0
    grant = governor.grant("b")
    allowance.exchange(grant, "n")
    assert grant.answered == {KEY: 3.0} and slots.answered_at == 100.0 - HEARSAY_S
    slots.answered_at = 99.0  # of its own
    allowance.exchange(grant, "n")
    assert slots.answered_at == 99.0
    allowance.close()


async def test_a_worker_that_hears_nothing_takes_the_safe_share_and_the_old_one_when_it_does() -> None:
    now = [0.0]
    slots = Slots()
    allowance = Allowance({KEY: slots}, lease_s=5.0, clock=lambda: now[0])
    grant = Grant({KEY: Share(40, 12)})
    allowance.exchange(grant, "n")
    assert slots.limit == 40
    now[0] = 4.0
    allowance.check()
    assert slots.limit == 40
    now[0] = 5.5
    allowance.check()
    assert slots.limit == 12
    allowance.exchange(grant, "n")
    assert slots.limit == 40
    # And a stop lets nothing more out, while what is out ends.
    await slots.acquire()
    allowance.exchange(Grant({}, may_spend=False), "n")
    waiting = asyncio.ensure_future(slots.acquire())
    await asyncio.sleep(0)
    report = allowance.exchange(Grant({}, may_spend=False), "n")
    assert report.has_stopped and report.uses[KEY] == Use([], 1, 1) and slots.limit == 0
    waiting.cancel()
    allowance.close()
