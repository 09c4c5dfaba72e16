from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ray_app.errors import DatasetError
from ray_app.retrieval.build import build_index, ensure_corpus, ensure_index, read_manifest
from ray_app.retrieval.corpus import Corpus, build_corpus
from ray_app.retrieval.encoder import FloatArray
from tests.retrieval.data import WordEncoder, rows, write_jsonl


def test_each_document_gets_its_own_vector_whatever_the_batch_order(tmp_path: Path) -> None:
    build_corpus(write_jsonl(tmp_path / "c.jsonl", rows()), tmp_path / "c.arrow")
    corpus, encoder = Corpus.open(tmp_path / "c.arrow"), WordEncoder()
    told: list[tuple[int, int]] = []
    folder = build_index(corpus, encoder, tmp_path / "index", lambda done, total: told.append((done, total)))
    vectors = np.load(folder / "vectors.npy")
    expected = WordEncoder().encode_documents([corpus.text(row) for row in range(len(corpus))])
    assert np.array_equal(vectors, expected)
    assert told == [(32, 48), (48, 48)]
    lengths = [len(text) for batch in encoder.batches for text in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert Corpus.open(folder / "corpus.arrow").text(3) == corpus.text(3)
    manifest = read_manifest(folder)
    assert (manifest["documents"], manifest["dim"], manifest["encoder"]) == (48, 64, "words")


def test_an_index_is_built_once_per_corpus_content_and_encoder(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "c.jsonl", rows()), tmp_path / "cache"
    first, again, other = WordEncoder(), WordEncoder(), WordEncoder()
    folder = ensure_index(source, first, cache)
    assert ensure_index(source, again, cache) == folder
    assert (len(first.batches), len(again.batches)) == (2, 0)
    other.name = "other"
    assert ensure_index(source, other, cache) != folder
    write_jsonl(source, rows()[:-1])
    assert ensure_index(source, again, cache) != folder


def test_two_that_start_together_build_once(tmp_path: Path) -> None:
    source, encoder = write_jsonl(tmp_path / "c.jsonl", rows()), WordEncoder()
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure_index(source, encoder, tmp_path / "cache"), range(4)))
    assert len(folders) == 1
    assert len(encoder.batches) == 2


class BreakingEncoder(WordEncoder):
    def encode_documents(self, texts: list[str]) -> FloatArray:
        if self.batches:
            raise MemoryError("second batch")
        return super().encode_documents(texts)


def test_a_build_that_breaks_leaves_nothing_that_passes_for_an_index(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "c.jsonl", rows()), tmp_path / "cache"
    with pytest.raises(MemoryError):
        ensure_index(source, BreakingEncoder(), cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert read_manifest(ensure_index(source, WordEncoder(), cache))["documents"] == 48


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


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent\.jsonl' does not exist"):
        ensure_index(tmp_path / "absent.jsonl", WordEncoder(), tmp_path / "cache")


def test_the_manifest_appears_only_after_the_vectors(tmp_path: Path) -> None:
    build_corpus(write_jsonl(tmp_path / "c.jsonl", rows()), tmp_path / "c.arrow")
    with pytest.raises(MemoryError):
        build_index(Corpus.open(tmp_path / "c.arrow"), BreakingEncoder(), tmp_path / "index")
    assert not (tmp_path / "index" / "vectors.npy").exists()
    assert read_manifest(tmp_path / "index") == {}
    assert json.dumps(read_manifest(tmp_path / "index")) == "{}"
