"""What a replica holds of a corpus: its anonymous memory with many documents, less that with few.

Documents and vectors are files that the replica maps; what it holds beside them is ids, lengths, scopes and
the texts of winners, if it kept any.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Figure
from benchmarks.retriever_data import EXAMPLES, spread_ids, write_corpus, write_manifest
from benchmarks.retriever_processes import MIB, anonymous_bytes
from benchmarks.retriever_stand import Stand
from benchmarks.stub_encoder import DIM, NOOP, bank
from ray_app.retrieval.build import CORPUS, VECTORS

CHARS = 2000
PER_SCOPE = 50
FEW_DOCUMENTS = 1000
MOST_MB = 200.0


def measure_memory(stand: Stand, documents: int, winners: int) -> Iterator[Figure]:
    """The rows of the table. Writes an index of `documents` and removes it."""
    few = _held(stand, FEW_DOCUMENTS, winners)
    many = _held(stand, documents, winners)
    name = (
        f"RssAnon of a replica with {documents:,} documents of 2 kB minus with {FEW_DOCUMENTS:,}, vectors "
        f"subtracted, after {winners:,} distinct winners"
    )
    yield Figure(name, (many - few) / 1e6, "<=", MOST_MB, "MB")
    yield Figure(
        f"  RssAnon with {documents:,} documents (vectors are mapped and not in it)", many / MIB, unit="MiB"
    )
    yield Figure(f"  RssAnon with {FEW_DOCUMENTS:,} documents", few / MIB, unit="MiB")


def _held(stand: Stand, documents: int, winners: int) -> int:
    """RssAnon of a replica after `winners` hits, all distinct where there are so many documents."""
    folder, app = stand.folder / f"documents-{documents}", f"memory-{documents}"
    eids = write_index(folder, documents, winners)
    try:
        config: dict[str, Any] = {"index_dir": str(folder), "examples": str(folder / EXAMPLES)}
        target, _ = stand.ours(app, encoder=NOOP, **config)
        hits = stand.ask_each(target, [(f"query {eid}", eid) for eid in eids])
        if hits != winners:
            raise RuntimeError(f"{hits} hits of {documents} documents; expected {winners}")
        held = anonymous_bytes(target.pid)
        stand.delete(app)
    finally:
        shutil.rmtree(folder)
    return held


def write_index(folder: Path, documents: int, winners: int) -> list[str]:
    """An index of `documents` that stubs' queries all find; the questions, which share no document.

    With fewer documents than winners, questions share them, none twice. Both are multiples of PER_SCOPE.
    """
    folder.mkdir()
    ids = spread_ids(documents)
    source = "word salad, of no meaning, and " * 4000
    texts = (f"{row} {source[row % 97 :]}"[:CHARS] for row in range(documents))
    write_corpus(folder / CORPUS, ids, texts)
    open_memmap: Any = np.lib.format.open_memmap  # numpy ships it without types
    held = open_memmap(folder / VECTORS, mode="w+", dtype=np.float32, shape=(documents, DIM))
    made = bank()
    for start in range(0, documents, len(made)):
        held[start : start + len(made)] = made[: documents - start]
    held.flush()
    write_manifest(folder, documents)
    rng = np.random.default_rng(5)
    rows = np.concatenate([rng.permutation(documents) for _ in range(-(-winners // documents))])[:winners]
    eids = [f"q{number}" for number in range(winners // PER_SCOPE)]
    listed = ids[rows].reshape(len(eids), PER_SCOPE).tolist()
    (folder / EXAMPLES).write_text(json.dumps(dict(zip(eids, listed, strict=True))))
    return eids
