"""Group commits: a worker's completed calls reach the checkpoint actor before their tasks go on.

What is appended goes two ways: to the event log, which reaches storage within a second, and to the
checkpoint actor, in groups, one every 25 ms at most. A call is committed when either has it. So a task never
goes on from a call that the death of its worker could lose, and a checkpoint actor that is away costs a
write to storage, not a call.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from typing import Any, Literal

from ray.exceptions import RayError

from ray_app import lease
from ray_app.checkpoint import Ack, Mark, pack
from ray_app.errors import InfrastructureError, StorageError
from ray_app.event_writer import EventWriter
from ray_app.events import EVENT_SCHEMA
from ray_app.options import Options
from ray_app.planning import Key
from ray_app.records import Event

_log = logging.getLogger(__name__)

# A call of an actor costs 2.5 ms of CPU on both sides together, so a group is worth waiting for.
GROUP_S = 0.025
# An actor that does not answer by then may be restarting: storage is asked instead, and it for a while not.
ACTOR_TIMEOUT_S = 1.0
AVOIDED_S = 1.0
TICK_S = 1.0
LEASE_CHECK_S = 5.0
# So that the actor knows that somebody lives while one long call keeps all waiting.
ALIVE_S = 60.0
RETRY_S = 0.1
# An event loop that stood still for so long was stopped, perhaps: less than any loss is noticed in.
AWAY_S = 2.0
# While the log cannot be written nothing new is paid for: what completes now could be lost with everything.
HOLD_AFTER_S = 1.5
PAID_KINDS = frozenset({"model_call", "retrieval", "code"})

_COLUMNS = EVENT_SCHEMA.names[1:]  # of a row as the log takes it
_mark = itemgetter(*map(_COLUMNS.index, ("rollout_key", "trial", "attempt", "call_seq", "event_id")))
_SEQ, _STATUS = _COLUMNS.index("call_seq"), _COLUMNS.index("status")


class Replaced(InfrastructureError):
    """This attempt, or this whole driver, has a successor: nothing more may be paid for."""


class Committer:
    """The event sink of one worker process; for one event loop."""

    def __init__(
        self, options: Options, name: str, actor: Any, on_refused: Callable[[Key, int], None]
    ) -> None:
        self._options, self._actor, self._on_refused = options, actor, on_refused
        self._rows: list[tuple[Any, ...]] = []
        self._bodies: list[tuple[str, str, str]] = []
        self._sent = self._told = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._wake = asyncio.Event()
        self._incarnation = ""
        self._avoided_until = self._asked = 0.0
        self._turned = time.monotonic()
        # Once this process was away: the attempts that were asked about since.
        self._asked_about: set[Mark] | None = None
        self._is_replaced = False
        # By live calls; what is served from the record has no row here.
        self.spent_usd = 0.0
        self._may_spend = asyncio.Event()
        self._may_spend.set()
        self._log: EventWriter = options.writer(name, tap=self)
        # By which the actor knows this process start; the driver knows how it begins.
        self._id = f"{options.writer_prefix(name)}{uuid.uuid4().hex[:8]}"
        self._tasks: list[asyncio.Task[None]] = []

    def append(self, event: Event) -> str:
        if event.kind in PAID_KINDS and not event.is_replayed:
            self.spent_usd += event.cost_usd or 0.0
        event_id = self._log.append(event)
        self._wake.set()
        return event_id

    def payload(self, body: str, media: Literal["json", "text"] = "json") -> str:
        return self._log.payload(body, media)

    def row(self, row: tuple[Any, ...]) -> None:
        """Of the log: a row that it has just taken."""
        self._rows.append(row)

    def body(self, body: tuple[str, str, str]) -> None:
        self._bodies.append(body)

    async def admit(self, rollout_key: str, trial: int, attempt: int) -> None:
        """Before a call goes out: waits while the log cannot be written.

        Waits for good once nothing more may be spent. A process that was stopped asks whether the attempt is
        still wanted.
        Raises Replaced where another driver has the run, StorageError when the wait takes too long.
        """
        self._start()
        self._check()
        while (failing_s := self._log.failing_s) > HOLD_AFTER_S:
            if failing_s > self._options.storage_patience_s:
                raise StorageError(f"{self._log.failure} (waited {failing_s:.0f} s)")
            await asyncio.sleep(RETRY_S)
            self._check()
        await self._may_spend.wait()
        self._turn()
        question = (rollout_key, trial, attempt, -1, "")
        while (about := self._asked_about) is not None and question not in about:
            await self._inquire(question)
            about.add(question)
            self._check()

    def allow(self, *, may_spend: bool) -> None:
        """Whether calls may go out from now on."""
        if may_spend:
            self._may_spend.set()
        else:
            self._may_spend.clear()

    async def _inquire(self, question: Mark) -> None:
        """Tells whether the attempt may go on; an actor that restarts is waited for."""
        give_up = time.monotonic() + self._options.storage_patience_s
        while True:
            try:
                return await self._follow(await self._ask(self._sent, [question], b""))
            except (RayError, TimeoutError) as error:
                if time.monotonic() > give_up:
                    raise InfrastructureError(f"the checkpoint actor does not answer: {error}") from None
                await asyncio.sleep(RETRY_S)

    async def committed(self) -> None:
        """Returns when what was appended so far would outlive this process. Raises Replaced."""
        self._start()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._tasks[0].done():
            raise InfrastructureError("the commit loop of this worker has ended")
        self._waiting.append((self._log.taken, done))
        self._wake.set()
        await done
        self._check()

    async def stored(self) -> None:
        """Returns when all that was appended so far is in the log: storage that fails is waited for.

        Raises StorageError when that takes too long.
        """
        while True:
            try:
                return await asyncio.to_thread(self._log.flush)
            except StorageError:
                if self._log.failing_s > self._options.storage_patience_s:
                    raise
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Everything to storage. Raises StorageError where that fails; the checkpoint actor has it then."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._log.close)
        if self._sent > self._told:
            with suppress(RayError, TimeoutError):  # it drops what it holds when the run ends
                await self._ask(self._log.taken, (), b"")

    def _check(self) -> None:
        if self._is_replaced:
            raise Replaced(f"epoch {self._options.epoch} was replaced: another driver has the run")

    def _start(self) -> None:
        """The loops of this object: begun in the event loop that uses it."""
        if not self._tasks:
            self._turned = time.monotonic()
            loops = (self._ship, self._tick, self._follow_lease)
            self._tasks = [asyncio.create_task(loop()) for loop in loops]

    async def _ship(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._send()
                # What completes meanwhile makes the next group; the first of a quiet moment went at once.
                await asyncio.sleep(GROUP_S)
        finally:  # nobody may wait for a loop that has ended
            self._fail(InfrastructureError("the commit loop of this worker has ended"))

    async def _send(self) -> None:
        """One group, until the actor or storage has it."""
        rows, bodies, last = self._rows, self._bodies, self._log.taken
        self._rows, self._bodies = [], []
        is_due = time.monotonic() - self._asked > ALIVE_S
        if rows or self._log.synced > self._told or is_due:
            blob = pickle.dumps((bodies, rows), pickle.HIGHEST_PROTOCOL) if rows else b""
            marks = [_mark(row) for row in rows if row[_SEQ] >= 0 and row[_STATUS] == "ok"]
            await self._commit(last, marks, blob)
            self._sent = last
        while self._waiting and self._waiting[0][0] <= last:
            _, done = self._waiting.popleft()
            if not done.done():
                done.set_result(None)

    async def _commit(self, last: int, marks: list[Mark], blob: bytes) -> None:
        while True:
            if time.monotonic() >= self._avoided_until:
                try:
                    ack = await self._ask(last, marks, blob)
                    await self._follow(ack)
                    return
                except (RayError, TimeoutError):
                    self._avoided_until = time.monotonic() + AVOIDED_S
            try:
                await asyncio.to_thread(self._log.sync)
                return
            except StorageError as error:
                if self._log.failing_s > self._options.storage_patience_s:
                    self._fail(error)
                await asyncio.sleep(RETRY_S)

    def _fail(self, error: InfrastructureError) -> None:
        """Tells all who wait that their commit does not come."""
        while self._waiting:
            _, done = self._waiting.popleft()
            if not done.done():
                done.set_exception(type(error)(str(error)))

    async def _ask(self, last: int, marks: Any, blob: bytes) -> Ack:
        synced = self._log.synced
        self._asked = time.monotonic()
        packed = pack(self._options.epoch, self._id, synced, last, marks, blob)
        async with asyncio.timeout(ACTOR_TIMEOUT_S):
            ack: Ack = pickle.loads(await self._actor.commit.remote(packed))
        self._told = synced
        return ack

    async def _follow(self, ack: Ack) -> None:
        self._is_replaced = self._is_replaced or ack.epoch > self._options.epoch
        for key, attempt in ack.refused:
            self._on_refused(key, attempt)
        if self._incarnation not in ("", ack.incarnation):
            # The one that has what is not synced yet is dead: a death of this process must not lose it.
            await self._synced()
        self._incarnation = ack.incarnation

    async def _synced(self) -> None:
        try:
            await asyncio.to_thread(self._log.sync)
        except StorageError as error:
            _log.warning("%s", error)

    async def _tick(self) -> None:
        """Rows that nobody waits for, and news of what is synced, go out within a second too."""
        while True:
            await asyncio.sleep(TICK_S)
            self._turn()
            self._turned = time.monotonic()
            self._wake.set()

    def _turn(self) -> None:
        """Notices, before anything else can happen, that this process did not run for a while."""
        if time.monotonic() - self._turned > TICK_S + AWAY_S:
            self._asked_about = set()
            self._turned = time.monotonic()

    async def _follow_lease(self) -> None:
        """Where the checkpoint actor is out of reach, the lease tells of another driver."""
        while True:
            await asyncio.sleep(LEASE_CHECK_S)
            try:
                newest = await asyncio.to_thread(lease.newest_epoch, self._options.run_dir)
            except (OSError, StorageError):
                continue
            self._is_replaced = self._is_replaced or newest > self._options.epoch
