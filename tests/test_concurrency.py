from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.thrash import CURVES, best, simulate
from ray_app.concurrency import CALM_S, Bounds, Controller, Observation
from ray_app.slots import Sample

REFUSED = Sample("congested", 0.1)


def feed(
    controller: Controller,
    at_s: float,
    samples: Sequence[Sample] = (),
    *,
    in_flight: int | None = None,
    waiting: int = 100,
    pressure: float | None = None,
    queued: float | None = None,
) -> int:
    flying = controller.limit if in_flight is None else in_flight
    return controller.observe(Observation(at_s, samples, flying, waiting, pressure, queued))


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("start", [1, 512])
def test_an_engine_that_thrashes_in_silence_is_run_within_a_tenth_of_its_best(name: str, start: int) -> None:
    curve, learning, calls = CURVES[name], 3000, 9000
    found = simulate(curve, start, calls, seed=start)
    span = found.ended_s[-1] - found.ended_s[learning - 1]
    assert sum(found.works[learning:]) / span >= 0.9 * best(curve)[1]


def test_idle_hours_and_the_tail_of_a_run_change_no_limit() -> None:
    curve = CURVES["seed 32/64/128"]
    idle = simulate(curve, 64, 7000, demand=lambda at: 2048 if at < 900 else 3 if at < 4000 else 2048)
    assert not [change for change in idle.limits if 910 < change[0] < 4000]
    # Nor is what was learned forgotten.
    later = [work for at, work in zip(idle.ended_s, idle.works, strict=True) if at > 4100]
    assert sum(later) / (idle.ended_s[-1] - 4100) > 0.9 * best(curve)[1]


@pytest.mark.parametrize("demand", [200, 512, 640])
def test_a_run_of_fewer_tasks_than_the_limit_may_grow_to_is_not_left_in_the_crowd(demand: int) -> None:
    curve = CURVES["early fall"]
    found = simulate(curve, 64, 9000, demand=lambda at: demand)
    assert max(limit for _, limit, _ in found.limits) <= demand
    learning = 3000
    span = found.ended_s[-1] - found.ended_s[learning - 1]
    assert sum(found.works[learning:]) / span >= 0.9 * best(curve).rate
    # And where the demand sinks below a limit that was too high for it.
    sinks = simulate(curve, 512, 9000, demand=lambda at: 640 if at < 60 else 400)
    span = sinks.ended_s[-1] - sinks.ended_s[learning - 1]
    assert sum(sinks.works[learning:]) / span >= 0.9 * best(curve).rate


def test_a_server_that_takes_no_call_for_a_minute_has_its_limit_when_it_is_back() -> None:
    controller = Controller(Bounds(start=100))
    for at in range(60):
        feed(controller, at, [REFUSED] * 8, in_flight=at % 4)
    assert controller.limit == 100
    # Too much for it is another matter, whether calls end meanwhile or not.
    assert feed(controller, 70.0, [REFUSED] * 8, in_flight=40) == 30
    fast = Controller(Bounds(start=100))
    assert feed(fast, 1.0, [REFUSED] * 8 + [Sample("ok", 0.1)], in_flight=8) == 6


def test_an_endpoint_that_bears_much_is_not_throttled_in_the_first_minute() -> None:
    controller = Controller(Bounds(start=128))
    # Calls of half a minute, none of which has ended when it matters.
    limits = [feed(controller, float(second), waiting=512 - controller.limit) for second in range(60)]
    assert limits[30] == 512


def test_one_decrease_per_episode_however_many_calls_are_refused() -> None:
    controller = Controller(Bounds(start=100))
    feed(controller, 0.0, [Sample("ok", 10.0)])
    feed(controller, 1.0, [REFUSED] * 50)
    assert controller.limit == 75 and controller.mode == "avoid"
    # Those that were sent before, and what is refused while the others drain, belong to it.
    feed(controller, 2.0, [Sample("congested", 60.0)] * 50, in_flight=90)
    feed(controller, 12.0, [REFUSED] * 9, in_flight=75)
    assert controller.limit == 75
    feed(controller, 60.0, [REFUSED], in_flight=75)  # a new one
    assert controller.limit == 56


def test_a_refusal_in_hundreds_of_calls_is_no_overload_and_one_in_ten_is() -> None:
    served = Sample("ok", 1.0)
    controller = Controller(Bounds(start=100))
    feed(controller, 0.0, [served] * 200)
    for second in range(1, 60):
        feed(controller, float(second), [served] * 80 + [REFUSED] * (second % 9 == 0))
        assert controller.mode != "avoid"
    limit = controller.limit
    for second in range(60, 70):
        feed(controller, float(second), [served] * 90 + [REFUSED] * 10)
    assert controller.mode == "avoid" and controller.limit < limit


def test_growth_after_congestion_is_slow_and_only_while_the_limit_is_used() -> None:
    controller = Controller(Bounds(start=100))
    feed(controller, 0.0, [Sample("ok", 2.0)])
    feed(controller, 1.0, [REFUSED])
    for second in range(2, 60):
        feed(controller, float(second), in_flight=10, waiting=0)
    assert controller.limit == 75
    limits = [feed(controller, float(second)) for second in range(60, 100)]
    assert limits == sorted(limits) and 85 < limits[-1] < 160
    # In the end what it yields decides again.
    feed(controller, 100.0 + CALM_S)
    assert controller.mode == "climb"


def test_no_limit_goes_below_its_floor_and_a_fixed_one_stays() -> None:
    controller = Controller(Bounds(start=4, floor=2))
    fixed = Controller(Bounds(8, 8, 8))
    for second in range(0, 4000, 40):
        feed(controller, float(second), [REFUSED])
        assert feed(fixed, float(second), [REFUSED] if second % 80 else [Sample("ok", 1.0)]) == 8
    assert controller.limit == 2


def test_a_full_kv_cache_is_congestion_and_a_fuller_one_ends_growth() -> None:
    full = Controller(Bounds(start=64))
    assert feed(full, 1.0, pressure=0.97, queued=5) == 48
    held = Controller(Bounds(start=64))
    assert [feed(held, float(second), pressure=0.92) for second in range(40)][-1] == 64
    # A queue inside the engine alone is how it batches, until it is most of what is open.
    queued = Controller(Bounds(start=64))
    assert [feed(queued, float(second), queued=10) for second in range(15)][-1] == 128
