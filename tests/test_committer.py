"""Group commits of one worker, against the checkpoint actor's own class in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from ray_app import committer as module
from ray_app import events, lease
from ray_app.checkpoint import Checkpoint
from ray_app.committer import Committer, Replaced
from ray_app.options import Options
from ray_app.planning import Key
from ray_app.records import Event

KEY: Key = ("rollout", 0)


class Handle:
    """What a worker holds of the actor: `handle.commit.remote(packed)`; dead while `is_dead`."""

    def __init__(self, store: Checkpoint) -> None:
        self.store, self.is_dead, self.asked = store, False, 0

    @property
    def commit(self) -> Handle:
        return self

    async def remote(self, packed: bytes) -> bytes:
        self.asked += 1
        if self.is_dead:
            raise RayActorError
        return self.store.commit(packed)


class Bench:
    """A committer, the actor behind it, and what it was refused."""

    def __init__(self, run_dir: Path) -> None:
        options = Options(run_dir, "run", 1, 4, 1, 3)
        self.store = Checkpoint(options, "unnamed")
        self.store.open(1, {})
        self.handle, self.refused = Handle(self.store), list[tuple[Key, int]]()
        self.run_dir = run_dir
        self.log = Committer(options, "w001", self.handle, lambda key, n: self.refused.append((key, n)))

    def call(self, seq: int, attempt: int = 1) -> str:
        return self.log.append(
            Event("model_call", 1.0, rollout_key=KEY[0], attempt=attempt, call_seq=seq, epoch=1)
        )

    def logged(self) -> set[str]:
        return {
            row for batch in events.read(self.run_dir, ["event_id"]) for row in batch["event_id"].to_pylist()
        }


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Bench]:
    held = lease.take(tmp_path / "run")
    bench = Bench(tmp_path / "run")
    try:
        yield bench
    finally:
        await bench.log.close()
        held.release()


async def test_a_call_is_committed_when_the_actor_has_it_and_calls_share_a_group(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.call(0)
        await bench.log.committed()
        assert bench.store.holds()["groups"] == 1 and bench.logged() == set()
        asked = bench.handle.asked
        for seq in range(1, 21):
            bench.call(seq)
        await asyncio.gather(*(bench.log.committed() for _ in range(20)))
        assert bench.handle.asked == asked + 1


async def test_without_the_actor_a_call_is_committed_when_the_log_has_it(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.handle.is_dead = True
        event_id = bench.call(0)
        await bench.log.committed()
        assert bench.logged() == {event_id}


async def test_what_only_a_dead_actor_had_is_synced_when_another_answers(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        first = bench.call(0)
        await bench.log.committed()
        assert bench.logged() == set()
        bench.handle.store = Checkpoint(Options(bench.run_dir, "run", 1, 4, 1, 3), "unnamed")
        bench.call(1)
        await bench.log.committed()
        assert first in bench.logged()


async def test_a_refused_attempt_is_named_with_its_number(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.store.open(1, {KEY: 1})
        bench.call(0, attempt=1)
        bench.call(0, attempt=2)
        await bench.log.committed()
        assert bench.refused == [(KEY, 1)]


async def test_another_driver_ends_all_calls(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.log.admit(*KEY, 1)
        bench.store.open(2, {})
        bench.call(0)
        with pytest.raises(Replaced, match="epoch 1 was replaced"):
            await bench.log.committed()
        with pytest.raises(Replaced):
            await bench.log.admit(*KEY, 1)


async def test_a_process_that_was_away_asks_once_about_each_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AWAY_S", 0.2)
    monkeypatch.setattr(module, "TICK_S", 0.1)
    async with running(tmp_path) as bench:
        await bench.log.admit(*KEY, 1)
        asked = bench.handle.asked
        await bench.log.admit(*KEY, 1)
        assert (bench.handle.asked, bench.refused) == (asked, []), "nothing is asked in quiet times"
        bench.store.open(1, {KEY: 1})
        time.sleep(0.5)  # noqa: ASYNC251  (the event loop stands still, as in a stopped process)
        await bench.log.admit(*KEY, 1)
        await bench.log.admit(*KEY, 2)
        assert bench.refused == [(KEY, 1)]
        asked = bench.handle.asked
        await bench.log.admit(*KEY, 2)
        assert bench.handle.asked == asked
