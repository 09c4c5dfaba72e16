"""The disk of the chaos suite: really full, really slow, and never left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import disk as disks
from tests.chaos.unavailable import Unavailable

# Dies with its disk frozen; what comes after it is its guard's to thaw.
DIES = """
import os, sys
from pathlib import Path
import psutil
from tests.chaos.disk import disk
with disk(Path(sys.argv[1]), 64) as mine, mine.slow(1.0):
    if "guard" in sys.argv:
        [guard] = psutil.Process().children()
        guard.kill()
    os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[disks.Disk]:
    try:
        with disks.disk(tmp_path / "disk", 64) as found:
            yield found
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_it_is_full_to_the_last_block_and_slow_to_the_end_of_its_time(disk: disks.Disk) -> None:
    kept, old = disk.folder / "kept", disk.folder / "old"
    kept.write_bytes(b"before")
    old.write_bytes(bytes(1 << 20))
    with disk.full():
        old.unlink()
        deadline = time.monotonic() + 10
        while _takes(disk.folder / "new") and time.monotonic() < deadline:
            time.sleep(disks.TOP_UP_S)
        assert not _takes(disk.folder / "new"), "what is deleted is taken again"
        assert kept.read_bytes() == b"before"
    assert _takes(disk.folder / "new")

    began = time.monotonic()
    with disk.slow(duty=0.5, period_s=0.4):
        kept.write_bytes(b"within")
        assert time.monotonic() - began >= 0.19, "it is frozen from the first moment on"
    kept.write_bytes(b"after")
    assert kept.read_bytes() == b"after"


@pytest.mark.parametrize("end", [("9",), ("15",), ("9", "guard")])
def test_a_process_that_is_killed_leaves_no_frozen_disk_behind(
    disk: disks.Disk, tmp_path: Path, end: tuple[str, ...]
) -> None:
    folder = tmp_path / "left"
    died = subprocess.run([sys.executable, "-c", DIES, str(folder), *end], check=False)
    assert died.returncode == -int(end[0])
    if "guard" in end:
        assert folder.is_mount()
        disks.clean()
    deadline = time.monotonic() + 10
    while folder.is_mount():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (disk.folder / "other").write_bytes(b"is not touched")
    assert disk.folder.is_mount()


def _takes(path: Path) -> bool:
    try:
        path.write_bytes(bytes(5000))
    except OSError:
        path.unlink(missing_ok=True)
        return False
    path.unlink()
    return True
