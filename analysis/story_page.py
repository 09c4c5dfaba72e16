"""A task's story as lines for a terminal; texts are cut to their beginning unless asked for whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from analysis.story import Attempt, Piece, Step, Story, Turn, told_once
from analysis.text import number, plain, usd

CUT_LINES, CUT_CHARS = 6, 600
SHOWN_HITS = 5
_MARGIN = " " * 13
_FACTS = ("exit_status", "verdict_method", "confidence")


def story_lines(story: Story, *, whole: bool = False) -> Iterator[Text]:
    """The story, line by line; `whole` gives every text to its end."""
    kinds = ", ".join(plain(name) for name in (story.category, story.answer_type) if name)
    yield Text(f"{plain(story.task_id, 200)}   {kinds}   rollout {story.rollout_key[:12]}", style="bold")
    for attempt in story.attempts:
        yield Text("")
        yield Text(_attempt_line(attempt), style="bold")
        for turn in attempt.turns:
            yield from _turn_lines(turn, whole)


def _attempt_line(attempt: Attempt) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.t_start))
    where = f", worker {plain(attempt.worker)}" if attempt.worker else ""
    return f"trial {attempt.trial}, attempt {attempt.attempt}, epoch {attempt.epoch}: {began}{where}"


def _turn_lines(turn: Turn, whole: bool) -> Iterator[Text]:
    steps = list(turn.steps)
    heading = next((step for step in steps if step.kind == "turn"), None)
    if turn.number >= 0:
        yield Text(f" turn {turn.number}{_turn_words(heading)}", style="red" if _is_bad(heading) else "bold")
    for step in steps:
        if step is not heading and step.kind != "attempt":
            yield Text(_step_line(step), style="red" if _is_bad(step) else "dim" if step.is_replayed else "")
            yield from _step_texts(step, whole)


def _turn_words(heading: Step | None) -> str:
    if heading is None:
        return "   (no end in the log)"
    words = f"   {_seconds(heading.duration_s)}"
    if heading.is_replayed:
        words += "   served again from the record of an earlier attempt"
    return words + (f"   INVALID: {plain(heading.error, 300)}" if heading.status == "invalid" else "")


def _is_bad(step: Step | None) -> bool:
    return step is not None and step.status != "ok"


def _step_line(step: Step) -> str:
    parts = [_what(step), f"{_seconds(step.duration_s)}{_stages(step)}", _tokens(step), _hits(step)]
    parts += [usd(step.facts["cost_usd"])] if step.facts.get("cost_usd") else []
    parts += [f"{step.retries} retries"] if step.retries else []
    parts += [f"{name.replace('_', ' ')} {_value(step.facts[name])}" for name in _FACTS if name in step.facts]
    parts += [_ending(step)] if step.kind in ("result", "verdict") else []
    parts += ["replayed"] if step.is_replayed else []
    return f"{f'+{step.at_s:.2f} s':>11}  " + "   ".join(part for part in parts if part)


def _what(step: Step) -> str:
    name = step.role or (step.tool if step.kind == "tool_call" else step.kind)
    if step.kind == "verdict" and step.role == "judge":
        return f"second opinion {plain(step.alias)} by {plain(step.model)}"
    words = [name, step.alias if step.kind == "tool_call" else "", plain(step.model)]
    where = f"at {plain(step.endpoint)}" if step.endpoint else ""
    return " ".join(word for word in (*words, where) if word)


def _stages(step: Step) -> str:
    parts = [
        f"{name} {_seconds(step.facts[f'{name}_s'])}"
        for name in ("queue", "prefill", "decode")
        if f"{name}_s" in step.facts
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _tokens(step: Step) -> str:
    asked, given = step.facts.get("prompt_tokens"), step.facts.get("completion_tokens")
    if asked is None and given is None:
        return ""
    cached = f" ({number(step.facts['cached_tokens'])} cached)" if step.facts.get("cached_tokens") else ""
    return f"{number(asked)}{cached} + {number(given)} tokens"


def _hits(step: Step) -> str:
    if "local_hits" not in step.facts:
        return ""
    web = step.facts.get("web_hits", 0)
    return f"{step.facts['local_hits']} local and {web} web hits ({step.facts.get('search_backend', '')})"


def _seconds(value: float) -> str:
    """To the millisecond: what is below is the clock's own."""
    return f"{number(round(value, 3))} s"


def _ending(step: Step) -> str:
    right = {True: "right", False: "wrong", None: ""}[step.facts.get("is_correct")]
    return " ".join(word for word in (str(step.facts.get("outcome", "")), right) if word)


def _value(value: Any) -> str:
    return plain(value, 120) if isinstance(value, str) else number(value)


def _step_texts(step: Step, whole: bool) -> Iterator[Text]:
    if step.error:
        kind = f"{step.error_kind}: " if step.error_kind else ""
        yield Text(f"{_MARGIN}{kind}{plain(step.error, 2000 if whole else 300)}", style="red")
    if step.kind == "retrieval" and step.facts.get("detail"):
        yield Text(f"{_MARGIN}web: {plain(step.facts['detail'], 300)}", style="red")
    shown = list(step.pieces) if whole else told_once(step.pieces)
    hits = [piece for piece in shown if piece.name.startswith("hit ")]
    left_out = [] if whole else hits[SHOWN_HITS:]
    for piece in shown:
        if piece not in left_out:
            yield Text(_piece(piece, whole))
    if left_out:
        yield Text(f"{_MARGIN}and {len(left_out)} more hits")


def _piece(piece: Piece, whole: bool) -> str:
    text = piece.text.strip()
    lines = text.splitlines()
    if not whole:
        lines = text[:CUT_CHARS].splitlines()[: 1 if piece.name.startswith("hit ") else CUT_LINES]
        if (shown := sum(map(len, lines)) + len(lines) - 1) < len(text) and lines:
            lines[-1] += f" ... ({len(text) - shown:,} more characters)"
    printable = [plain(line, len(line) + 1) for line in lines] or [""]
    if len(printable) == 1:
        return f"{_MARGIN}{piece.name}: {printable[0]}"
    return "\n".join([f"{_MARGIN}{piece.name}:", *(f"{_MARGIN}  {line}" for line in printable)])
