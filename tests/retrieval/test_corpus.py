from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ray_app.errors import DatasetError
from ray_app.retrieval.corpus import BATCH_ROWS, Corpus, build_corpus
from tests.retrieval.data import write_jsonl


def build(folder: Path, lines: list[object]) -> Corpus:
    build_corpus(write_jsonl(folder / "c.jsonl", lines), folder / "c.arrow")
    return Corpus.open(folder / "c.arrow")


def test_text_comes_back_by_row_for_ids_of_both_spellings(tmp_path: Path) -> None:
    corpus = build(
        tmp_path,
        [
            {"id": "7", "contents": "Größe 😀", "url": "dropped"},
            {"id": -3, "content": "second"},
        ],
    )
    assert len(corpus) == 2
    assert corpus.ids.dtype == np.int64
    assert corpus.ids.tolist() == [7, -3]
    assert [corpus.text(0), corpus.text(1)] == ["Größe 😀", "second"]
    assert corpus.chars.tolist() == [7, 6]


def test_rows_of_ids_keep_their_order_and_mark_absent_ones(tmp_path: Path) -> None:
    corpus = build(tmp_path, [{"id": i, "content": "x"} for i in (50, 10, 30)])
    assert corpus.row_of(np.array([30, 11, 50, 99, 10])).tolist() == [2, -1, 0, -1, 1]
    assert corpus.row_of(np.array([], dtype=np.int64)).tolist() == []


def test_rows_beyond_the_first_batch_are_found(tmp_path: Path) -> None:
    count = 2 * BATCH_ROWS + 1
    corpus = build(tmp_path, [{"id": i, "content": f"text {i}"} for i in range(count)])
    for row in (0, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS - 1, 2 * BATCH_ROWS):
        assert corpus.text(row) == f"text {row}"
    for outside in (-1, count):
        with pytest.raises(IndexError):
            corpus.text(outside)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": 1.5, "content": "x"}', "id 1.5 is not an integer"),
        ('{"id": "x1", "content": "x"}', "id 'x1' is not an integer"),
        ('{"id": true, "content": "x"}', "id True is not an integer"),
        ('{"id": 99999999999999999999, "content": "x"}', "is not an integer"),
        ('{"content": "x"}', "id None is not an integer"),
        ('{"id": "001", "content": "x"}', "id 1 is also on line 1"),
        ('{"id": 5}', "no text under content or contents"),
        ('{"id": 5, "content": null}', "no text under content or contents"),
        ('{"id": 5, "content": "x"', "not JSON"),
        ("[5]", "expected a JSON object, found list"),
        ('{"id": 5, "content": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_left_behind(tmp_path: Path, line: str, complaint: str) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text(json.dumps({"id": 1, "content": "fine"}) + "\n\n" + line + "\n", "utf-8")
    with pytest.raises(DatasetError) as caught:
        build_corpus(source, tmp_path / "c.arrow")
    assert f"{source}:3: " in str(caught.value)
    assert complaint in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [source]


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_bytes(b'{"id": 1, "content": "\xff"}\n')
    with pytest.raises(DatasetError, match=r"c\.jsonl:1: not JSON"):
        build_corpus(source, tmp_path / "c.arrow")


def test_missing_empty_and_truncated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read corpus"):
        build_corpus(tmp_path / "absent.jsonl", tmp_path / "c.arrow")
    with pytest.raises(DatasetError, match="holds no documents"):
        build_corpus(write_jsonl(tmp_path / "empty.jsonl", []), tmp_path / "c.arrow")
    with pytest.raises(DatasetError, match="does not exist"):
        Corpus.open(tmp_path / "c.arrow")
    build(tmp_path, [{"id": i, "content": "x" * 100} for i in range(50)])
    whole = (tmp_path / "c.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="unreadable"):
        Corpus.open(tmp_path / "cut.arrow")
