"""An index folder: corpus.arrow, vectors.npy, and the manifest that says what they came from.

Owns the folder's layout, its key, and which documents share a batch, so that one process and a cluster
write the same bytes. What is embedded is kept in `.parts` until all of it is there, and the manifest comes
last: a folder without one is no index. One process builds while others wait. Knows no Ray, that is
`build_job`'s. Does not notice that the model behind a name has changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from ray_app.errors import ConfigError, DatasetError, StorageError
from ray_app.records import digest
from ray_app.retrieval.corpus import Corpus, IntArray, build_corpus
from ray_app.retrieval.encoder import Encoder, FloatArray, prompts_of
from ray_app.retrieval.index import not_unit

FORMAT = 2
DOCUMENT_BATCH = 32
# A shard goes to one worker at once, and is what a stop costs: so many batches, fewer of huge documents.
SHARD_BATCHES = 8
SHARD_CHARS = 16 << 20
CORPUS, VECTORS, MANIFEST = "corpus.arrow", "vectors.npy", "manifest.json"
PARTS, LOCK = ".parts", ".lock"
# Versions that can move the last bits of a vector.
RECORDED_PACKAGES = ("torch", "transformers", "sentence-transformers")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """What fixes the vectors: the bytes of the corpus file, the encoder's label, documents per batch."""

    source_sha256: str
    encoder: str
    batch: int = DOCUMENT_BATCH

    @property
    def prompts_digest(self) -> str:
        """Of what is put before texts for the encoder's family; "" where only the model itself says it."""
        prompts = prompts_of(self.encoder, {})
        return digest(list(prompts)) if any(prompts) else ""

    @property
    def key(self) -> str:
        """The folder of the parts: what is there under another key is of no use."""
        shape = [self.batch, SHARD_BATCHES, SHARD_CHARS]
        return digest([FORMAT, self.source_sha256, self.encoder, self.prompts_digest, shape])


class Build:
    """An index that is not finished: what is embedded of it, what is missing, and how it is put together."""

    def __init__(self, out: Path, recipe: Recipe, corpus: Corpus) -> None:
        self.out, self.recipe, self.corpus = out, recipe, corpus
        self.dim: int | None = None  # known once a vector is
        self._parts = out / PARTS / recipe.key
        self.shards = shards_of(self.corpus.chars, recipe.batch)
        self.missing = {shard for shard in range(len(self.shards)) if self._read(shard) is None}

    @classmethod
    def begin(cls, corpus_jsonl: Path, out: Path, recipe: Recipe) -> Build:
        """Goes on where an earlier build of this recipe ended. Raises DatasetError with the line number."""
        corpus = out / PARTS / recipe.key / CORPUS
        with writing(out):
            corpus.parent.mkdir(parents=True, exist_ok=True)
            try:
                return cls(out, recipe, Corpus.open(corpus))
            except DatasetError:  # not there yet, or cut short when the machine went down
                build_corpus(corpus_jsonl, corpus)
            return cls(out, recipe, Corpus.open(corpus))

    def __len__(self) -> int:
        """Documents of the whole index."""
        return len(self.corpus)

    @property
    def done(self) -> int:
        """Documents whose vectors are kept."""
        return len(self) - sum(len(self.shards[shard]) for shard in self.missing)

    def texts(self, shard: int) -> list[str]:
        """The texts of one shard, the longest first; `embed` batches them."""
        return self.corpus.texts(self.shards[shard])

    def keep(self, shard: int, vectors: FloatArray) -> None:
        """Stores the vectors of one shard.

        Raises ConfigError for vectors that no index can hold, StorageError where they cannot be written.
        """
        self._check(shard, vectors)
        part = self._part(shard)
        temporary = part.with_suffix(".tmp")
        with writing(self.out):
            try:
                with temporary.open("wb") as file:
                    np.save(file, vectors)
                temporary.replace(part)
            finally:
                temporary.unlink(missing_ok=True)
        self.missing.discard(shard)

    def publish(self) -> dict[str, object]:
        """Puts the finished index in the place of whatever was there; its manifest."""
        with writing(self.out):
            vectors = self._assembled()
            manifest = self._manifest(vectors)
            # Not for a moment may an old manifest vouch for new files.
            (self.out / MANIFEST).unlink(missing_ok=True)
            _move(self._parts / CORPUS, self.out / CORPUS)
            _move(vectors, self.out / VECTORS)
            _write_json(self.out / MANIFEST, manifest)
            shutil.rmtree(self.out / PARTS)
        return manifest

    def _assembled(self) -> Path:
        """All parts as one array, float32 [documents, dim], in the order of the corpus."""
        path = self._parts / VECTORS
        open_memmap: Any = np.lib.format.open_memmap  # numpy ships it without types
        array = open_memmap(path, mode="w+", dtype=np.float32, shape=(len(self), self.dim))
        for shard, rows in enumerate(self.shards):
            vectors = self._read(shard)
            if vectors is None:
                raise StorageError(f"{self._part(shard)}: changed since it was written; run again to mend it")
            array[rows] = vectors
        array.flush()
        return path

    def _manifest(self, vectors: Path) -> dict[str, object]:
        return {
            "format": FORMAT,
            "documents": len(self),
            "dim": self.dim,
            "encoder": self.recipe.encoder,
            "prompts_digest": self.recipe.prompts_digest,
            "batch": self.recipe.batch,
            "source_sha256": self.recipe.source_sha256,
            "corpus_sha256": file_hash(self._parts / CORPUS),
            "vectors_sha256": file_hash(vectors),
            "versions": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        }

    def _part(self, shard: int) -> Path:
        return self._parts / f"{shard:06d}.npy"

    def _read(self, shard: int) -> FloatArray | None:
        """The kept vectors of one shard; None where there are none, or not whole."""
        try:
            vectors = np.load(self._part(shard), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        # A part whose blocks never reached the disk has the right size and zeros in it.
        is_whole = self._fits(shard, vectors) and not len(not_unit(vectors))
        if is_whole and self.dim is None:
            self.dim = int(vectors.shape[1])
        return vectors if is_whole else None

    def _fits(self, shard: int, vectors: FloatArray) -> bool:
        is_table = vectors.dtype == np.float32 and vectors.ndim == 2
        return (
            is_table
            and len(vectors) == len(self.shards[shard])
            and (self.dim is None or vectors.shape[1] == self.dim)
        )

    def _check(self, shard: int, vectors: FloatArray) -> None:
        name, rows = self.recipe.encoder, self.shards[shard]
        if not self._fits(shard, vectors):
            raise ConfigError(
                f"encoder {name!r} gives {vectors.dtype} {vectors.shape} for {len(rows)} documents; expected "
                f"float32 with {self.dim or 'any'} dimensions; if it changed, remove {self.out / PARTS}"
            )
        wrong = not_unit(vectors)
        if len(wrong):
            document, length = self.corpus.ids[rows[wrong[0]]], np.linalg.norm(vectors[wrong[0]])
            raise ConfigError(
                f"encoder {name!r} gives document {document} a vector of length {length:.3g}; expected 1; "
                "use --dtype float32 or bfloat16, or remove the document"
            )
        self.dim = int(vectors.shape[1])


@contextmanager
def opened(
    corpus_jsonl: Path,
    out: Path,
    encoder_label: str,
    batch: int = DOCUMENT_BATCH,
    *,
    is_forced: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Build | None]:
    """The build of this index in `out`, with the folder's lock held; None where the index is finished.

    Raises DatasetError for a corpus that cannot be read, ConfigError where `out` cannot be written or holds
    another index and it is not `is_forced`.
    """
    recipe = Recipe(source_hash(corpus_jsonl), encoder_label, batch)

    def is_finished() -> bool:
        return not is_forced and _is_finished(out, recipe)

    if is_finished():  # asked without the lock, for which the folder would have to be writable
        yield None
        return
    with _locked(out, say):
        yield None if is_finished() else Build.begin(corpus_jsonl, out, recipe)


def shards_of(chars: IntArray, batch: int) -> list[IntArray]:
    """Rows by shard, given the length of each text; a shard is a whole number of batches of `batch`.

    Texts of like length share a batch, the longest come first: memory runs out at the start or never.
    """
    order = np.argsort(-chars, kind="stable")
    shards: list[list[IntArray]] = []
    size = 0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        weight = int(chars[rows].sum())
        if not shards or len(shards[-1]) == SHARD_BATCHES or size + weight > SHARD_CHARS:
            shards.append([])
            size = 0
        shards[-1].append(rows)
        size += weight
    return [np.concatenate(shard) for shard in shards]


def embed(encoder: Encoder, texts: list[str], batch: int) -> FloatArray:
    """Vectors of one shard's texts, float32 [n, dim]. What shares a batch decides the last bits."""
    starts = range(0, len(texts), batch)
    return np.concatenate([encoder.encode_documents(texts[start : start + batch]) for start in starts])


def build_index(
    corpus_jsonl: Path, encoder: Encoder, out: Path, progress: Progress = lambda done, total: None
) -> None:
    """Builds the index in this process, with `encoder`, in `out`; nothing is done where it is finished.

    `progress` is told (documents done, all documents) after each shard.
    """
    with opened(corpus_jsonl, out, encoder.name) as build:
        if build is None:
            return
        for shard in sorted(build.missing):
            build.keep(shard, embed(encoder, build.texts(shard), build.recipe.batch))
            progress(build.done, len(build))
        build.publish()


def ensure_index(
    corpus_jsonl: Path,
    encoder: Encoder,
    cache_dir: Path,
    progress: Progress = lambda done, total: None,
) -> Path:
    """The folder in `cache_dir` for exactly this corpus file and encoder, built here if it is not there.

    Raises DatasetError for a corpus that cannot be read.
    """
    folder = index_folder(corpus_jsonl, encoder.name, cache_dir)
    build_index(corpus_jsonl, encoder, folder, progress)
    return folder


def index_folder(corpus_jsonl: Path, encoder_label: str, cache_dir: Path) -> Path:
    """Where the index of exactly this corpus file and encoder lies, built or not."""
    return cache_dir / digest([FORMAT, source_hash(corpus_jsonl), encoder_label])


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
    path = index_dir / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise DatasetError(f"{str(path)!r} is not JSON ({error}); build the index again") from None
    if not isinstance(manifest, dict):
        raise DatasetError(f"{str(path)!r} holds no JSON object; build the index again")
    return manifest


def source_hash(corpus_jsonl: Path) -> str:
    """SHA-256 of a corpus file, in hex; read once in a process. Raises DatasetError where it cannot be."""
    try:
        stat = corpus_jsonl.stat()
        return _hash_of_version(corpus_jsonl.absolute(), stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        raise DatasetError(f"corpus {str(corpus_jsonl)!r} does not exist; expected a JSONL file") from None
    except OSError as error:
        raise DatasetError(f"cannot read corpus {str(corpus_jsonl)!r}: {error.strerror}") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_cache_dir() -> Path:
    """Where built indexes are kept unless the config says otherwise."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "toolorch-eval" / "indexes"


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns what the disk refuses inside into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"index folder {out}: {error.strerror or error}; what is embedded is kept, run again"
        ) from None


@lru_cache(maxsize=8)
def _hash_of_version(path: Path, size: int, mtime_ns: int) -> str:
    return file_hash(path)


@contextmanager
def _locked(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = filelock.FileLock(out / LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"index: another process builds {out}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"index folder {out}: {error.strerror}; choose a folder that can be written"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_finished(out: Path, recipe: Recipe) -> bool:
    """Whether the folder holds this very index. Raises ConfigError where it holds another."""
    manifest, files = read_manifest(out), [out / CORPUS, out / VECTORS]
    if not manifest:
        # With parts there, a build was stopped just before its end.
        if any(file.exists() for file in files) and not (out / PARTS).exists():
            raise _occupied(out, f"{CORPUS} or {VECTORS} of unknown origin")
        return False
    asked = {"format": FORMAT, "source_sha256": recipe.source_sha256, "encoder": recipe.encoder}
    for name, value in asked.items():
        if manifest.get(name) != value:
            there, asked_for = (str(each)[:16] for each in (manifest.get(name), value))
            raise _occupied(out, f"another index ({name}: {there} there, {asked_for} now)")
    return all(file.exists() for file in files)


def _occupied(out: Path, what: str) -> ConfigError:
    return ConfigError(f"index folder {out} holds {what}; choose another, or replace it with --force")


def _move(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        os.fsync(file)  # the manifest that follows may not outlive what it vouches for
    source.replace(target)


def _write_json(path: Path, value: dict[str, object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    _move(temporary, path)
