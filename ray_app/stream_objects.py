"""The flushes of one table that one writer puts on an object store, each a whole Arrow stream."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ray_app.object_store import ObjectStore, flush_name


class StreamObjects:
    """Like `StreamFile`, for a store: what is written is durable at once, and nothing is left to publish."""

    def __init__(self, store: ObjectStore, table: str, epoch: int, writer_id: str, schema: pa.Schema) -> None:
        self._store, self._table, self._epoch, self._writer_id = store, table, epoch, writer_id
        self._header = schema.serialize().to_pybytes()
        self._seq = 0
        self.finished: list[Path] = []

    def write(self, batch: pa.RecordBatch) -> None:
        """Puts a batch, or raises StorageError. A put whose answer was lost may have written: its rows come
        again in another object, since objects never change, and are dropped as doubles."""
        name = flush_name(self._table, self._epoch, self._writer_id, self._seq)
        self._seq += 1
        self._store.put(name, self._header + batch.serialize().to_pybytes())

    def is_due(self, age_s: float, size: int) -> bool:
        return False

    def retire(self) -> None: ...

    def unsynced(self) -> list[int]:
        return []

    def forget_unsynced(self) -> None: ...
