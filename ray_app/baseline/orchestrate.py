"""The orchestrator: look first, compute where the question asks for it, then answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ray_app.baseline import coder
from ray_app.baseline.prompt import NOT_STATED

SHORT_QUESTION_WORDS = 25
PRICE = re.compile(r"\$([\d.]+) out")


class Call(NamedTuple):
    tool: str
    alias: str


def choose(prompt: str, tools: Sequence[Mapping[str, Any]]) -> Call | None:
    """The tool for the next turn and the alias that does it; None when no tool fits the schema."""
    offered = {tool["function"]["name"]: tool["function"] for tool in tools}
    asked, gathered = _split(prompt)
    for name in (_wanted(asked, gathered, offered), "answer", *offered):
        if name in offered:
            return Call(name, _alias(offered[name], asked))
    return None


def _wanted(asked: str, gathered: str, offered: Mapping[str, Any]) -> str:
    has_documents = "Doc 1: " in gathered or "Documents:" in gathered
    has_output = "```output" in gathered
    told = gathered.rpartition("```")[2]
    # A search that has just failed would fail again: the question is the same.
    has_failed = re.search(r"\bsearch (?:found|with)\b", told) is not None
    if not has_documents and not has_output and "search" in offered and not has_failed:
        return "search"
    was_refused = "enhance_reasoning" in told
    if coder.is_computational(asked) and not has_output and not was_refused:
        return "enhance_reasoning"
    return "answer"


def _split(prompt: str) -> tuple[str, str]:
    """The question, and all that stands after it."""
    text = prompt.partition("Problem: ")[2] or prompt
    parts = re.split(r"^(?=Documents:|```)", text, maxsplit=1, flags=re.MULTILINE)
    if len(parts) == 2:
        return NOT_STATED.sub("", parts[0]), parts[1]
    asked, _, rest = text.partition("\n\n")
    return NOT_STATED.sub("", asked), rest


def _alias(function: Mapping[str, Any], asked: str) -> str:
    """The first alias; for short questions without a computation the cheapest that states a price."""
    model = function["parameters"]["properties"]["model"]
    aliases: list[str] = model.get("enum") or [""]
    prices = {alias: _price(alias, model.get("description") or "") for alias in aliases}
    priced = [alias for alias in aliases if prices[alias] is not None]
    is_easy = len(asked.split()) < SHORT_QUESTION_WORDS and not coder.is_computational(asked)
    return min(priced, key=lambda alias: prices[alias] or 0.0) if is_easy and priced else aliases[0]


def _price(alias: str, description: str) -> float | None:
    start = description.find(f"{alias}: ")
    found = PRICE.search(description, start) if start >= 0 else None
    return float(found[1].rstrip(".")) if found else None
