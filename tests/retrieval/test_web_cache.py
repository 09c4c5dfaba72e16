from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_app.errors import ConfigError
from ray_app.retrieval.web_cache import DiskCache

NAME = ("page", "https://a.example/../../x")


def text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("expected a text")
    return value


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def only_file(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def test_an_answer_is_read_back_by_another_instance(tmp_path: Path) -> None:
    DiskCache(tmp_path / "c").put(NAME, "naïve \ud800")
    assert DiskCache(tmp_path / "c").get(NAME, text) == "naïve \ud800"
    assert DiskCache(tmp_path / "c").get(("page", "other"), text) is None


def test_a_name_becomes_no_path(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "c")
    hostile = ["../../etc/passwd", "/etc/passwd", "a/b", "..", "", "\x00", "x" * 5000, "con.json"]
    for url in hostile:
        cache.put(("page", url), url)
    assert [cache.get(("page", url), text) for url in hostile] == hostile
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "c"}
    assert len(list(tmp_path.rglob("*"))) == 1 + len(hostile)


def test_an_older_answer_than_allowed_counts_as_absent(tmp_path: Path) -> None:
    clock = Clock()
    cache = DiskCache(tmp_path, max_age_s=60, clock=clock)
    cache.put(NAME, "x")
    clock.now += 60
    assert cache.get(NAME, text) == "x"
    clock.now += 1
    assert cache.get(NAME, text) is None
    assert DiskCache(tmp_path, None, clock).get(NAME, text) == "x"
    cache.put(NAME, "y")
    assert cache.get(NAME, text) == "y"


def test_a_torn_file_counts_as_absent_at_every_length(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put(NAME, "answer")
    file = only_file(tmp_path)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert cache.get(NAME, text) is None
    cache.put(NAME, "again")
    assert cache.get(NAME, text) == "again"


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "7",
        "{}",
        "[" * 100_000,
        json.dumps({"name": ["page", "another"], "at": 0, "answer": "x"}),
        json.dumps({"name": NAME, "at": "yesterday", "answer": "x"}),
        json.dumps({"name": NAME, "at": 0, "answer": ["x"]}),
    ],
    ids=lambda content: content[:60],
)
def test_a_file_of_another_shape_counts_as_absent(tmp_path: Path, content: str) -> None:
    cache = DiskCache(tmp_path)
    cache.put(NAME, "x")
    only_file(tmp_path).write_text(content)
    assert cache.get(NAME, text) is None


def test_a_disk_that_takes_nothing_is_logged_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(tmp_path / "c")
    (tmp_path / "c").rmdir()
    cache.put(NAME, "x")
    assert "not kept" in caplog.text
    (tmp_path / "c").mkdir()
    # In the way of the rename: the temporary file goes again.
    cache.put(NAME, "x")
    target = only_file(tmp_path / "c")
    target.unlink()
    target.mkdir()
    cache.put(NAME, "x")
    assert only_file(tmp_path / "c") == target


def test_a_folder_that_cannot_be_made_is_a_mistake_in_the_config(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^cache_dir '.*file/c': .*expected a writable folder"):
        DiskCache(tmp_path / "file" / "c")
