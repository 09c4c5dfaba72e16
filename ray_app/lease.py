"""One driver at a time: a run directory's epochs.

A driver that takes the run creates `lease/epoch-N.json` with O_EXCL, so two drivers cannot take the
same number, and touches it while it lives. A driver whose file is not the newest has been replaced
and must stop before it commits anything more. Works on shared folders; does not rely on flock.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ray_app.errors import RunDirError, StorageError
from ray_app.pulse import process_started

HEARTBEAT_S = 2.0
# A lease from another machine counts as live this long after its last heartbeat.
LEASE_S = 20.0


@dataclass
class Lease:
    """The right to commit results of a run, until another driver takes a newer epoch."""

    path: Path
    epoch: int
    _stop: threading.Event = field(default_factory=threading.Event)

    def start_heartbeat(self) -> None:
        threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True).start()

    def check(self) -> None:
        """Raises StorageError when another driver has taken the run."""
        newest = _newest(self.path.parent)
        if newest is None or newest[0] != self.epoch:
            taken = "is gone" if newest is None else f"was replaced by epoch {newest[0]}"
            raise StorageError(
                f"this driver's lease (epoch {self.epoch}) {taken}: another driver has the run"
            )

    def release(self) -> None:
        """Stop the heartbeat; the file stays as the record of the epoch, marked as ended."""
        self._stop.set()
        try:
            holder = json.loads(self.path.read_text())
            _write(self.path, holder | {"ended": time.time()})
        except (OSError, ValueError):
            pass  # a lease that cannot be marked is recognised as dead by its process

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except OSError:
                return


def take(run_dir: Path) -> Lease:
    """Take the run. Raises RunDirError, naming the holder, while another driver lives."""
    folder = run_dir / "lease"
    folder.mkdir(parents=True, exist_ok=True)
    newest = _newest(folder)
    if newest is not None:
        _refuse_if_alive(run_dir, newest[1])
    epoch = 1 if newest is None else newest[0] + 1
    path = folder / f"epoch-{epoch:06d}.json"
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_started(os.getpid())}
    try:
        with path.open("x") as file:
            json.dump(holder, file)
    except FileExistsError:
        raise RunDirError(
            f"run {run_dir}: another driver has just taken it; wait for it or stop it"
        ) from None
    lease = Lease(path, epoch)
    lease.start_heartbeat()
    return lease


def _refuse_if_alive(run_dir: Path, path: Path) -> None:
    try:
        age_s = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_text())
    except OSError:
        return
    except ValueError:  # being written this moment, or torn when its driver died
        holder = {"host": "", "pid": "unknown", "started": None}
    if "ended" in holder:
        return
    is_here = holder.get("host") == socket.gethostname()
    alive = process_started(holder["pid"]) == holder["started"] if is_here else age_s < LEASE_S
    if alive:
        raise RunDirError(
            f"run {run_dir}: process {holder['pid']} on {holder['host']} is running it; "
            "wait for it, stop it, or choose another --run-dir"
        )


def _newest(folder: Path) -> tuple[int, Path] | None:
    epochs = sorted(folder.glob("epoch-*.json"))
    return (int(epochs[-1].stem.removeprefix("epoch-")), epochs[-1]) if epochs else None


def _write(path: Path, value: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
