"""The checkpoint actor of a run: the completed calls that storage does not have yet, in a second process.

A worker sends each group of completed calls here before their tasks go on (`committer.py`); the event log
gets them a second later. So the death of a worker loses nothing: its unwritten tail is here, and is written
to the log before its tasks go on elsewhere. The death of this actor loses nothing either: the workers live,
and write their tails themselves. Storage is the truth: what it has leaves this process.

The actor also refuses what comes too late: calls of an older epoch (another driver has the run) and of an
attempt that was replaced. Not covered: a worker and this actor dying within the same second; that costs
what the log had not been given, as the death of everything at once does.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_app import lease, rundir
from ray_app.errors import InfrastructureError, StorageError
from ray_app.event_writer import EventWriter
from ray_app.options import Options
from ray_app.planning import Key
from ray_app.records import digest

_log = logging.getLogger(__name__)

# Jobs have anonymous namespaces of their own, in which the next job could not find the actor.
NAMESPACE = "toolorch"
# What its worker has not synced by then is written here: the worker may be dead, or its disk slow.
TAKEN_OVER_S = 5.0
TEND_S = 1.0
# Without a driver for so long, with nothing left to write, the actor leaves the cluster.
ABANDONED_S = 600.0
OPEN_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 10.0
RETRY_S = 0.25

# (rollout key, trial, attempt, call_seq, event id) of a completed call. Without an event id it is a question:
# may this attempt go on?
Mark = tuple[str, int, int, int, str]


_HEADER = struct.Struct("<I")


def pack(epoch: int, writer: str, synced: int, last: int, marks: Sequence[Mark], blob: bytes) -> bytes:
    """The arguments of `Checkpoint.take` for the way to the actor."""
    head = pickle.dumps((epoch, writer, synced, last, marks), pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(head)) + head + blob


class Ack(NamedTuple):
    """The answer to a group. `incarnation` changes when the actor was restarted and has forgotten."""

    incarnation: str
    epoch: int  # that has the run: a newer one means stop
    refused: tuple[tuple[Key, int], ...] = ()  # tasks and their attempts of which nothing more is taken


@dataclass(slots=True)
class Group:
    """Some rows of a writer that its log may not have yet, pickled with the bodies that they name."""

    last: int  # so many of the writer's rows were taken up to and with this group
    blob: bytes
    arrived: float
    is_adopted: bool = False


@dataclass
class _Live:
    """The newest commit of a task in flight; attempts up to `closed` are over and commit no more calls."""

    attempt: int
    closed: int = 0
    call_seq: int = -1
    event_id: str = ""


class Checkpoint:
    """The actor. Thread-safe; a commit only touches memory."""

    def __init__(self, options: Options, name: str) -> None:
        self._options, self._name = options.here(), name
        self._incarnation = uuid.uuid4().hex[:8]
        # Not that of `options`: a restarted actor may serve a newer driver than the one that made it.
        self._epoch = max(options.epoch, lease.newest_epoch(self._options.run_dir))
        self._tails: dict[str, deque[Group]] = {}
        self._live: dict[Key, _Live] = {}
        self._writer: EventWriter | None = None
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._seen_driver = time.monotonic()
        threading.Thread(target=self._tend, name="checkpoint", daemon=True).start()

    def open(self, epoch: int, attempts: Mapping[Key, int]) -> Ack:
        """A driver takes the run, or says up to which attempt tasks have come to an end."""
        with self._lock:
            self._seen_driver = time.monotonic()
            self._adopt(epoch)
            if epoch == self._epoch:
                self._fence(attempts)
            return Ack(self._incarnation, self._epoch)

    def commit(self, packed: bytes) -> bytes:
        """Takes a group as `pack` made it; a pickled `Ack`. Bytes both ways: half the price of an actor call
        is in what Ray does for each argument of another kind.
        """
        size = _HEADER.unpack_from(packed)[0]
        head = memoryview(packed)[_HEADER.size : _HEADER.size + size]
        epoch, writer, synced, last, marks = pickle.loads(head)
        return pickle.dumps(self.take(epoch, writer, synced, last, marks, packed[_HEADER.size + size :]))

    def take(
        self, epoch: int, writer: str, synced: int, last: int, marks: Sequence[Mark], blob: bytes
    ) -> Ack:
        """Takes a group of `writer`, whose first `synced` rows storage has; all of the group or nothing of
        an older epoch. Calls of replaced attempts stay evidence, and are named as refused."""
        with self._lock:
            self._forget(writer, synced)
            if epoch < self._epoch:
                return Ack(self._incarnation, self._epoch)
            self._adopt(epoch)
            self._seen_driver = time.monotonic()  # Ray ends the workers of a driver that is gone
            refused = tuple({(mark[:2], mark[2]) for mark in marks if not self._swap(mark)})
            if blob:
                self._tails.setdefault(writer, deque()).append(Group(last, blob, time.monotonic()))
            return Ack(self._incarnation, epoch, refused)

    def finish(self, epoch: int, ended: Mapping[Key, int]) -> Ack:
        """The driver is about to count results of these attempts; refused where they are not the newest."""
        with self._lock:
            self._seen_driver = time.monotonic()
            if epoch < self._epoch:
                return Ack(self._incarnation, self._epoch)
            self._adopt(epoch)
            refused = {key for key, attempt in ended.items() if self._newest(key) > attempt}
            for key in ended.keys() - refused:
                if self._live.pop(key, _Live(0)).closed:  # a worker that was cut off may still come with it
                    self._live[key] = _Live(ended[key], closed=ended[key])
            return Ack(self._incarnation, epoch, tuple((key, ended[key]) for key in refused))

    def drain(self, writer_prefix: str = "", older_than_s: float = 0.0) -> int:
        """Writes tails to the log, durably; how many groups. Raises StorageError and keeps them."""
        with self._writing:
            before = time.monotonic() - older_than_s
            with self._lock:
                taken = {
                    writer: [group for group in tail if group.arrived <= before]
                    for writer, tail in self._tails.items()
                    if writer.startswith(writer_prefix)
                }
            groups = [group for tail in taken.values() for group in tail]
            if not groups:
                return 0
            log = self._log()
            for group in groups:
                if not group.is_adopted:  # by a write that failed: the rows wait in the writer
                    bodies, rows = pickle.loads(group.blob)
                    log.adopt(rows, bodies)
                    group.is_adopted = True
            log.sync()
            with self._lock:
                for writer, written in taken.items():
                    left = [group for group in self._tails.get(writer, ()) if group not in written]
                    self._tails[writer] = deque(left)
                    self._forget(writer, 0)
            return len(groups)

    def close(self, epoch: int) -> bool:
        """Everything to storage; whether the caller may end this actor (no newer driver has it)."""
        self.drain()
        with self._writing:
            writer, self._writer = self._writer, None  # all that it took is in the log, whatever closing does
            if writer is not None:
                writer.close()
        with self._lock:
            return bool(epoch == self._epoch)

    def holds(self) -> dict[str, int]:
        """Sizes, for tests and for people who look: tasks in flight, groups and bytes not yet in storage."""
        with self._lock:
            groups = [group for tail in self._tails.values() for group in tail]
            size = sum(len(group.blob) for group in groups)
            return {"live": len(self._live), "groups": len(groups), "bytes": size}

    def _adopt(self, epoch: int) -> None:
        if epoch > self._epoch:
            self._epoch, self._live = epoch, {}

    def _newest(self, key: Key) -> int:
        live = self._live.get(key, _Live(0))
        return max(live.attempt, live.closed)

    def _swap(self, mark: Mark) -> bool:
        """Compare and set: whether `mark` is the newest commit of its task now."""
        rollout_key, trial, attempt, call_seq, event_id = mark
        if not event_id:
            live = self._live.get((rollout_key, trial), _Live(attempt))
            return attempt >= live.attempt and attempt > live.closed
        live = self._live.setdefault((rollout_key, trial), _Live(attempt))
        if attempt < live.attempt or attempt <= live.closed:
            return False
        if attempt == live.attempt and call_seq <= live.call_seq:
            return event_id == live.event_id  # sent again: the answer to the first was lost
        live.attempt, live.call_seq, live.event_id = attempt, call_seq, event_id
        return True

    def _fence(self, attempts: Mapping[Key, int]) -> None:
        for key, attempt in attempts.items():
            live = self._live.setdefault(key, _Live(attempt))
            live.closed = max(live.closed, attempt)

    def _forget(self, writer: str, synced: int) -> None:
        tail = self._tails.get(writer)
        while tail and tail[0].last <= synced:
            tail.popleft()
        if tail is not None and not tail:
            del self._tails[writer]

    def _log(self) -> EventWriter:
        if self._writer is None:
            self._writer = self._options.writer("checkpoint")
        return self._writer

    def _tend(self) -> None:
        while True:
            time.sleep(TEND_S)
            try:
                self.drain(older_than_s=TAKEN_OVER_S)
            except StorageError:
                pass  # the writer has said so; the tails are kept
            except Exception:
                _log.exception("the tails of this run's workers cannot be written; trying again")
            if self._is_abandoned():
                _log.warning("no driver for %g s: the checkpoint actor of this run leaves", ABANDONED_S)
                ray.kill(ray.get_actor(self._name, namespace=NAMESPACE), no_restart=True)

    def _is_abandoned(self) -> bool:
        with self._lock:
            idle_s = time.monotonic() - self._seen_driver
            return not self._tails and idle_s > ABANDONED_S


class CheckpointClient:
    """The driver's side: finds or makes the actor, keeps its fences through restarts of it.

    Every answer that says that another driver has the run raises StorageError.
    """

    def __init__(self, actor: Any, options: Options) -> None:
        self.actor = actor
        self._epoch, self._patience_s = options.epoch, options.storage_patience_s
        self._attempts: dict[Key, int] = {}
        self._incarnation = ""

    async def open(self) -> None:
        """Takes the run in the actor, and writes what an earlier driver's workers left in it.

        Raises StorageError when the log cannot be written or a newer driver has the run.
        """
        try:
            self._follow(await self._call("open", self._attempts))
            await _within(self.actor.drain.remote(), OPEN_TIMEOUT_S)
        except StorageError as error:
            raise StorageError(_words(error)) from None
        except (RayError, TimeoutError) as error:
            raise InfrastructureError(f"the checkpoint actor does not answer: {_words(error)}") from None

    async def finish(self, ended: Mapping[Key, int]) -> set[Key]:
        """Before results are counted: the tasks of `ended` (key to attempt) that have a newer attempt."""
        self._attempts.update({key: ended[key] for key in ended.keys() & self._attempts.keys()})
        ack = await self._ask("finish", dict(ended))
        return {key for key, _ in ack.refused} if ack is not None else set()

    async def fence(self, attempts: Mapping[Key, int]) -> None:
        """These attempts of the tasks are over: from now on none of their calls is taken."""
        self._attempts.update(attempts)
        await self._ask("open", dict(attempts))

    async def release(self, writer_prefix: str, attempts: Mapping[Key, int]) -> None:
        """After the loss of a worker: its tasks are fenced and its tail is in the log when this returns.

        Raises StorageError where the log cannot be written for `storage_patience_s`.
        """
        await self.fence(attempts)
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                await _within(self.actor.drain.remote(writer_prefix), max(1.0, give_up - time.monotonic()))
                return
            except ActorDiedError:
                return  # nothing is held there any more
            except (StorageError, ActorUnavailableError, TimeoutError) as error:
                if time.monotonic() > give_up:
                    raise StorageError(
                        f"the tail of a lost worker cannot be written: {_words(error)}"
                    ) from None
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Everything to storage, and the actor away; what goes wrong now is in the workers' logs too."""
        with suppress(RayError, StorageError, TimeoutError):
            if await _within(self.actor.close.remote(self._epoch), CLOSE_TIMEOUT_S):
                ray.kill(self.actor, no_restart=True)

    async def _ask(self, method: str, *arguments: Any) -> Ack | None:
        """The actor's answer; None while it restarts: then it holds nothing, and the lease is the guard."""
        try:
            ack = await self._call(method, *arguments)
            if ack.incarnation != self._incarnation and self._attempts:
                await self._call("open", self._attempts)
        except (RayError, TimeoutError):
            return None
        self._follow(ack)
        return ack

    async def _call(self, method: str, *arguments: Any) -> Ack:
        ack: Ack = await _within(getattr(self.actor, method).remote(self._epoch, *arguments), ASK_TIMEOUT_S)
        return ack

    def _follow(self, ack: Ack) -> None:
        if ack.epoch != self._epoch:
            raise StorageError(
                f"epoch {self._epoch} was replaced by epoch {ack.epoch}: another driver has the run"
            )
        self._incarnation = ack.incarnation


def _words(error: BaseException) -> str:
    """What went wrong in the actor, without the traceback that Ray wraps around it."""
    return str(getattr(error, "cause", None) or error).strip() or type(error).__name__


async def _within(reference: Any, seconds: float) -> Any:
    async with asyncio.timeout(seconds):
        return await reference


def actor_name(run_dir: Path) -> str:
    """Of the run and of the code: a detached actor would go on running the code that it was made of."""
    return f"{_run_name(run_dir)}-{rundir.code_digest()[:8]}"


def _run_name(run_dir: Path) -> str:
    return f"checkpoint-{digest(str(run_dir))[:12]}"


async def connect(options: Options) -> CheckpointClient:
    """The run's checkpoint actor, made where there is none, opened for this driver's epoch."""
    await _retire_other_code(options.run_dir)
    name = actor_name(options.run_dir)
    client = CheckpointClient(detached(Checkpoint, name).remote(options, name), options)
    await client.open()
    return client


def detached(kind: type, name: str) -> Any:
    """The class of an actor that outlives its driver, to be made with `remote`; or of that name."""
    return ray.remote(kind).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0.01,  # with none, Ray heeds no wish for a node
        max_restarts=-1,
        max_concurrency=4,
        # Beside the driver: the node without which the run ends anyway, away from most workers.
        scheduling_strategy=NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        ),
    )


async def _retire_other_code(run_dir: Path) -> None:
    """Ends this run's actors that run other code, once they have written what they hold."""
    mine = actor_name(run_dir)
    for found in _named(_run_name(run_dir)):
        if found != mine:
            with suppress(ActorDiedError, ValueError):  # it is gone meanwhile
                actor = ray.get_actor(found, namespace=NAMESPACE)
                try:
                    await _within(actor.drain.remote(), OPEN_TIMEOUT_S)
                except (ActorUnavailableError, TimeoutError, StorageError) as error:
                    raise StorageError(
                        f"what an earlier driver's workers left in {found} cannot be written "
                        f"({_words(error)}); run again"
                    ) from None
                ray.kill(actor, no_restart=True)


def _named(prefix: str) -> Iterable[str]:
    listed = ray.util.list_named_actors(all_namespaces=True)
    return [
        item["name"] for item in listed if item["namespace"] == NAMESPACE and item["name"].startswith(prefix)
    ]
