"""One driver at a time: a run's epochs, in its folder or on its object store.

A driver takes the run by creating `lease/epoch-N.json`, which exactly one can (O_EXCL in a folder, a
conditional put on an object store), and renews it while it lives. It is replaced when it has ended, when
its process is gone, or when its last heartbeat is LEASE_S old: a process that is stopped loses the run as a
machine that is cut off does. A driver whose epoch is not the newest must stop before it commits anything
more. Works on shared folders; does not rely on flock, nor on the clocks of two machines to agree.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ray_app import steady
from ray_app.errors import RunDirError, StorageError
from ray_app.object_store import Gone, ObjectStore, store_of
from ray_app.pulse import process_started

# A lease counts as live this long after its last heartbeat; ten heartbeats fit. Tests shorten it.
LEASE_S = float(os.environ.get("TOOLORCH_LEASE_S") or 20.0)
# A heartbeat that takes longer stands still, as storage does: the event loop must not wait for it.
HEARTBEAT_S = 0.2


class _Seen(NamedTuple):
    """The record of an epoch: who took it, and when its last heartbeat was by the clock of storage."""

    holder: Mapping[str, Any]
    beat: float
    age_s: float


class _Place(Protocol):
    """Where the epochs of a run are kept. Everything raises OSError or StorageError."""

    @property
    def is_exclusive(self) -> bool: ...
    @property
    def is_remote(self) -> bool: ...
    def newest(self) -> int:
        """0 where nobody has taken the run."""

    def seen(self, epoch: int) -> _Seen: ...
    def create(self, epoch: int, holder: Mapping[str, Any]) -> bool: ...
    def is_mine(self, epoch: int, holder: Mapping[str, Any]) -> bool: ...
    def renew(self, epoch: int, holder: Mapping[str, Any]) -> None: ...
    def end(self, epoch: int, holder: Mapping[str, Any]) -> None: ...


class Unconfirmed(StorageError):
    """The lease could not be read for so long that another driver may have the run by now."""


@dataclass
class Lease:
    """The right to commit results of a run, until another driver takes a newer epoch.

    `is_exclusive` is False on an object store without conditional puts: there two drivers that start at
    one moment may both believe for a heartbeat that they have the run.
    """

    path: Path
    epoch: int
    is_exclusive: bool
    _place: _Place
    _holder: Mapping[str, Any]
    _confirmed: float  # when a look that found this epoch the newest, and renewed it, began
    _lost: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _beating: threading.Lock = field(default_factory=threading.Lock)
    _is_stuck: bool = False

    def start_heartbeat(self) -> None:
        threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True).start()

    def check(self) -> None:
        """Raises StorageError when another driver has the run, or could have it by now.

        Storage that fails is waited out as long as nobody could have taken the run. On an object store this
        asks nothing while the heartbeat holds: no other driver takes the run before LEASE_S without one.
        """
        if not self._lost and not (self._place.is_remote and self._age_s() < LEASE_S):
            try:
                self._look_soon()
            except (OSError, StorageError) as error:
                if self._age_s() >= LEASE_S:
                    raise Unconfirmed(
                        f"this driver's lease (epoch {self.epoch}) could not be confirmed for "
                        f"{self._age_s():.0f} s, so another driver may have the run: {error}"
                    ) from None
        if self._lost:
            raise StorageError(
                f"this driver's lease (epoch {self.epoch}) {self._lost}: another driver has the run"
            )

    def _look_soon(self) -> None:
        """Looks, unless the heartbeat is on its way and does not come back: that is storage that fails."""
        if not self._beating.acquire(timeout=0.0 if self._is_stuck else HEARTBEAT_S):
            self._is_stuck = True
            raise TimeoutError("storage does not answer the heartbeat")
        try:
            self._is_stuck = False
            self._look(renew=self._place.is_remote)
        finally:
            self._beating.release()

    def release(self) -> None:
        """Stop the heartbeat; the record of the epoch stays, marked as ended, unless it was replaced."""
        self._stop.set()
        # A lease that cannot be marked is recognised as dead by its process or its age.
        with suppress(OSError, StorageError), self._beating:
            self._look(renew=False)
            if not self._lost:
                self._place.end(self.epoch, {**self._holder, "ended": time.time()})

    def _beat(self) -> None:
        while not self._stop.wait(LEASE_S / 10):
            # Under the lock: a heartbeat on its way must not undo the mark of `release`.
            with suppress(OSError, StorageError), self._beating:
                if self._lost or self._stop.is_set():
                    return
                self._look(renew=True)

    def _look(self, *, renew: bool) -> None:
        """Find out whether this epoch is the newest; only then, where asked, renew it."""
        began = steady.clock_s()
        newest = self._place.newest()
        if newest != self.epoch:
            self._lost = f"was replaced by epoch {newest}" if newest > self.epoch else "is gone"
        elif not self.is_exclusive and not self._place.is_mine(self.epoch, self._holder):
            self._lost = "was taken by another driver at the same moment"
        else:
            if renew:
                self._place.renew(self.epoch, self._holder)
            self._confirmed = began

    @property
    def is_lost(self) -> bool:
        """Another driver is known to have the run; no waiting mends that."""
        return bool(self._lost)

    @property
    def unconfirmed_s(self) -> float:
        """Seconds since it was known to be this driver's."""
        return self._age_s()

    def _age_s(self) -> float:
        return steady.clock_s() - self._confirmed


def take(run_dir: Path) -> Lease:
    """Take the run. Raises RunDirError, naming the holder, while another driver lives."""
    place = _place(run_dir)
    newest = place.newest()
    if newest:
        _refuse_if_alive(run_dir, place, newest)
    epoch = newest + 1
    pid = os.getpid()
    holder = {
        "host": socket.gethostname(),
        "pid": pid,
        "started": process_started(pid),
        "pid_namespace": _pid_namespace(),
        "token": uuid.uuid4().hex,
    }
    began = steady.clock_s()
    if not place.create(epoch, holder):
        raise RunDirError(f"run {run_dir}: another driver has just taken it; wait for it or stop it")
    path = run_dir / "lease" / _name(epoch)
    lease = Lease(path, epoch, place.is_exclusive, place, holder, began)
    lease.start_heartbeat()
    return lease


def newest_epoch(run_dir: Path) -> int:
    """The epoch of the driver that has the run; 0 where nobody has taken it. One listing."""
    return _place(run_dir).newest()


def _refuse_if_alive(run_dir: Path, place: _Place, epoch: int) -> None:
    try:
        seen = place.seen(epoch)
    except (FileNotFoundError, Gone):
        return
    holder = seen.holder
    if "ended" in holder:
        return
    is_here = (holder["host"], holder.get("pid_namespace")) == (socket.gethostname(), _pid_namespace())
    if is_here and process_started(holder["pid"]) != holder["started"]:
        return
    # An age that says nothing: the clock may have been set since, forwards or back.
    if not -LEASE_S - 1 < seen.age_s < LEASE_S and not _beats(place, epoch, seen):
        return
    raise RunDirError(
        f"run {run_dir}: process {holder['pid']} on {holder['host']} is running it; "
        "wait for it, stop it, or choose another --run-dir"
    )


def _beats(place: _Place, epoch: int, first: _Seen) -> bool:
    """Whether a heartbeat comes within two of them; after one in the future, within a lease."""
    until = steady.clock_s() + (LEASE_S / 5 if first.age_s > 0 else LEASE_S)
    while steady.clock_s() < until:
        time.sleep(LEASE_S / 20)
        try:
            seen = place.seen(epoch)
        except (FileNotFoundError, Gone):
            return False
        if "ended" in seen.holder:
            return False
        if seen.beat != first.beat:
            return True
    return False


@dataclass(frozen=True)
class _Folder:
    """Epochs as files of a folder, which machines may share."""

    folder: Path
    is_exclusive = True
    is_remote = False

    def newest(self) -> int:
        try:
            return _newest(path.name for path in self.folder.iterdir())  # glob hides a disk that fails
        except FileNotFoundError:
            return 0

    def seen(self, epoch: int) -> _Seen:
        now = self._now()
        with (self.folder / _name(epoch)).open() as file:
            # Opened first: a network file system then asks its server for the time of the file.
            beat = os.fstat(file.fileno()).st_mtime
            return _Seen(_parsed(file.read()), beat, now - beat)

    def create(self, epoch: int, holder: Mapping[str, Any]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _name(epoch)
        try:
            with path.open("x") as file:
                json.dump(holder, file)
        except FileExistsError:
            return False
        except OSError:  # a full disk: an empty file would keep everybody out for a while
            path.unlink(missing_ok=True)
            raise
        return True

    def is_mine(self, epoch: int, holder: Mapping[str, Any]) -> bool:
        return True  # O_EXCL has settled it

    def renew(self, epoch: int, holder: Mapping[str, Any]) -> None:
        os.utime(self.folder / _name(epoch))  # never creates; the time is the file system's own

    def end(self, epoch: int, holder: Mapping[str, Any]) -> None:
        temporary, path = self.folder / f"{_name(epoch)}.tmp", self.folder / _name(epoch)
        try:
            temporary.write_text(json.dumps(holder))
            temporary.replace(path)
        except OSError:  # a full disk has room in the blocks that the file has
            temporary.unlink(missing_ok=True)
            path.write_text(json.dumps(holder))

    def _now(self) -> float:
        """The time of the file system, whose clock need not be this machine's."""
        probe = self.folder / f".now-{uuid.uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Bucket:
    """Epochs as objects; `mirror` gets a copy of the own one."""

    store: ObjectStore
    mirror: Path
    is_remote = True

    @property
    def is_exclusive(self) -> bool:
        return self.store.has_conditional_put

    def newest(self) -> int:
        return _newest(name.removeprefix("lease/") for name in self.store.list("lease/"))

    def seen(self, epoch: int) -> _Seen:
        name = f"lease/{_name(epoch)}"
        # The store's clock shows whole seconds: the age may be one less than it seems.
        beat = self.store.list(name)[name].modified
        return _Seen(_parsed(self.store.get(name)), beat, self.store.age_s(name) - 1)

    def create(self, epoch: int, holder: Mapping[str, Any]) -> bool:
        data = json.dumps(holder)
        is_created = self.store.put_new(f"lease/{_name(epoch)}", data.encode())
        if is_created:
            self.mirror.mkdir(exist_ok=True)
            (self.mirror / _name(epoch)).write_text(data)
        return is_created

    def is_mine(self, epoch: int, holder: Mapping[str, Any]) -> bool:
        return bool(_parsed(self.store.get(f"lease/{_name(epoch)}")).get("token") == holder["token"])

    def renew(self, epoch: int, holder: Mapping[str, Any]) -> None:
        self.store.put(f"lease/{_name(epoch)}", json.dumps(holder).encode())

    end = renew


def _place(run_dir: Path) -> _Place:
    store, folder = store_of(run_dir), Path(run_dir) / "lease"
    return _Folder(folder) if store is None else _Bucket(store, folder)


def _newest(names: Iterable[str]) -> int:
    epochs = [name for name in names if name.startswith("epoch-") and name.endswith(".json")]
    return max((int(name.removeprefix("epoch-").removesuffix(".json")) for name in epochs), default=0)


def _name(epoch: int) -> str:
    return f"epoch-{epoch:06d}.json"


def _parsed(text: str | bytes) -> Mapping[str, Any]:
    """The holder; nobody in particular for a record that is being written, or torn when its driver died."""
    try:
        holder = json.loads(text)
    except ValueError:
        holder = {}
    return {"host": "another machine", "pid": "unknown", "started": None, **holder}


def _pid_namespace() -> str:
    """Two containers may have one host name, and then not the same processes."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
