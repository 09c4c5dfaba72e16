"""Reading a model's reply: tags, boxes and code fences, tolerant of what models really write.

Pure functions of text. Each returns "" when there is nothing to find.
"""

from __future__ import annotations

import json
import re
from typing import Any

PYTHON_FENCE = re.compile(r"```[ \t]*(?:python3?|py)[ \t]*\r?\n(.*?)(?:```|\Z)", re.IGNORECASE | re.DOTALL)
ANY_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.IGNORECASE | re.DOTALL)
# A reply without the asked tags is still an answer when it is nothing but an answer.
BARE_ANSWER_WORDS = 20


def tagged(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>`, also when it is never closed; None without the tag."""
    openings = list(re.finditer(rf"<{tag}>", text, re.IGNORECASE))
    if not openings:
        return None
    rest = text[openings[-1].end() :]
    return re.split(rf"</{tag}>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip()


def without_thinking(text: str) -> str:
    """The reply less its `<think>` part; a stray `</think>` ends thinking that began in the prompt."""
    return THINKING.sub("", text).rpartition("</think>")[2].strip()


def boxed(text: str) -> str:
    r"""What stands in the last `\boxed{}`, with its braces balanced; "" if it is never closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    begin, depth = start + len("\\boxed{"), 1
    for position in range(begin, len(text)):
        character = text[position]
        if text[position - 1] == "\\" and text[position - 2] != "\\":
            continue  # an escaped brace is a printed character
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[begin:position].strip()
    return ""


def answer(text: str) -> str:
    """The final answer: `<answer>`, else a box, else a reply so short that it can be nothing else."""
    spoken = without_thinking(text)
    found = tagged(spoken, "answer")
    if found is not None:
        return found
    in_box = boxed(spoken)
    if in_box:
        return in_box
    return spoken if len(spoken.split()) <= BARE_ANSWER_WORDS else ""


def program(text: str) -> str:
    """The last fenced Python program; without a Python fence, the last fenced block of any kind."""
    spoken = without_thinking(text) or text
    blocks = PYTHON_FENCE.findall(spoken) or ANY_FENCE.findall(spoken)
    return blocks[-1].strip() if blocks else ""


def json_object(text: str) -> dict[str, Any] | None:
    """The last complete JSON object in the text, or None."""
    decoder, found, position = json.JSONDecoder(), None, text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError:
            end = position + 1
        else:
            found = value if isinstance(value, dict) else found
        position = text.find("{", end)
    return found
