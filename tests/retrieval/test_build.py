from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_app.errors import ConfigError, DatasetError, EvalError, StorageError
from ray_app.retrieval.build import (
    CORPUS,
    MANIFEST,
    PARTS,
    SHARD_CHARS,
    VECTORS,
    Build,
    build_index,
    embed,
    ensure_corpus,
    ensure_index,
    file_hash,
    opened,
    read_manifest,
    shards_of,
)
from ray_app.retrieval.corpus import Corpus
from ray_app.retrieval.encoder import FloatArray
from tests.disks import fill, mounted
from tests.retrieval.data import WordEncoder, rows, write_jsonl

# Shards of 8 documents: the 48 make six.
BATCH = 1


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "c.jsonl", rows())


class BreakingEncoder(WordEncoder):
    def encode_documents(self, texts: list[str]) -> FloatArray:
        if self.batches:
            raise MemoryError("second batch")
        return super().encode_documents(texts)


def begun(source: Path, out: Path, *shards: int) -> Path:
    """The build of `source` in `out`, stopped after these shards; the folder of its parts."""
    with opened(source, out, "words", BATCH) as build:
        assert build is not None
        for shard in shards:
            build.keep(shard, embed(WordEncoder(), build.texts(shard), BATCH))
    [parts] = (out / PARTS).iterdir()
    return parts


def missing(source: Path, out: Path) -> set[int]:
    with opened(source, out, "words", BATCH) as build:
        return set() if build is None else set(build.missing)


def test_each_document_gets_its_own_vector_whatever_the_batch_order(source: Path, tmp_path: Path) -> None:
    encoder, told, out = WordEncoder(), list[tuple[int, int]](), tmp_path / "index"
    build_index(source, encoder, out, lambda done, total: told.append((done, total)))
    corpus = Corpus.open(out / CORPUS)
    expected = WordEncoder().encode_documents([corpus.text(row) for row in range(len(corpus))])
    assert np.array_equal(np.load(out / VECTORS), expected)
    assert told == [(48, 48)]
    lengths = [len(text) for batch in encoder.batches for text in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_the_manifest_says_what_the_files_came_from(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    build_index(source, WordEncoder(), out)
    manifest = read_manifest(out)
    assert (manifest["documents"], manifest["dim"], manifest["encoder"]) == (48, 64, "words")
    hashes = [manifest[f"{name}_sha256"] for name in ("source", "corpus", "vectors")]
    assert hashes == [file_hash(source), file_hash(out / CORPUS), file_hash(out / VECTORS)]
    assert sorted(path.name for path in out.iterdir()) == [".lock", CORPUS, MANIFEST, VECTORS]


def test_an_index_is_built_once_per_corpus_content_and_encoder(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, again, other = WordEncoder(), WordEncoder(), WordEncoder()
    folder = ensure_index(source, first, cache)
    assert ensure_index(source, again, cache) == folder
    assert (len(first.batches), len(again.batches)) == (2, 0)
    other.name = "other"
    assert ensure_index(source, other, cache) != folder
    write_jsonl(source, rows()[:-1])
    assert ensure_index(source, again, cache) != folder


def test_two_that_start_together_build_once(source: Path, tmp_path: Path) -> None:
    encoder = WordEncoder()
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure_index(source, encoder, tmp_path / "cache"), range(4)))
    assert len(folders) == 1
    assert len(encoder.batches) == 2


def test_who_finds_another_building_says_so_and_takes_what_that_one_made(
    source: Path, tmp_path: Path
) -> None:
    out, waits, found = tmp_path / "index", threading.Event(), list[Build | None]()

    def second() -> None:
        with opened(source, out, "words", say=lambda line: waits.set()) as build:
            found.append(build)

    with opened(source, out, "words") as build:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(30) and build is not None
        for shard in sorted(build.missing):
            build.keep(shard, embed(WordEncoder(), build.texts(shard), 32))
        build.publish()
    thread.join(30)
    assert found == [None]


def test_a_build_that_breaks_leaves_nothing_that_passes_for_an_index(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(MemoryError):
        ensure_index(source, BreakingEncoder(), cache)
    [folder] = cache.iterdir()
    assert read_manifest(folder) == {} and not (folder / VECTORS).exists()
    assert read_manifest(ensure_index(source, WordEncoder(), cache))["documents"] == 48


def test_a_build_that_was_stopped_goes_on_and_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    begun(source, out, 0, 3)
    for folder, expected in ((out, {1, 2, 4, 5}), (whole, {0, 1, 2, 3, 4, 5})):
        with opened(source, folder, "words", BATCH) as build:
            assert build is not None and build.missing == expected
            assert build.done == 48 - 8 * len(expected)
            for shard in sorted(build.missing, reverse=True):
                build.keep(shard, embed(WordEncoder(), build.texts(shard), BATCH))
            build.publish()
    for name in (CORPUS, VECTORS, MANIFEST):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / PARTS).exists()


def _save(path: Path, array: np.ndarray[Any, Any]) -> None:
    np.save(path, array)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: part.write_bytes(part.read_bytes()[:-100]),
        lambda part: part.write_bytes(b""),
        lambda part: part.write_bytes(b"\x93NUMPY nonsense"),
        lambda part: _save(part, np.zeros((8, 64), np.float32)),
        lambda part: _save(part, np.load(part)[:7]),
        lambda part: _save(part, np.load(part).astype(np.float64)),
        lambda part: _save(part, np.full((8, 64), 1e30, np.float32)),
        lambda part: part.unlink(),
    ],
    ids=["cut", "empty", "garbage", "zeros", "rows", "dtype", "huge", "gone"],
)
def test_a_part_that_is_not_whole_counts_as_absent(source: Path, tmp_path: Path, spoil: Any) -> None:
    parts = begun(source, tmp_path / "index", 1, 2)
    spoil(parts / "000001.npy")
    assert missing(source, tmp_path / "index") == {0, 1, 3, 4, 5}


def test_a_corpus_file_that_was_cut_short_is_made_again(source: Path, tmp_path: Path) -> None:
    parts = begun(source, tmp_path / "index", 1)
    (parts / CORPUS).write_bytes((parts / CORPUS).read_bytes()[:200])
    assert missing(source, tmp_path / "index") == {0, 2, 3, 4, 5}
    assert len(Corpus.open(parts / CORPUS)) == 48


def test_a_part_that_is_spoilt_before_the_end_stops_the_end(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    parts = begun(source, out, *range(6))
    with opened(source, out, "words", BATCH) as build:
        assert build is not None and not build.missing
        (parts / "000002.npy").write_bytes(b"")
        with pytest.raises(StorageError, match=r"000002\.npy: changed since it was written; run again"):
            build.publish()
    assert read_manifest(out) == {} and missing(source, out) == {2}


def test_parts_of_another_corpus_encoder_or_batch_are_passed_over_and_go_at_the_end(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    begun(source, out, 0, 1, 2)
    other = write_jsonl(tmp_path / "other.jsonl", rows()[1:])
    for corpus, label, batch in ((other, "words", BATCH), (source, "other", BATCH), (source, "words", 2)):
        with opened(corpus, out, label, batch) as build:
            assert build is not None and len(build.missing) == len(build.shards)
    assert len(list((out / PARTS).iterdir())) == 4
    build_index(source, WordEncoder(), out)
    assert not (out / PARTS).exists() and read_manifest(out)["documents"] == 48


def test_the_index_of_another_corpus_or_encoder_is_replaced_only_by_force(
    source: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "index", source.read_bytes()
    build_index(source, WordEncoder(), out)
    write_jsonl(source, rows()[:40])
    with (
        pytest.raises(ConfigError, match=r"another index \(source_sha256: .* --force"),
        opened(source, out, "words"),
    ):
        pass
    with opened(source, out, "words", is_forced=True) as build:
        assert build is not None
        build.keep(0, embed(WordEncoder(), build.texts(0), 32))
        assert read_manifest(out)["documents"] == 48, "the old index is there until the new one is whole"
        build.publish()
    assert (read_manifest(out)["documents"], len(np.load(out / VECTORS))) == (40, 40)
    source.write_bytes(before)
    with pytest.raises(ConfigError, match="another index"):
        build_index(source, WordEncoder(), out)


def test_files_that_are_not_ours_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / VECTORS).write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match=r"vectors\.npy of unknown origin; choose another"):
        build_index(source, WordEncoder(), tmp_path)
    assert (tmp_path / VECTORS).read_bytes() == b"somebody's"


def test_a_finished_index_is_read_where_nothing_can_be_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    build_index(source, WordEncoder(), out)
    (out / ".lock").unlink()
    (out / ".lock").mkdir()  # as good as a folder of somebody else's: no lock can be had
    build_index(source, WordEncoder(), out)
    (out / VECTORS).unlink()
    with pytest.raises(ConfigError, match="choose a folder that can be written"):
        build_index(source, WordEncoder(), out)


@pytest.mark.parametrize("value", [np.nan, 0.0, 0.5])
def test_a_vector_that_no_index_can_hold_is_named_with_its_document(
    source: Path, tmp_path: Path, value: float
) -> None:
    with opened(source, tmp_path / "index", "words@float16", BATCH) as build:
        assert build is not None
        vectors = embed(WordEncoder(), build.texts(2), BATCH)
        vectors[3] *= value
        document = build.corpus.ids[build.shards[2][3]]
        with pytest.raises(ConfigError, match=rf"document {document} a vector of length .*--dtype float32"):
            build.keep(2, vectors)
        assert 2 in build.missing


def test_vectors_of_another_dimension_than_the_parts_are_refused(source: Path, tmp_path: Path) -> None:
    begun(source, tmp_path / "index", 0)
    with opened(source, tmp_path / "index", "words", BATCH) as build:
        assert build is not None
        with pytest.raises(ConfigError, match=r"expected float32 with 64 dimensions; .* remove .*\.parts"):
            build.keep(1, np.eye(8, dtype=np.float32))


def test_a_full_disk_is_one_line_and_what_is_embedded_stays(source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "192k") as disk:
        begun(source, disk / "index", 0)
        with opened(source, disk / "index", "words", BATCH) as build:
            assert build is not None
            vectors = embed(WordEncoder(), build.texts(1), BATCH)
            ballast = fill(disk)
            with pytest.raises(StorageError, match="No space left on device; what is embedded is kept"):
                build.keep(1, vectors)
            ballast.unlink()
        assert missing(source, disk / "index") == {1, 2, 3, 4, 5}


def test_a_manifest_that_is_not_readable_is_named(source: Path, tmp_path: Path) -> None:
    for text, complaint in (("{", "is not JSON"), ("[]", "holds no JSON object")):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(DatasetError, match=rf"manifest\.json' {complaint}"):
            build_index(source, WordEncoder(), tmp_path)


def test_shards_hold_every_row_once_the_longest_first_in_whole_batches() -> None:
    chars = np.random.default_rng(0).integers(1, 5000, 1000)
    shards = shards_of(chars, 10)
    order = np.concatenate(shards)
    assert sorted(order.tolist()) == list(range(1000))
    assert (np.diff(chars[order]) <= 0).all()
    assert [len(shard) for shard in shards] == [80] * 12 + [40]


def test_a_shard_of_huge_documents_is_cut_at_a_batch() -> None:
    chars = np.array([SHARD_CHARS // 8] * 20 + [10] * 20)
    assert [len(shard) for shard in shards_of(chars, 4)] == [8, 8, 24]
    assert [len(shard) for shard in shards_of(chars * 100, 16)] == [16, 16, 8]


def test_a_corpus_in_an_older_layout_is_converted_once_per_version(tmp_path: Path) -> None:
    folder, cache = tmp_path / "old", tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(DatasetError, match=r"neither corpus\.arrow nor eval\.jsonl"):
        ensure_corpus(folder, cache)
    write_jsonl(folder / "eval.jsonl", [{"id": "5", "contents": "five"}])
    converted = ensure_corpus(folder, cache)
    before = converted.stat().st_mtime_ns
    assert Corpus.open(converted).text(0) == "five"
    assert ensure_corpus(folder, cache).stat().st_mtime_ns == before
    write_jsonl(folder / "eval.jsonl", [{"id": "5", "contents": "five"}, {"id": 6, "contents": "six"}])
    assert len(Corpus.open(ensure_corpus(folder, cache))) == 2


def test_a_missing_or_broken_corpus_is_named_with_the_line(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DatasetError, match=r"absent\.jsonl' does not exist"):
        ensure_index(tmp_path / "absent.jsonl", WordEncoder(), cache)
    with pytest.raises(DatasetError, match=r"cannot read corpus .*: Is a directory"):
        ensure_index(tmp_path, WordEncoder(), cache)
    assert not cache.exists()
    source.write_text(json.dumps(rows()[0]) + "\n{broken\n")
    with pytest.raises(DatasetError, match=r"c\.jsonl:2: not JSON"):
        ensure_index(source, WordEncoder(), cache)


def test_a_folder_that_cannot_be_made_is_named(source: Path) -> None:
    with pytest.raises(EvalError, match="Not a directory; choose a folder that can be written") as refused:
        build_index(source, WordEncoder(), source / "index")
    assert isinstance(refused.value, ConfigError)
