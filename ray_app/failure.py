"""Why a service does not start, in one line: found in what Serve says and in the logs of its replicas.

Serve shows a traceback, and of an engine that runs in processes of its own only that it failed; what it died
of stands in the log of the process that held it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_CHARS = 400
# An error's last line in a traceback, behind whatever a logger put before it.
ERROR = re.compile(r"(?:^|[\s\]])(?P<what>(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit)): (?P<text>.+)")
# What stands for another error that was told of before, or elsewhere.
HOLLOW = ("engine core initialization failed", "see root cause", "worker failed with error", "raytaskerror")
PREFIX = re.compile(r"^(?:\([^)]*\) ?)?(?:[A-Z]+ [\d:. -]+ \[[^\]]*\] ?)?")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def root_cause(texts: Iterable[str]) -> str:
    """The last telling error of the first of `texts` that has one; else the end of the first."""
    kept = list(texts)
    found = next((error for text in kept if (error := last_error(text))), "")
    return found or (" ".join(kept[0].split())[-MAX_CHARS:] if kept else "")


def last_error(text: str) -> str:
    """The last error in a log or traceback that says what happened, in one line; "" where none does."""
    lines = ANSI.sub("", text).splitlines()
    for number in range(len(lines) - 1, -1, -1):
        found = ERROR.search(lines[number])
        if found is None or any(words in found[0].lower() for words in HOLLOW):
            continue
        error = f"{found['what'].rpartition('.')[2]}: {found['text']}"
        # Some errors say what is wrong in the lines below their first.
        more = [PREFIX.sub("", line) for line in lines[number + 1 : number + 4]]
        details = [
            line.strip() for line in more if line.startswith(" ") and not line.lstrip().startswith("File ")
        ]
        return " ".join(" ".join([error, *details]).split())[:MAX_CHARS]
    return ""
