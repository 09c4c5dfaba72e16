from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_app import object_store
from ray_app.columns import read_columns
from ray_app.errors import RunDirError, StorageError
from ray_app.object_store import Gone, ObjectStore, flush_name
from ray_app.table_files import TableFiles, snapshot
from tests.s3_server import BUCKET, PAGE, S3Server, environment, s3_proxy, s3_server

SCHEMA = pa.schema([pa.field("event_id", pa.string()), pa.field("n", pa.int64())])
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, server.endpoint)
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}/run"


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for key, value in environment(endpoint).items():
        monkeypatch.setenv(key, value)


def flush(*numbers: int) -> bytes:
    """One flush: an Arrow stream with a row for each of `numbers`."""
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([[f"w-{n}" for n in numbers], list(numbers)], schema=SCHEMA)
    with pa.ipc.new_stream(sink, SCHEMA) as stream:
        stream.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def in_columns(mirror: Path) -> list[int]:
    table = read_columns(TableFiles(mirror / "log", "event_id", SCHEMA), ["n"])
    return sorted(table["n"].to_pylist())


def rows(mirror: Path) -> list[int]:
    files = TableFiles(mirror / "log", "event_id", SCHEMA)
    return sorted(n for batch in snapshot(files, SCHEMA) for n in batch["n"].to_pylist())


def names(mirror: Path) -> list[str]:
    return sorted(path.name for path in (mirror / "log").iterdir())


def compacted(folder: Path, *numbers: int) -> Path:
    path = folder / f"{numbers[0]}-{len(numbers)}.parquet"
    pq.write_table(pa.table([[f"w-{n}" for n in numbers], list(numbers)], schema=SCHEMA), path)
    return path


def test_objects_are_put_listed_read_and_deleted_below_the_prefix_of_the_url(url: str) -> None:
    store, other = ObjectStore(url), ObjectStore(f"{url}-2")
    other.put("a", b"not mine")
    store.put("log/a", b"one")
    store.put("log/a", b"two!")
    store.put("b", b"")
    assert {name: stored.size for name, stored in store.list().items()} == {"b": 0, "log/a": 4}
    assert store.get("log/a") == b"two!" and list(store.list("log/")) == ["log/a"]
    assert 0 <= store.age_s("log/a") < 60
    store.delete(["b", "never"])
    with pytest.raises(Gone, match="no object b"):
        store.get("b")


def test_a_listing_has_all_pages(url: str) -> None:
    store = ObjectStore(url)
    expected = [f"log/{n:04d}" for n in range(2 * PAGE + 1)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b"x"), expected))
    assert list(store.list("log/")) == expected
    store.delete(expected)
    assert store.list() == {}


def test_of_many_who_create_one_object_exactly_one_has_it(url: str) -> None:
    store = ObjectStore(url)
    assert store.has_conditional_put and store.list() == {}
    for round_ in range(5):
        start = threading.Barrier(8)

        def create(number: int, name: str = f"lease/{round_}", start: threading.Barrier = start) -> bool:
            start.wait(30)
            return store.put_new(name, f"driver {number}".encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert store.get(f"lease/{round_}") == f"driver {won.index(True)}".encode()


def test_who_created_an_object_and_lost_the_answer_still_has_it(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ObjectStore(url)
    first.put("lease/1", b"mine")
    assert first.put_new("lease/1", b"mine") and not first.put_new("lease/1", b"another's")


@pytest.mark.parametrize("manner", ["refuses", "ignores"])
def test_a_store_without_conditional_puts_is_found_out(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    def behaviour(method: str, path: str, headers: dict[str, str]) -> int | None:
        return 501 if headers.pop("If-None-Match", None) and manner == "refuses" else None

    with s3_proxy(server, behaviour) as proxy:
        use(monkeypatch, proxy.endpoint)
        store = ObjectStore(url)
        assert not store.has_conditional_put and store.list() == {}
        assert store.put_new("a", b"first") and not store.put_new("a", b"second")
        assert store.get("a") == b"first"


def test_a_store_that_is_busy_for_a_moment_is_asked_again(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = iter([503, 503])
    with s3_proxy(server, lambda *_: next(busy, None)) as proxy:
        use(monkeypatch, proxy.endpoint)
        ObjectStore(url).put("a", b"x")
    assert next(busy, None) is None
    with s3_proxy(server, lambda *_: 503) as proxy:
        use(monkeypatch, proxy.endpoint)
        with pytest.raises(StorageError, match=r"answers 503 .*run again later"):
            ObjectStore(url).put("a", b"x")


@pytest.mark.parametrize(
    ("settings", "bucket", "message"),
    [
        ({}, "no-such-bucket", "the bucket does not exist; create it"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, BUCKET, "does not answer .* check AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "nowhere"}, BUCKET, "Invalid endpoint: nowhere; mend AWS_ENDPOINT_URL"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, BUCKET, "no credentials .* set AWS_PROFILE"),
        ({"AWS_PROFILE": "nobody"}, BUCKET, "no credentials .* set AWS_PROFILE"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], bucket: str, message: str
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(StorageError, match=f"s3://{bucket}/run: .*{message}") as told:
        ObjectStore(f"s3://{bucket}/run").list()
    assert "\n" not in str(told.value) and type(pickle.loads(pickle.dumps(told.value))) is StorageError


def test_without_boto3_the_extra_is_named(url: str) -> None:
    code = (
        "import sys; sys.modules['boto3'] = None\n"
        "from ray_app.errors import ConfigError\nfrom ray_app.object_store import ObjectStore\n"
        f"try: ObjectStore({url!r}).list()\nexcept ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{url} needs boto3: install toolorch-eval[s3]\n"


@pytest.mark.parametrize("bad", ["s3://", "s3:///run", "s3://bucket/../other", "runs/a", "http://bucket/run"])
def test_a_url_without_a_bucket_is_refused(bad: str) -> None:
    with pytest.raises(RunDirError, match="expected"):
        ObjectStore(bad)


def test_a_store_travels_as_its_url(url: str) -> None:
    store = ObjectStore(f"{url}/")
    assert store.list() == {}  # it has a client, which does not pickle
    assert pickle.loads(pickle.dumps(store)).url == store.url == url


def test_a_run_is_named_by_its_url_wherever_a_folder_is(url: str, tmp_path: Path) -> None:
    ObjectStore(url).put("config.yaml", b"a: 1\n")
    mirror = object_store.local(url)
    assert mirror.parent == tmp_path / "home" / "mirrors" and mirror.name.startswith("run-")
    assert json.loads((mirror / "remote.json").read_text()) == {"url": url}
    assert (mirror / "config.yaml").read_text() == "a: 1\n"
    # A command line that makes a Path of its argument folds the slashes.
    assert object_store.local(Path(url)) == object_store.attach(f"{url}/") == mirror
    store = object_store.store_of(mirror)
    assert store is not None and store.url == url and object_store.store_of(mirror) is store
    assert object_store.local(tmp_path) == tmp_path and object_store.store_of(tmp_path) is None
    object_store.refresh(tmp_path)
    object_store.push(tmp_path, ["home"])
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_flushes_lie_flat_in_the_mirror_and_are_copied_once(url: str) -> None:
    store, mirror = ObjectStore(url), object_store.attach(url)
    store.put(flush_name("log", 1, "node-a.b", 0), flush(1, 2))
    object_store.refresh(mirror, ["log"])
    first = mirror / "log" / "000001-node-a.b-00000000.arrows"
    inode = first.stat().st_ino
    store.put(flush_name("log", 1, "node-a.b", 1), flush(3))
    object_store.refresh(mirror, ["log"])
    assert rows(mirror) == [1, 2, 3] and first.stat().st_ino == inode
    for name in store.list("log/"):
        assert object_store.object_name(object_store.local_name(name)) == name


def test_a_compaction_that_is_cut_short_anywhere_loses_and_doubles_nothing(url: str, tmp_path: Path) -> None:
    store, mirror = ObjectStore(url), object_store.attach(url)
    parts = [flush_name("log", 1, "w", seq) for seq in range(3)]
    for seq, part in enumerate(parts):
        store.put(part, flush(seq))
    object_store.refresh(mirror)
    store.upload("log/compacted-000001-0.parquet", compacted(tmp_path, 0, 1, 2))
    object_store.refresh(mirror)
    assert rows(mirror) == in_columns(mirror) == [0, 1, 2] and len(names(mirror)) == 4
    manifest = {"table": "log", "output": "log/compacted-000001-0.parquet", "replaces": parts}
    store.put("manifests/log-compacted-000001-0.json", json.dumps(manifest).encode())
    object_store.refresh(mirror)
    assert rows(mirror) == in_columns(mirror) == [0, 1, 2] and names(mirror) == ["compacted-000001-0.parquet"]
    store.delete(parts[:1])
    object_store.refresh(mirror)
    assert rows(mirror) == [0, 1, 2]
    object_store.sweep(mirror)
    assert list(store.list("log/")) == ["log/compacted-000001-0.parquet"]
    store.put(flush_name("log", 2, "w", 0), flush(3))
    replaced = list(store.list("log/"))
    object_store.publish_compacted(
        mirror, compacted(tmp_path, 0, 1, 2, 3), "log/compacted-000002-1.parquet", replaced
    )
    object_store.refresh(mirror, ["log"])
    assert rows(mirror) == in_columns(mirror) == [0, 1, 2, 3] and names(mirror) == [
        "compacted-000002-1.parquet"
    ]
    assert list(store.list("log/")) == ["log/compacted-000002-1.parquet"]


def test_readers_of_one_mirror_never_lose_or_double_while_the_log_grows_and_is_compacted(
    url: str, tmp_path: Path
) -> None:
    store, mirror = ObjectStore(url), object_store.attach(url)
    written, is_done = [0], threading.Event()
    store.put(flush_name("log", 1, "w", 0), flush(0))

    def write() -> None:
        try:
            for n in range(1, 40):
                store.put(flush_name("log", 1, "w", n), flush(n))
                written[0] = n
                if n % 8 == 0:
                    merged = compacted(tmp_path, *range(n + 1))
                    # The name sorts before its forerunner's: a listing may pass it before it is there.
                    output = f"log/compacted-{99 - n:02d}.parquet"
                    object_store.publish_compacted(mirror, merged, output, list(store.list("log/")))
        finally:
            is_done.set()

    def follow(_: int) -> int:
        snapshots = 0
        while not is_done.is_set() or snapshots == 0:
            least = written[0]
            object_store.refresh(mirror, ["log"])
            found = rows(mirror)
            assert found == list(range(len(found))) and len(found) > least
            snapshots += 1
        return snapshots

    with ThreadPoolExecutor(4) as pool:
        writer, followers = pool.submit(write), [pool.submit(follow, n) for n in range(3)]
        writer.result()
        assert all(follower.result() > 3 for follower in followers)
    object_store.refresh(mirror)
    assert rows(mirror) == list(range(40)) and len(names(mirror)) == 8


def test_a_refresh_keeps_what_another_one_has_copied_meanwhile(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [1]

    def behaviour(method: str, path: str, headers: dict[str, str]) -> None:
        if "manifests" in path and waiting:  # the log is listed by now
            waiting.clear()
            store.put(flush_name("log", 1, "w", 1), flush(1))
            object_store.refresh(mirror, ["log"])
            assert rows(mirror) == [0, 1]

    with s3_proxy(server, behaviour) as proxy:
        use(monkeypatch, proxy.endpoint)
        store, mirror = ObjectStore(url), object_store.attach(url)
        store.put(flush_name("log", 1, "w", 0), flush(0))
        object_store.refresh(mirror, ["log"])
    assert not waiting and rows(mirror) == [0, 1]


def test_an_object_that_is_replaced_before_it_was_copied_is_found_in_its_replacement(
    url: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [1]

    def behaviour(method: str, path: str, headers: dict[str, str]) -> None:
        if method == "GET" and path.endswith(".arrows") and waiting:
            waiting.clear()
            merged = compacted(tmp_path, 0, 1)
            object_store.publish_compacted(
                mirror, merged, "log/compacted-1.parquet", list(store.list("log/"))
            )

    with s3_proxy(server, behaviour) as proxy:
        use(monkeypatch, proxy.endpoint)
        store, mirror = ObjectStore(url), object_store.attach(url)
        for n in range(2):
            store.put(flush_name("log", 1, "w", n), flush(n))
        object_store.refresh(mirror, ["log"])
    assert not waiting and rows(mirror) == [0, 1] and names(mirror) == ["compacted-1.parquet"]


def test_a_small_file_follows_the_bucket_even_within_one_second(url: str) -> None:
    store, mirror = ObjectStore(url), object_store.attach(url)
    for text in (b"beat 1", b"beat 2", b"beat 3"):
        store.put("status/e0001-driver.json", text)
        store.put("summary.json", text)
        object_store.refresh(mirror, ["status"])
        assert (mirror / "status" / "e0001-driver.json").read_bytes() == text
    assert not (mirror / "summary.json").exists()
    object_store.refresh(mirror, ["summary.json"])
    copy = mirror / "summary.json"
    assert copy.read_bytes() == b"beat 3"
    assert copy.stat().st_mtime == store.list("summary.json")["summary.json"].modified


def test_what_is_pushed_is_found_from_another_machine(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = object_store.attach(url)
    (mirror / "analysis" / "figures").mkdir(parents=True)
    (mirror / "analysis" / "figures" / "cost.svg").write_text("<svg/>")
    (mirror / "analysis" / "report.md.tmp").write_text("half")
    (mirror / "config.yaml").write_text("a: 1\n")
    large = os.urandom(1 << 10) * (9 << 10)  # goes out in parts, so that its ETag is no digest
    (mirror / "analysis" / "rows.bin").write_bytes(large)
    object_store.push(mirror, ["config.yaml", "analysis", "logs"])
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "elsewhere"))
    other = object_store.local(url)
    assert other != mirror and (other / "config.yaml").read_text() == "a: 1\n"
    assert (other / "analysis" / "figures" / "cost.svg").read_text() == "<svg/>"
    copy = other / "analysis" / "rows.bin"
    assert copy.read_bytes() == large and not (other / "analysis" / "report.md.tmp").exists()
    inode = copy.stat().st_ino
    object_store.refresh(other)
    assert copy.stat().st_ino == inode


def test_a_run_that_was_deleted_and_made_anew_leaves_nothing_of_the_old_one(url: str) -> None:
    store, mirror = ObjectStore(url), object_store.attach(url)
    store.put("identity.yaml", b"seed: 1\n")
    store.put(flush_name("log", 1, "w", 0), flush(1))
    store.put(flush_name("log", 1, "w", 1), flush(2))
    object_store.refresh(mirror)
    store.delete(store.list())
    object_store.refresh(mirror)
    assert not (mirror / "identity.yaml").exists() and rows(mirror) == []
    assert (mirror / "remote.json").exists()


def test_names_from_the_bucket_stay_inside_the_mirror(url: str) -> None:
    store, mirror = ObjectStore(url), object_store.attach(url)
    for name in ("analysis/../../../escaped", "log/1/../0.arrows", "remote.json", "analysis/.hidden", "x.sh"):
        store._client.put_object(Bucket=BUCKET, Key=store._key(name), Body=b"evil")
    object_store.refresh(mirror)
    assert sorted(path.name for path in mirror.iterdir()) == [".incoming", "log", "payloads", "remote.json"]
    assert json.loads((mirror / "remote.json").read_text()) == {"url": url} and names(mirror) == []
    assert not any(path.name == "escaped" for path in mirror.parent.parent.rglob("*"))


def test_a_store_that_stands_still_leaves_what_was_copied(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "TIMEOUT_S", 0.3)
    store, mirror = ObjectStore(url), object_store.attach(url)
    store.put(flush_name("log", 1, "w", 0), flush(1))
    object_store.refresh(mirror)
    server.stop()
    try:
        with pytest.raises(StorageError, match="does not answer"):
            object_store.refresh(mirror)
        with pytest.raises(StorageError, match="does not answer"):
            rows(mirror)  # a reader says so too, before it shows what may be old
        assert (mirror / object_store.local_name(flush_name("log", 1, "w", 0))).is_file()
    finally:
        server.resume()
    store.put(flush_name("log", 1, "w", 1), flush(2))
    object_store.refresh(mirror)
    assert rows(mirror) == [1, 2]


def test_what_killed_downloads_left_is_cleared_away(url: str) -> None:
    mirror = object_store.attach(url)
    left, fresh = mirror / ".incoming" / "left", mirror / ".incoming" / "fresh"
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    object_store.refresh(mirror)
    assert fresh.exists() and not left.exists()


def test_a_torn_marker_is_told(url: str) -> None:
    mirror = object_store.attach(url)
    (mirror / "remote.json").write_text("{")
    with pytest.raises(StorageError, match=r"remote\.json does not read; delete the folder"):
        object_store.store_of(mirror)
