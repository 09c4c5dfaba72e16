"""A run that is carried on over the deaths of its driver: the same command, as often as it takes."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

COUNTED = re.compile(r"^\[\w+_TASK_COMPLETE\] .* status=(done|skipped)")


@dataclass
class Command:
    """One start of the command: its output so far, and how many tasks that says are done."""

    process: subprocess.Popen[str]
    transcript: Path
    done: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    spoken_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output, self.transcript.open("a") as file:
            for line in output:
                file.write(line)
                file.flush()
                with self.changed:
                    counts = bool(COUNTED.match(line))
                    self.done += counts
                    if counts:
                        self.spoken_at = time.monotonic()
                    self.changed.notify_all()
        self.process.wait()
        with self.changed:
            self.changed.notify_all()

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None and not self._reader.is_alive()

    def wait(self, until: Callable[[], bool], deadline: float) -> bool:
        """Until that holds, the command has ended (False), or the deadline (monotonic; False) has come."""
        with self.changed:
            while not until():
                if self.has_ended or time.monotonic() > deadline:
                    return False
                self.changed.wait(0.2)
        return True

    def end(self) -> None:
        self.process.kill()
        self._reader.join()


@dataclass
class Carried:
    """`start` types the command once more; `commands` are all its starts, the last of which is `command`."""

    start: Callable[[], Command]
    commands: list[Command] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commands.append(self.start())

    @property
    def command(self) -> Command:
        return self.commands[-1]

    @property
    def codes(self) -> list[int]:
        """The exit codes of those that ended by themselves; one that a signal ended has a negative one."""
        codes = [command.process.poll() for command in self.commands]
        return [code for code in codes if code is not None and code >= 0]

    def again(self) -> None:
        self.command.end()
        self.commands.append(self.start())


@contextmanager
def carried(
    popen: Callable[..., subprocess.Popen[str]], arguments: list[str], environ: Mapping[str, str], log: Path
) -> Iterator[Carried]:
    job = Carried(lambda: Command(popen(*arguments, **environ), log))
    try:
        yield job
    finally:
        job.command.end()
