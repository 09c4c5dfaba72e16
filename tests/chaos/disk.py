"""A file system of its own that can be filled up, and frozen so that its writes stall.

ext4 in a file, on a loop device: nothing but that device is ever frozen. A guard, a process of its own, thaws
and unmounts it when this process ends, however that happens. While it is frozen whoever writes to it waits in
the kernel, where SIGKILL does not reach: a killed process is gone only once the disk is thawed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.unavailable import Unavailable

FREEZE, THAW = 0xC0045877, 0xC0045878  # FIFREEZE and FITHAW of linux/fs.h
TOP_UP_S = 0.1
# By whose number a later process tells the disk of one that is gone.
_IMAGE = re.compile(r"\.disk-(\d+)-\w+\.ext4")
_GUARD = 'cat > /dev/null; fsfreeze -u "$1" 2> /dev/null; umount -l "$1"'


@dataclass(frozen=True)
class Disk:
    """The file system at `folder`."""

    folder: Path
    _descriptor: int  # of its root: opening it could wait while it is frozen

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not one more block is free inside; what others delete is taken at once."""
        ballast = self.folder / ".ballast"
        try:
            with ballast.open("ab", buffering=0) as file:

                def top_up(stop: threading.Event) -> None:
                    _fill(file.fileno())
                    stop.wait(TOP_UP_S)

                _fill(file.fileno())
                with _repeated(top_up):
                    yield
        finally:
            ballast.unlink(missing_ok=True)

    @contextmanager
    def slow(self, duty: float = 0.9, period_s: float = 1.0) -> Iterator[None]:
        """Of each period a share of `duty` is frozen; at 1.0 nothing is written before the end."""

        def period(stop: threading.Event) -> None:
            self._freeze()
            stop.wait(duty * period_s)
            if duty < 1:
                self._thaw()
                stop.wait((1 - duty) * period_s)

        try:
            self._freeze()  # from the first moment on
            with _repeated(period):
                yield
        finally:
            self._thaw()

    def _freeze(self) -> None:
        with suppress(OSError):  # frozen already
            fcntl.ioctl(self._descriptor, FREEZE, 0)

    def _thaw(self) -> None:
        with suppress(OSError):  # not frozen
            fcntl.ioctl(self._descriptor, THAW, 0)


@contextmanager
def disk(folder: Path, size_mb: int = 512) -> Iterator[Disk]:
    """A disk mounted at `folder`, which is made; gone at the end. Raises Unavailable."""
    clean()
    folder.mkdir(parents=True, exist_ok=True)
    image = _mount(folder, size_mb)
    guard = subprocess.Popen(
        ["sh", "-c", _GUARD, "sh", str(folder)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for others
    )
    image.unlink()  # the space is free again once it is unmounted
    assert guard.stdin is not None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield Disk(folder, descriptor)
    finally:
        os.close(descriptor)
        guard.stdin.close()
        guard.wait()


def clean() -> None:
    """Thaws and unmounts what a killed process left, whose guard was killed as well."""
    for device in Path("/sys/block").glob("loop*"):
        with suppress(OSError):
            owner = _IMAGE.search((device / "loop" / "backing_file").read_text())
            if owner and not Path(f"/proc/{owner[1]}").exists():
                for folder in _mounts(f"/dev/{device.name}"):
                    subprocess.run(["sh", "-c", _GUARD, "sh", folder], stdin=subprocess.DEVNULL, check=False)


def _mounts(device: str) -> list[str]:
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [words[1] for words in lines if words[0] == device]


def _mount(folder: Path, size_mb: int) -> Path:
    """The image, mounted. Small blocks: what still fits into the last one of a file is no full disk."""
    handle, name = tempfile.mkstemp(prefix=f".disk-{os.getpid()}-", suffix=".ext4", dir=folder.parent)
    os.ftruncate(handle, size_mb << 20)
    os.close(handle)
    make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "1024", "-E", "lazy_itable_init=1", name]
    for command in (make, ["mount", "-o", "loop,noatime", name, str(folder)]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            problem = done.stderr.strip() if done.returncode else ""
        except FileNotFoundError:
            problem = "not installed"
        if problem:
            Path(name).unlink()
            raise Unavailable(f"{command[0]}: {' '.join(problem.split())}; needs root and a loop device")
    return Path(name)


def _fill(descriptor: int) -> None:
    for size in (1 << 20, 65_536, 1024, 1):
        try:
            while os.write(descriptor, bytes(size)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@contextmanager
def _repeated(step: Callable[[threading.Event], object]) -> Iterator[None]:
    """`step` again and again beside what is done inside; it is to return soon once the event is set."""
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            step(stop)

    thread = threading.Thread(target=go_on, name="chaos-disk", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
