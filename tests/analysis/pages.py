"""Runs whose texts would harm a page that is careless, and what a written page holds."""

from __future__ import annotations

import codecs
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

from analysis.page_parts import Packing, unpacked
from ray_app.event_writer import EventWriter
from ray_app.journal import CHAT, CODE, RETRIEVAL
from ray_app.records import ChatReply, ExecutionResult, Hit, Retrieval, ToolCall, Usage
from tests.analysis.runs import Teller, run_start

HARM = (
    '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">\' " &amp; \u202e\u2028'
)
HARMED_ID = f"odd/{HARM}"
SECRET = "the sphinx of black quartz"
TEXTS = (SECRET, "window.pwned", "judge my vow", "pack my box", "five dozen jugs", "liquor", "went wrong")
TASKS, NOISE_CHARS = 40, 3000


def write_hostile(run_dir: Path, **facts: Any) -> Path:
    """TASKS tasks; texts, ids, names and errors of the first hold HARM. SECRET is its question."""
    log = EventWriter(run_dir, "w")
    log.append(run_start(TASKS, **facts))
    _first(Teller(log, HARMED_ID))
    for number in range(1, TASKS):
        _other(Teller(log, f"task-{number:02d}"), number)
    log.close()
    return run_dir


def _first(tell: Teller) -> None:
    tell.note("attempt", 0)
    chose = ChatReply(HARM, (ToolCall("c", "search", json.dumps({"model": HARM})),), model=f"orch {HARM}")
    tell.call(CHAT, chose, 1, turn=0, role="orchestrator", duration_s=1.0, queue_s=0.25)
    asked = ChatReply(
        f"{HARM} {'long ' * 600} <query>pack my box {HARM}</query>", model="gpt", usage=Usage(120, 34)
    )
    tell.call(
        CHAT,
        asked,
        2,
        turn=0,
        role="expert",
        tool="search",
        alias=f"search-1 {HARM}",
        endpoint=f"http://e/{HARM}",
    )
    hits = (Hit(7, f"five dozen jugs {HARM}", 0.75), Hit(8, "liquor", 0.5))
    tell.call(
        RETRIEVAL, Retrieval(hits, web_error=f"went wrong {HARM}"), 3, turn=0, tool="search", duration_s=0.5
    )
    tell.note("turn", 1, turn=0, duration_s=2.5)
    ran = ExecutionResult(HARM, "judge my vow", 1, False, 0.1)
    tell.call(CODE, ran, 4, turn=1, tool="enhance_reasoning", duration_s=0.1)
    tell.note("turn", 4, turn=1, status="invalid", error=f"went wrong {HARM}")
    tell.result(
        5, f"pack my box {HARM}", "ok", True, turn=2, verdict_method="judge", confidence=0.5, cost_usd=0.5
    )


def _other(tell: Teller, number: int) -> None:
    tell.note("attempt", 10 * number)
    reply = ChatReply(f"number {number} says needle-{number:02d}", model="gpt" if number % 2 else "qwen")
    tell.call(CHAT, reply, 10 * number + 1, turn=0, role="orchestrator", duration_s=0.5)
    tell.note("turn", 10 * number + 1, turn=0, duration_s=0.5)
    if number == 5:  # tried again where the clock is behind
        again: dict[str, Any] = {"epoch": 2, "attempt": 2}
        tell.note("attempt", 10 * number - 3, **again)
        tell.note("turn", 10 * number - 2, turn=0, duration_s=0.25, **again)
    outcome = "limited" if number % 10 == 0 else "ok"
    tell.result(
        10 * number + 2,
        str(number),
        outcome,
        number % 3 == 0,
        turn=1,
        duration_s=float(number),
        cost_usd=0.01 * (TASKS - number),
    )


def write_noise(run_dir: Path, tasks: int) -> Path:
    """A reply and a document of NOISE_CHARS a task, which hardly pack."""
    log, noise = EventWriter(run_dir, "w"), random.Random(1)
    for number in range(tasks):
        tell = Teller(log, f"task-{number:02d}")
        tell.note("attempt", number)
        reply = ChatReply(noise.randbytes(NOISE_CHARS // 2).hex(), usage=Usage(number, 1))
        tell.call(CHAT, reply, number, turn=0, role="expert", tool="search")
        found = Retrieval((Hit(number, noise.randbytes(NOISE_CHARS // 2).hex(), 0.5),))
        tell.call(RETRIEVAL, found, number + 1, turn=0, tool="search")
    log.close()
    return run_dir


def with_questions(run_dir: Path, dataset: Path) -> None:
    """A dataset of one question, SECRET, as `run_dir` records it."""
    row = {"id": HARMED_ID, "question": f"{SECRET} {HARM}", "answer": "five", "rationale": "because"}
    dataset.write_text(json.dumps(row) + "\n")
    digest = hashlib.sha256(dataset.read_bytes()).hexdigest()
    (run_dir / "provenance.json").write_text(json.dumps({"dataset_sha256": digest}))


def markup_of(page: Path) -> str:
    body = page.read_bytes()
    return body.decode("utf-16" if body.startswith(codecs.BOM_UTF16) else "utf-8")


def packing_of(markup: str) -> Packing:
    return "lzma" if '"packing":"lzma"' in markup else "deflate"


def contents(page: Path) -> tuple[str, list[str]]:
    """The markup of a page as it stands, and everything that is packed in it."""
    markup = markup_of(page)
    packed = re.findall(r'<script type="text/plain" id="[a-z]+-\d+">([^<]*)</script>', markup)
    return markup, [unpacked(body, packing_of(markup)) for body in packed]
