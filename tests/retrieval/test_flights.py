from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import Any

import pytest

from ray_app.retrieval.flights import Flights, Landing


async def landed(value: int) -> int:
    return value


async def test_one_who_waits_is_told_that_it_is_first_and_the_next_work_is_its_own() -> None:
    flights: Flights[int] = Flights()
    both = await asyncio.gather(*(flights.share("a", partial(landed, n)) for n in (1, 2)))
    assert both == [Landing(1, True), Landing(1, False)]
    assert await flights.share("a", lambda: landed(3)) == Landing(3, True)


async def test_nobody_joins_work_that_is_being_cancelled() -> None:
    flights: Flights[int] = Flights()
    first = asyncio.create_task(flights.share("a", lambda: asyncio.sleep(60, 1)))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert await flights.share("a", lambda: landed(2)) == Landing(2, True)


async def test_work_that_fails_when_it_is_cut_off_bothers_nobody() -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

    async def stubborn() -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("cut off") from None
        return 1

    flights: Flights[int] = Flights()
    only = asyncio.create_task(flights.share("a", stubborn))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    await asyncio.sleep(0)
    del only  # its traceback holds the work
    gc.collect()
    assert complaints == []


async def test_closing_cancels_what_is_under_way() -> None:
    flights: Flights[int] = Flights()
    waiting = asyncio.create_task(flights.share("a", lambda: asyncio.sleep(60, 1)))
    await asyncio.sleep(0)
    await flights.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
