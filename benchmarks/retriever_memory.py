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
from benchmarks.retriever_data import EXAMPLES, spread_ids, write_corpus
from benchmarks.retriever_stand import MIB, Stand
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
        target = stand.over_http(app, encoder=NOOP, **config)
        stand.ask_each(target, [(f"query {eid}", eid) for eid in eids])
        held = target.anonymous_bytes()
        stand.delete(app)
    finally:
        shutil.rmtree(folder)
    return held


def write_index(folder: Path, documents: int, winners: int) -> list[str]:
    """An index of `documents` that stubs' queries all find; the questions, which share no document.

    With fewer documents than winners, the questions share them.
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
    rows = np.random.default_rng(5).permutation(max(documents, winners))[:winners] % documents
    eids = [f"q{number}" for number in range(winners // PER_SCOPE)]
    listed = ids[rows].reshape(len(eids), PER_SCOPE).tolist()
    (folder / EXAMPLES).write_text(json.dumps(dict(zip(eids, listed, strict=True))))
    return eids
