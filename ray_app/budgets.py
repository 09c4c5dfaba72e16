"""Budgets of one task: wall time, tokens, dollars. Reaching one is an outcome of the task, no error.

Wall time stands still while a call waits for its turn (`waits.py`): what other tasks do, or an endpoint that
is away, is no reason to end this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from ray_app import waits
from ray_app.config import TaskLimits
from ray_app.errors import LimitReached
from ray_app.journal import Journal

T = TypeVar("T")


async def in_time(work: Awaitable[T], limits: TaskLimits, what: str) -> T:
    """The outcome of `work`. Raises LimitReached where there is no `what` within `limits.wall_s`."""
    if limits.wall_s is None:
        return await work
    deadline = asyncio.timeout(limits.wall_s)
    try:
        async with deadline:
            with waits.of_this_attempt().standing_still(deadline):
                return await work
    except TimeoutError:
        if not deadline.expired():
            raise  # of something inside, and no limit of the task
        raise LimitReached(f"no {what} within {limits.wall_s:g} s (limits.wall_s)") from None


def check_spent(limits: TaskLimits, journal: Journal) -> None:
    """Raises LimitReached once a task has used up its tokens or its dollars."""
    used = journal.usage.prompt_tokens + journal.usage.completion_tokens
    if limits.tokens is not None and used >= limits.tokens:
        raise LimitReached(f"{used} tokens used (limits.tokens is {limits.tokens})")
    if limits.cost_usd is not None and journal.cost_usd >= limits.cost_usd:
        raise LimitReached(f"${journal.cost_usd:.4f} spent (limits.cost_usd is ${limits.cost_usd:g})")
