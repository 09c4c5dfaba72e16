"""A wall clock that jumps in chosen processes while they run; their monotonic clocks go on as they did.

libfaketime, preloaded. Each process that was started with `environ` (and its children) reads the offset from
a file, at most CACHE_S after it was written there. Times of files stay the file system's, as on a machine
whose own clock is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.unavailable import Unavailable

CACHE_S = 1
# The form for programs with threads: its cache has a lock.
_LIBRARY = "faketime/libfaketimeMT.so.1"


@dataclass(frozen=True)
class Clock:
    """The offset of the wall clocks of the processes that have `environ` in their environment."""

    library: Path
    file: Path

    @property
    def environ(self) -> Mapping[str, str]:
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": str(CACHE_S),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
            "NO_FAKE_STAT": "1",
        }

    def step(self, seconds: float) -> None:
        """From now on the clock is off by `seconds`."""
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(f"{seconds:+.3f}\n")
        temporary.replace(self.file)

    def restore(self) -> None:
        self.step(0)

    @contextmanager
    def stepped(self, seconds: float) -> Iterator[None]:
        """Off by `seconds` inside, right again after it: two steps."""
        self.step(seconds)
        try:
            yield
        finally:
            self.restore()


def clock(folder: Path) -> Clock:
    """A clock that is right, its file in `folder`. Raises Unavailable where libfaketime is missing."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("libfaketime is looked for on Linux only")
    found = sorted(path for top in ("/usr/lib", "/usr/lib64") for path in Path(top).glob(f"**/{_LIBRARY}"))
    if not found:
        raise Unavailable("libfaketime is not installed (`apt-get install faketime`)")
    mine = Clock(found[0], folder / "clock")
    mine.restore()
    return mine
