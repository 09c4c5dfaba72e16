"""How a run is carried out: plain values that travel to every process of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_app import object_store, steady
from ray_app.event_writer import EventWriter

if TYPE_CHECKING:
    from ray_app.event_writer import Tap


# Storage that fails is waited for; then what needs it fails.
STORAGE_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing here changes what is measured."""

    run_dir: Path
    run_id: str
    epoch: int
    concurrency: int
    workers: int
    attempts: int
    give_up_after: int = 1_000_000
    canary: str = ""  # of the dataset, carried in the metadata of every log file
    # Holds even where a call ignores its cancellation; None: calls have deadlines of their own.
    attempt_deadline_s: float | None = None
    # A worker that answers nothing for so long (stopped, held by a call that blocks) is replaced.
    worker_lease_s: float = 60.0
    storage_patience_s: float = STORAGE_PATIENCE_S
    replays: Path | None = None  # the run whose record answers all calls; none goes out then
    url: str = ""  # of the object store that `run_dir` mirrors; other nodes have mirrors of their own
    began: steady.Beginning = field(default_factory=steady.beginning)  # by which events are stamped

    def here(self) -> Options:
        """The same on this node."""
        return replace(self, run_dir=object_store.attach(self.url)) if self.url else self

    def writer(
        self, name: str, tap: Tap | None = None, guard: Callable[[], None] = lambda: None
    ) -> EventWriter:
        """A log writer of its own for each process start, whatever else writes to this run."""
        writer_id = f"{self.writer_prefix(name)}{uuid.uuid4().hex[:8]}"
        metadata = {"canary": self.canary} if self.canary else None
        return EventWriter(self.run_dir, writer_id, metadata=metadata, tap=tap, epoch=self.epoch, guard=guard)

    def writer_prefix(self, name: str) -> str:
        """How the ids of all writers of the process `name` begin, in this epoch."""
        return f"e{self.epoch:04d}-{name}-"
