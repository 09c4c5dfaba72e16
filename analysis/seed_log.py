"""Lines of the text logs of earlier systems (`hle.log`), as values.

A line is `[LEVEL] YYYY-MM-DD HH:MM:SS.mmm task=ID thread=N type=EVENT [step=N] [eid=N] name=value ...`, in
local time, written when the thing that it tells of had ended. Nothing is quoted or escaped, so a value goes
on to the next name that such logs use. What is torn is counted and left out: a line cut by another one, a
last line without its end. Not covered: two processes that wrote one file at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from ray_app.errors import RunDirError

LEVELS = ("DEBUG", "PROFILE", "USER_JUDGE", "INFO", "WARNING", "ERROR", "CRITICAL")
_HEAD = re.compile(
    rf"\[(?:{'|'.join(LEVELS)})\] (\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}}) (?=task=.*? thread=\S+ type=)"
)
_NAMES = (
    *("task", "thread", "type", "step", "eid", "model_name", "concurrency", "model", "backend", "error"),
    *("duration_ms", "duration_total_ms", "judge_ms", "tool", "search_backend", "search_local_hits"),
    *("search_tavily_hits", "query_llm_ms", "retrieval_ms", "retrieval_retries", "llm_ms", "exec_ms"),
    *(f"toolorchestra_vllm_{name}" for name in ("infer_ms", "prefill_ms", "decode_ms")),
    *(f"toolorchestra_vllm_{name}" for name in ("prefill_len", "decode_len")),
)
_NAME = re.compile(rf"(?:^| )({'|'.join(_NAMES)})=")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?![^\s])")
GLOBAL = "global"


@dataclass(frozen=True, slots=True)
class SeedLine:
    """One event; `at` is Unix seconds, `task` "" where no task was at work, `values` unread text."""

    at: float
    kind: str
    task: str
    eid: str
    step: int | None
    values: dict[str, str]

    def text(self, name: str) -> str:
        return self.values.get(name, "")

    def number(self, name: str) -> float | None:
        """The value as a number; None where it is not there or is none."""
        found = _NUMBER.match(self.values.get(name, ""))
        return float(found.group()) if found else None

    def count(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else int(value)

    def seconds(self, name: str) -> float | None:
        """A value in milliseconds, in seconds. None for one below zero, as a clock set back leaves it."""
        value = self.number(name)
        return None if value is None or value < 0 else value / 1000


@dataclass
class Reading:
    """The logs of a run, oldest first, and what of them could not be used; `lines` counts as it goes."""

    files: list[Path]
    torn: int = 0
    foreign: int = 0
    doubles: int = 0
    _known: set[int] = field(default_factory=set)

    def lines(self) -> Iterator[SeedLine]:
        """Every event, file after file. Lines that two files have, as after a copy, come once."""
        for path in self.files:
            with _opened(path) as file:
                for line in self._fresh(file):
                    yield from parse(line, self)

    def _fresh(self, lines: Iterable[str]) -> Iterator[str]:
        """The complete lines of a file that no file before it has."""
        own = set[int]()
        for line in lines:
            if not line.endswith("\n"):
                self.torn += 1
            elif hash(line) in self._known:
                self.doubles += 1
            else:
                if len(self.files) > 1:
                    own.add(hash(line))
                yield line[:-1]
        self._known |= own


def read_logs(place: Path, pattern: str = "hle*.log") -> Reading:
    """The log at `place`, or those that match in that folder, in the order of their first events.

    Raises RunDirError where there is none, or one that does not read.
    """
    files = sorted(place.glob(pattern)) if place.is_dir() else [place]
    if not files or not place.exists():
        raise RunDirError(f"no log at {place}: expected a log file, or a folder with {pattern}")
    return Reading(sorted(files, key=lambda path: (_began(path), path)))


def _began(path: Path) -> float:
    with _opened(path) as file:
        return next((event.at for line in file for event in parse(line, Reading([]))), 0.0)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield file
    except OSError as error:
        raise RunDirError(f"{path}: {error.strerror}; expected a readable log") from None


def parse(line: str, found: Reading) -> list[SeedLine]:
    """The events of a line: one, none, or the last of several where one was written into another."""
    heads = list(_HEAD.finditer(line))
    if not heads:
        found.foreign += bool(line.strip())
        return []
    # Of lines that ran into one another, only the last has its end.
    found.torn += len(heads) - 1 + (heads[0].start() > 0)
    event = _event(heads[-1].group(1), line[heads[-1].end() :])
    if event is None:
        found.torn += 1
        return []
    return [event]


def _event(stamp: str, text: str) -> SeedLine | None:
    marks = list(_NAME.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    values = {mark.group(1): text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}
    try:
        at = datetime.fromisoformat(stamp).timestamp()
        step = int(values["step"]) if "step" in values else None
        task, kind = values.pop("task"), values.pop("type").split()[0]
    except (ValueError, KeyError, IndexError, OverflowError):
        return None
    return SeedLine(at, kind, "" if task == GLOBAL else task, values.pop("eid", ""), step, values)
