"""One actor in a cluster that decides the limits of its runs together, and a run's side of it.

The actor (`joint_limits.py` in a process of its own) is made by the first run that needs it, and leaves a
minute after the last. Runs need it for nothing: one that gets no answer goes on alone (`Governor`), and joins
again when there is one. Runs of another version of this code have another actor, and are not seen.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from ray_app import rundir
from ray_app.checkpoint import NAMESPACE, detached
from ray_app.governor import Governor
from ray_app.joint_limits import JointLimits, RunShare, RunUse
from ray_app.slots import RouteKey

_log = logging.getLogger(__name__)

EXCHANGE_S = 1.0
ANSWER_TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 2.0
# A run begins without what it was not told by then.
JOIN_TIMEOUT_S = 5.0
# Without a run for so long, the actor leaves the cluster.
IDLE_S = 60.0


class SharedLimits:
    """The actor. Thread-safe; an exchange only touches memory."""

    def __init__(self, name: str) -> None:
        self._name, self._joint, self._lock = name, JointLimits(), threading.Lock()
        threading.Thread(target=self._tend, name="limits", daemon=True).start()

    def exchange(self, run: str, uses: Mapping[RouteKey, RunUse]) -> dict[RouteKey, RunShare]:
        with self._lock:
            return self._joint.exchange(run, uses)

    def leave(self, run: str) -> None:
        with self._lock:
            self._joint.leave(run)

    def holds(self) -> dict[str, int]:
        """For tests and for people who look: this process, and how many runs it decides for."""
        return {"pid": os.getpid(), "runs": self._joint.runs}

    def _tend(self) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < IDLE_S:
            time.sleep(EXCHANGE_S)
            with self._lock:
                self._joint.drop_silent()
                if self._joint.runs:
                    idle_since = time.monotonic()
        ray.kill(ray.get_actor(self._name, namespace=NAMESPACE), no_restart=True)


class Sharing:
    """Brings what a run's governor has to tell to the actor, and back what it is allowed. For one event loop.

    Never raises, and nobody waits for it but at the start, for a bounded time.
    """

    def __init__(self, governor: Governor, run: str) -> None:
        self._governor, self._run, self._name = governor, run, actor_name()
        self._actor: Any = None
        self._making: asyncio.Future[Any] | None = None
        self._joined = asyncio.Event()
        self._following = asyncio.create_task(self._follow())

    async def joined(self) -> None:
        """Returns when the first answer is there, or it took too long."""
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                await self._joined.wait()
        except TimeoutError:
            _log.warning("the actor of joint limits does not answer: this run finds its limits alone")

    async def close(self) -> None:
        """Gives back what this run had."""
        self._following.cancel()
        await asyncio.wait({self._following})
        if self._actor is not None:
            with suppress(RayError, TimeoutError):
                async with asyncio.timeout(LEAVE_TIMEOUT_S):
                    await self._actor.leave.remote(self._run)

    async def _follow(self) -> None:
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    self._governor.follow(await self._exchange())
                self._joined.set()
            except Exception as error:  # a run must not end for it, whatever it is
                _log.info("no joint limits: %s", error)
                if isinstance(error, ActorDiedError):  # and is not restarted: another one is made
                    self._actor = None
            await asyncio.sleep(max(0.1, EXCHANGE_S - (time.monotonic() - began)))

    async def _exchange(self) -> dict[RouteKey, RunShare]:
        if self._actor is None:
            self._making = self._making or _in_thread(partial(_actor, self._name))
            try:
                self._actor = await asyncio.shield(self._making)
            finally:
                if self._making.done():
                    self._making = None
        shares: dict[RouteKey, RunShare] = await self._actor.exchange.remote(self._run, self._governor.uses())
        return shares


def _in_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Asking for an actor by its name can block for as long as the cluster's head is away. A thread that
    nobody waits for at the end, as for one of `asyncio.to_thread`."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, name="limits", daemon=True).start()
    return asyncio.wrap_future(found)


def actor_name() -> str:
    """Of the code too: a detached actor would go on running the code that it was made of."""
    return f"limits-{rundir.code_digest()[:8]}"


def _actor(name: str) -> Any:
    return detached(SharedLimits, name).remote(name)
