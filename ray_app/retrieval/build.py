"""Builds an index folder: corpus.arrow, vectors.npy and the manifest that says what they came from.

Owns the folder's layout and its key. A folder appears whole or not at all, and one process builds
while the others wait. Does not resume a build that was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from ray_app.errors import DatasetError
from ray_app.records import digest
from ray_app.retrieval.corpus import Corpus, build_corpus
from ray_app.retrieval.encoder import Dtype, Encoder, load_encoder

FORMAT = 1
DOCUMENT_BATCH = 32
SAY_EVERY_S = 10.0
CORPUS, VECTORS, MANIFEST = "corpus.arrow", "vectors.npy", "manifest.json"

Progress = Callable[[int, int], None]


def build_index(
    corpus: Corpus, encoder: Encoder, out_dir: Path, progress: Progress = lambda done, total: None
) -> Path:
    """Embeds every document into `out_dir`/vectors.npy (float32 [n, dim]) and writes the manifest last.

    A corpus file that lies elsewhere is copied into `out_dir`. `progress` is told (documents done, all
    documents) after each batch.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if corpus.path != out_dir / CORPUS:
        shutil.copyfile(corpus.path, out_dir / CORPUS)
    vectors = out_dir / VECTORS
    temporary = out_dir / ".vectors.tmp.npy"
    open_memmap: Any = np.lib.format.open_memmap  # numpy ships it without types
    array = open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(corpus), encoder.dim))
    # Documents of like length share a batch, the longest first: memory runs out at the start or never.
    order = np.argsort(-corpus.chars, kind="stable")
    for start in range(0, len(order), DOCUMENT_BATCH):
        rows = order[start : start + DOCUMENT_BATCH]
        array[rows] = encoder.encode_documents([corpus.text(int(row)) for row in rows])
        progress(start + len(rows), len(corpus))
    array.flush()
    temporary.replace(vectors)
    _write_json(out_dir / MANIFEST, _manifest(corpus, encoder, vectors))
    return out_dir


def ensure_index(
    corpus_jsonl: Path,
    encoder: Encoder,
    cache_dir: Path,
    progress: Progress = lambda done, total: None,
) -> Path:
    """The folder in `cache_dir` for exactly this corpus file and encoder, built if it is not there.

    Raises DatasetError for a corpus that cannot be read.
    """
    folder = index_folder(corpus_jsonl, encoder.name, cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / MANIFEST).exists():
            _build_aside(corpus_jsonl, encoder, folder, progress)
    return folder


def index_folder(corpus_jsonl: Path, encoder_name: str, cache_dir: Path) -> Path:
    """Where the index of exactly this corpus file and encoder lies, built or not."""
    if not corpus_jsonl.is_file():
        raise DatasetError(f"corpus {str(corpus_jsonl)!r} does not exist; expected a JSONL file")
    return cache_dir / digest([FORMAT, file_hash(corpus_jsonl), encoder_name])


def ensure_corpus(index_dir: Path, cache_dir: Path) -> Path:
    """`index_dir`'s corpus.arrow, or one made in `cache_dir` from its eval.jsonl, once per file version."""
    if (index_dir / CORPUS).exists():
        return index_dir / CORPUS
    jsonl = index_dir / "eval.jsonl"
    try:
        stat = jsonl.stat()
    except FileNotFoundError:
        raise DatasetError(f"{str(index_dir)!r} holds neither {CORPUS} nor eval.jsonl") from None
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Size and time stand for the content: such a file can have 17 GB, and this is asked at every start.
    key = digest([FORMAT, str(jsonl.resolve()), stat.st_size, stat.st_mtime_ns])
    corpus = cache_dir / f"{key}.arrow"
    with filelock.FileLock(f"{corpus}.lock"):
        if not corpus.exists():
            build_corpus(jsonl, corpus)
    return corpus


def read_manifest(index_dir: Path) -> dict[str, object]:
    """What the folder was built from; empty for a folder that this module did not build."""
    try:
        manifest: dict[str, object] = json.loads((index_dir / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return manifest


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_cache_dir() -> Path:
    """Where built indexes are kept unless the config says otherwise."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "toolorch-eval" / "indexes"


def main(corpus_jsonl: Path, cache_dir: Path, encoder: str, dtype: Dtype, device: str) -> None:
    """Build the index with every core, saying how far it is: `python -m ray_app.retrieval.build`."""
    started = said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_EVERY_S or done == total:
            said = now
            left_s = (now - started) / done * (total - done)
            print(f"index: {done} of {total} documents embedded, about {left_s:.0f} s left", flush=True)

    loaded = load_encoder(encoder, device=device, threads=os.cpu_count(), dtype=dtype)
    ensure_index(corpus_jsonl, loaded, cache_dir, progress)


def _build_aside(corpus_jsonl: Path, encoder: Encoder, folder: Path, progress: Progress) -> None:
    aside = Path(tempfile.mkdtemp(prefix=".build-", dir=folder.parent))
    try:
        build_corpus(corpus_jsonl, aside / CORPUS)
        build_index(Corpus.open(aside / CORPUS), encoder, aside, progress)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _manifest(corpus: Corpus, encoder: Encoder, vectors: Path) -> dict[str, object]:
    return {
        "format": FORMAT,
        "documents": len(corpus),
        "dim": encoder.dim,
        "encoder": encoder.name,
        "corpus_sha256": file_hash(corpus.path),
        "vectors_sha256": file_hash(vectors),
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5])  # type: ignore[arg-type]
