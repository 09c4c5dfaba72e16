"""The query writer: the question's names and rarer words, in their order."""

from __future__ import annotations

import re

from ray_app.baseline.language import STOP

MAX_WORDS = 24
MIN_CHARS = 8  # shorter key words say too little to search for; the question goes whole


def write(question: str) -> str:
    """Key words for a search: everything in backticks, and the words that carry meaning."""
    words = re.findall(r"[A-Za-z_][\w.]*\w|\d+", question)
    kept = [word for word in words if "." in word or "_" in word or word.lower() not in STOP]
    written = " ".join(dict.fromkeys(kept[:MAX_WORDS]))
    return written if len(written) >= MIN_CHARS else " ".join(question.split())
