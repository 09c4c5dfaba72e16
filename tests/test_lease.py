from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ray_app import lease, object_store
from ray_app.errors import RunDirError, StorageError
from tests.chaos.disk import disk
from tests.chaos.unavailable import Unavailable
from tests.s3_server import BUCKET, S3Server, environment, s3_proxy, s3_server

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")

# A driver that does what each line of its input asks and answers in a line.
DRIVER = """
import sys
from pathlib import Path
from ray_app import lease
from ray_app.errors import EvalError
print("ready", flush=True)
held = None
for line in sys.stdin:
    try:
        if line == "take\\n":
            held = lease.take(Path(sys.argv[1]))
            print("epoch", held.epoch, flush=True)
        else:
            getattr(held, line.strip())()
            print("done", flush=True)
    except EvalError as error:
        print(type(error).__name__, error, flush=True)
"""


class Driver:
    """A driver in a process of its own."""

    def __init__(self, run_dir: Path, *prefix: str, **env: str) -> None:
        command = [*prefix, sys.executable, "-c", DRIVER, str(run_dir)]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=os.environ | env)
        assert self._line() == "ready"

    def ask(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def answer(self, what: str = "") -> str:
        if what:
            self.ask(what)
        return self._line()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def driver(run_dir: Path, *prefix: str, **env: str) -> Iterator[Driver]:
    started = Driver(run_dir, *prefix, **env)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for key, value in environment(endpoint).items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def mirror(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use(monkeypatch, server.endpoint)
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "home"))
    return object_store.attach(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture(params=["folder", "bucket"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run of each kind of storage."""
    found: Path = request.getfixturevalue("mirror") if request.param == "bucket" else tmp_path / "run"
    return found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> str:
    """A lease of a second, here; and for other processes."""
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    return "1.0"


def refusal(held: lease.Lease) -> str:
    """What a check of the lease says against going on."""
    try:
        held.check()
    except StorageError as error:
        return str(error)
    return ""


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def taken(run_dir: Path) -> lease.Lease:
    """Take the run as soon as it may be taken."""
    found: list[lease.Lease] = []

    def is_taken() -> bool:
        with suppress(RunDirError):
            found.append(lease.take(run_dir))
        return bool(found)

    until(is_taken)
    return found[0]


def holder(run_dir: Path, epoch: int) -> bytes:
    """The record of an epoch, read where it is kept."""
    name = f"lease/epoch-{epoch:06d}.json"
    store = object_store.store_of(run_dir)
    return (run_dir / name).read_bytes() if store is None else store.get(name)


def heartbeat(run_dir: Path, epoch: int) -> float:
    name = f"lease/epoch-{epoch:06d}.json"
    store = object_store.store_of(run_dir)
    return (run_dir / name).stat().st_mtime if store is None else store.list("lease/")[name].modified


def test_a_second_driver_is_refused_while_the_first_lives(run_dir: Path) -> None:
    assert lease.newest_epoch(run_dir) == 0
    held = lease.take(run_dir)
    assert held.path.exists() and held.is_exclusive
    with pytest.raises(RunDirError, match=f"process {os.getpid()} on .* is running it"):
        lease.take(run_dir)
    held.release()
    again = lease.take(run_dir)
    assert again.epoch == held.epoch + 1 == lease.newest_epoch(run_dir)
    again.release()


def test_a_killed_driver_is_replaced_at_once(run_dir: Path) -> None:
    with driver(run_dir) as other:
        assert other.answer("take") == "epoch 1"
        with pytest.raises(RunDirError, match=f"process {other.process.pid}"):
            lease.take(run_dir)
        other.process.kill()
        other.process.wait()
        held = lease.take(run_dir)
    assert held.epoch == 2
    held.release()


def test_of_drivers_that_start_at_one_moment_exactly_one_has_the_run(run_dir: Path) -> None:
    drivers = [Driver(run_dir) for _ in range(3)]
    try:
        for epoch in (1, 2):
            for each in drivers:
                each.ask("take")
            answers = [each.answer() for each in drivers]
            assert answers.count(f"epoch {epoch}") == 1
            assert sum(answer.startswith("RunDirError") for answer in answers) == len(drivers) - 1
            assert drivers[answers.index(f"epoch {epoch}")].answer("release") == "done"
    finally:
        for each in drivers:
            each.end()


def test_a_stopped_driver_is_replaced_and_wakes_up_without_the_run(run_dir: Path, short: str) -> None:
    with driver(run_dir, TOOLORCH_LEASE_S=short) as old:
        assert old.answer("take") == "epoch 1"
        assert old.answer("check") == "done"
        old.process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunDirError, match=f"process {old.process.pid}"):
            lease.take(run_dir)
        held = taken(run_dir)
        assert held.epoch == 2
        record, beat = holder(run_dir, 1), heartbeat(run_dir, 1)
        old.process.send_signal(signal.SIGCONT)
        replaced = (
            "StorageError this driver's lease (epoch 1) was replaced by epoch 2: another driver has the run"
        )
        assert old.answer("check") == replaced
        assert old.answer("release") == "done"
        # Two heartbeats of the new driver, in which the old one had as many occasions to touch its own.
        for _ in range(2):
            seen = heartbeat(run_dir, 2)
            until(lambda seen=seen: heartbeat(run_dir, 2) > seen)  # type: ignore[misc]
        assert (holder(run_dir, 1), heartbeat(run_dir, 1)) == (record, beat)
        held.check()
        assert b"ended" not in holder(run_dir, 2)
        held.release()
        assert b"ended" in holder(run_dir, 2) and old.answer("check") == replaced


def test_a_driver_that_was_replaced_may_not_commit(tmp_path: Path) -> None:
    old = lease.take(tmp_path)
    old.check()
    (old.path.parent / f"epoch-{old.epoch + 1:06d}.json").write_text("{}")
    with pytest.raises(StorageError, match="replaced by epoch 2"):
        old.check()


def test_a_run_that_was_deleted_belongs_to_nobody(tmp_path: Path) -> None:
    held = lease.take(tmp_path)
    held.path.unlink()
    with pytest.raises(StorageError, match="is gone"):
        held.check()
    held.release()
    assert not held.path.exists()


@pytest.mark.parametrize(("age_s", "is_free"), [(0, False), (5, True), (-3600, True)])
def test_a_driver_on_another_machine_lives_by_its_heartbeat(
    tmp_path: Path, age_s: float, is_free: bool, short: str
) -> None:
    folder = tmp_path / "lease"
    folder.mkdir()
    path = folder / "epoch-000001.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1.0}))
    os.utime(path, (time.time() - age_s,) * 2)
    if is_free:
        assert lease.take(tmp_path).epoch == 2
    else:
        with pytest.raises(RunDirError, match="on elsewhere"):
            lease.take(tmp_path)
    assert not list(folder.glob(".now-*"))


@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_clock_that_was_set_takes_the_run_from_nobody(tmp_path: Path, short: str, step_s: float) -> None:
    with driver(tmp_path, TOOLORCH_LEASE_S=short) as other:
        assert other.answer("take") == "epoch 1"
        path = tmp_path / "lease" / "epoch-000001.json"
        # As its last heartbeat looks right after the step.
        os.utime(path, (time.time() - step_s,) * 2)
        with pytest.raises(RunDirError, match=f"process {other.process.pid}"):
            lease.take(tmp_path)
        assert other.answer("check") == "done"


def test_a_record_that_was_torn_keeps_the_run_for_one_lease(tmp_path: Path, short: str) -> None:
    (tmp_path / "lease").mkdir()
    path = tmp_path / "lease" / "epoch-000001.json"
    path.write_text('{"host": ')
    with pytest.raises(RunDirError, match="process unknown on another machine"):
        lease.take(tmp_path)
    os.utime(path, (time.time() - lease.LEASE_S - 1,) * 2)
    assert lease.take(tmp_path).epoch == 2


def test_machines_that_share_a_run_take_it_from_one_another(run_dir: Path, short: str) -> None:
    away = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh")
    if subprocess.run([*away, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no UTS namespaces here")
    with driver(run_dir, *away, TOOLORCH_LEASE_S=short) as other:
        assert other.answer("take") == "epoch 1"
        with pytest.raises(RunDirError, match=rf"process {other.process.pid} on elsewhere"):
            lease.take(run_dir)
        other.process.kill()
        other.process.wait()
        # Its death cannot be seen from here: only its silence.
        with pytest.raises(RunDirError, match="on elsewhere"):
            lease.take(run_dir)
        held = taken(run_dir)
    assert held.epoch == 2
    with driver(run_dir, *away, TOOLORCH_LEASE_S=short) as other:
        assert other.answer("take").startswith(f"RunDirError run {run_dir}: process {os.getpid()} on ")
        held.release()
        assert other.answer("take") == "epoch 3"


def test_a_disk_that_fails_for_a_moment_ends_no_driver(tmp_path: Path, short: str) -> None:
    held = lease.take(tmp_path)
    away = tmp_path / "away"
    held.path.parent.rename(away)
    (tmp_path / "lease").write_text("no folder")  # listing it fails, as that of a broken mount does
    held.check()
    with pytest.raises(StorageError, match=r"could not be confirmed for \d+ s, .* another driver may have"):
        while True:
            held.check()
            time.sleep(0.02)
    (tmp_path / "lease").unlink()
    away.rename(tmp_path / "lease")
    held.check()
    beat = heartbeat(tmp_path, 1)
    until(lambda: heartbeat(tmp_path, 1) > beat)
    held.release()


def test_a_disk_that_stands_still_holds_up_no_event_loop(tmp_path: Path, short: str) -> None:
    try:
        with disk(tmp_path / "disk", 64) as slow:
            held = lease.take(slow.folder)
            with slow.slow(duty=1.0):
                began, unconfirmed = time.monotonic(), 0
                while not unconfirmed:
                    asked = time.monotonic()
                    try:
                        held.check()
                    except StorageError as error:
                        assert "does not answer the heartbeat" in str(error)
                        unconfirmed += 1
                    assert time.monotonic() - asked < 2 * lease.HEARTBEAT_S
                    time.sleep(0.02)
                assert time.monotonic() - began >= 0.8, "nobody could have taken the run before"
            beat = heartbeat(slow.folder, 1)
            until(lambda: heartbeat(slow.folder, 1) > beat)
            held.check()
            held.release()
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_a_store_that_is_away_for_a_moment_ends_no_driver(
    mirror: Path, server: S3Server, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, int] = {}
    with s3_proxy(server, lambda *_: answers.get("status")) as proxy:
        use(monkeypatch, proxy.endpoint)
        held = lease.take(mirror)
        answers["status"] = 503
        held.check()
        # A heartbeat that is asking again keeps a check from asking itself: then it says just that.
        until(lambda: re.search(r"could not be confirmed for .* answers 503", refusal(held)))
        del answers["status"]
        until(lambda: not refusal(held))  # nobody has come: the run is still this driver's
        beat = heartbeat(mirror, 1)
        until(lambda: heartbeat(mirror, 1) > beat)
        held.release()
        assert b"ended" in holder(mirror, 1)


def test_a_check_asks_the_store_nothing_while_the_heartbeat_holds(mirror: Path, server: S3Server) -> None:
    held = lease.take(mirror)
    server.stop()
    try:
        began = time.monotonic()
        for _ in range(1000):
            held.check()
        assert time.monotonic() - began < 1
    finally:
        server.resume()
    held.release()


def test_a_store_without_conditional_puts_promises_less_and_the_loser_finds_out(
    mirror: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behaviour(method: str, path: str, headers: dict[str, str]) -> int | None:
        return 501 if "If-None-Match" in headers else None

    with s3_proxy(server, behaviour) as proxy:
        use(monkeypatch, proxy.endpoint)
        held = lease.take(mirror)
        assert not held.is_exclusive and held.epoch == 1
        with pytest.raises(RunDirError, match=f"process {os.getpid()}"):
            lease.take(mirror)
        store = object_store.store_of(mirror)
        assert store is not None
        other = json.dumps(json.loads(holder(mirror, 1)) | {"token": "of another driver"}).encode()
        store.put("lease/epoch-000001.json", other)
        monkeypatch.setattr(lease, "LEASE_S", 0.0)  # as if its heartbeat were old: it asks the store
        with pytest.raises(StorageError, match="was taken by another driver at the same moment"):
            held.check()
        held.release()
        assert holder(mirror, 1) == other
