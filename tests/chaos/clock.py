"""A wall clock that jumps in chosen processes while they run; their monotonic clocks go on as they did.

A small library (`clock.c`), preloaded. Each process that was started with `environ`, and its children, add to
the wall clock what stands in a file, from the moment on at which it is written there. Times of files stay the
file system's, as on a machine whose own clock is wrong.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.unavailable import Unavailable

SOURCE = Path(__file__).with_name("clock.c")
# The library checks what callers promise never to be null.
_COMPILE = ("cc", "-shared", "-fPIC", "-O2", "-fno-delete-null-pointer-checks", "-w")


@dataclass(frozen=True)
class Clock:
    """The offset of the wall clocks of the processes that have `environ` in their environment."""

    library: Path
    file: Path

    @property
    def environ(self) -> Mapping[str, str]:
        return {"LD_PRELOAD": str(self.library), "CHAOS_CLOCK": str(self.file)}

    def step(self, seconds: float) -> None:
        """From now on the clock is off by `seconds`."""
        with self.file.open("r+b", buffering=0) as file:  # processes have it mapped: never another file
            file.write(round(seconds * 1e9).to_bytes(8, "little", signed=True))

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
    """A clock that is right; its files are in `folder`. Raises Unavailable where it cannot be compiled."""
    library = folder / "clock.so"
    command = [*_COMPILE, "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable("no C compiler (`cc`)") from None
    if done.returncode:
        raise Unavailable(f"{SOURCE.name}: {' '.join(done.stderr.split())[:200]}")
    with tempfile.NamedTemporaryFile(dir=folder, prefix="clock-", delete=False) as file:
        file.write(bytes(8))
    return Clock(library, Path(file.name))
