"""Lines of the text logs of earlier systems (`hle.log`), as values.

A line is `[LEVEL] YYYY-MM-DD HH:MM:SS.mmm task=ID thread=N type=EVENT [step=N] [eid=N] name=value ...`, in
local time, written when the thing that it tells of had ended. Nothing is quoted or escaped, so a value goes
on to the next name that such logs use. What is torn is counted and left out: a line cut by another one, a
last line without its end. Not covered: two processes that wrote one file at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ray_app.errors import RunDirError

LEVELS = ("DEBUG", "PROFILE", "USER_JUDGE", "INFO", "WARNING", "ERROR", "CRITICAL")
_HEAD = re.compile(
    rf"\[(?:{'|'.join(LEVELS)})\] (\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}}) (?=task=.*? thread=\d+ type=)"
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
    """The lines of some logs by run segment, oldest segment first, and what could not be used."""

    segments: list[list[SeedLine]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    torn: int = 0
    foreign: int = 0
    doubles: int = 0


def read_logs(place: Path, pattern: str = "hle*.log") -> Reading:
    """All segments of the log at `place`, or of the logs that match in that folder.

    A segment begins with its `run_start`; lines before the first one are a segment of their own. Lines that
    are in two files, as after a copy, count once. Raises RunDirError where there is no log.
    """
    files = sorted(place.glob(pattern)) if place.is_dir() else [place]
    if not files or not place.exists():
        raise RunDirError(f"no log at {place}: expected a log file, or a folder with {pattern}")
    found = Reading(files=[path.name for path in files])
    known = None if len(files) == 1 else set[int]()
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                found.segments += _segments(_fresh(file, known, found), found)
        except OSError as error:
            raise RunDirError(f"{path}: {error.strerror}; expected a readable log") from None
    found.segments.sort(key=lambda segment: segment[0].at)
    return found


def _fresh(lines: Iterable[str], known: set[int] | None, found: Reading) -> Iterator[str]:
    """The complete lines of a file that no file before it has; `known` (by hash) grows by them."""
    own = set[int]()
    for line in lines:
        if not line.endswith("\n"):
            found.torn += 1
        elif known is not None and hash(line) in known:
            found.doubles += 1
        else:
            if known is not None:
                own.add(hash(line))
            yield line[:-1]
    if known is not None:
        known |= own


def _segments(lines: Iterable[str], found: Reading) -> list[list[SeedLine]]:
    segments: list[list[SeedLine]] = []
    for line in lines:
        for event in parse(line, found):
            if event.kind == "run_start" or not segments:
                segments.append([])
            segments[-1].append(event)
    return segments


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
