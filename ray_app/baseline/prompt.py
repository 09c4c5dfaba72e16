"""What a prompt shows: the question, its options, the documents, the outputs of programs.

Reads the text as a model would, by its labels (`Problem:`, `Doc 3:`, fenced blocks), so that reworded
instructions do no harm as long as the labels stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Role = Literal["agent", "user", "orchestrator", "judge", "reader", "query", "coder", "chat"]

LABEL = re.compile(r"^(?:Problem|Question): ", re.MULTILINE)
DOCUMENT = re.compile(r"^Doc \d+: ", re.MULTILINE)
OUTPUT = re.compile(r"^```output\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
CODE_START = re.compile(r"^```(?:python|output)?\n", re.MULTILINE)
OPTION = re.compile(r"^([A-Z])[.)] (.*)$", re.MULTILINE)
HEAD = re.compile(r"([A-Za-z_][\w.]*)(\(.*\)(?: -> .*)?)?$")
# What an instruction adds to the question's own paragraph when it asks for a confidence.
CONFIDENCE_REQUEST = re.compile(r"\s+[A-Z][^A-Z.?!]*<confidence>.*$", re.DOTALL)
NOT_STATED = re.compile(r"[^.?!\n]*`?not stated`?[^.?!\n]*[.?!]?", re.IGNORECASE)


class Document(NamedTuple):
    """One retrieved text. `name` and `signature` are empty where it does not start with a definition."""

    name: str
    signature: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.name}{self.signature}\n\n{self.body}"


class Question(NamedTuple):
    """`text` lacks the options and the permission to say `not stated`; those are fields."""

    text: str
    options: tuple[tuple[str, str], ...]
    may_be_absent: bool


class Shown(NamedTuple):
    """All that a prompt shows of one problem."""

    question: Question
    documents: tuple[Document, ...]
    outputs: tuple[str, ...]


def role_of(request: Mapping[str, Any]) -> Role:
    """Whose work the request asks for, read from its tools, its system text and its last paragraph."""
    user, system = text_of(request, "user"), text_of(request, "system")
    if "<scenario>" in system or "<policy>" in system:
        return "user" if "<scenario>" in system else "agent"
    if request.get("tools"):
        return "orchestrator"
    asked = user.rpartition("\n\n")[2]
    if "<correct>" in asked or '"correct"' in asked:
        return "judge"
    if "<answer>" in asked or "\\boxed" in asked or "\\boxed" in system:
        return "reader"
    if "<query>" in asked:
        return "query"
    return "coder" if "```python" in asked else "chat"


def text_of(request: Mapping[str, Any], role: str) -> str:
    """The text of the last message of `role`; image parts are not looked at."""
    for message in reversed(request.get("messages") or []):
        if message.get("role") == role:
            content = message.get("content") or ""
            return content if isinstance(content, str) else _text_parts(content)
    return ""


def _text_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(part.get("text") or "" for part in parts if part.get("type") == "text")


def read(prompt: str, *, has_instruction: bool = True) -> Shown:
    """`has_instruction`: the last paragraph tells what to do and is no part of the question."""
    label = _label(prompt)
    if label is None:
        return Shown(question(prompt), (), ())
    before, rest = prompt[: label.start()], prompt[label.end() :]
    context = before
    if not before.strip():  # the question first, then what was gathered
        start = re.search(r"^(?:Documents:|Doc \d+: |```)", rest, re.MULTILINE)
        context = rest[start.start() :] if start else ""
        rest = rest[: start.start()] if start else rest
        has_instruction = has_instruction and not start
    asked = rest.rpartition("\n\n")[0] if has_instruction and "\n\n" in rest else rest
    return Shown(question(asked), documents(context), tuple(OUTPUT.findall(context)))


def _label(prompt: str) -> re.Match[str] | None:
    """The first label when the prompt starts with it, else the last: documents may hold labels too."""
    found = list(LABEL.finditer(prompt))
    if not found:
        return None
    return found[0] if found[0].start() == 0 else found[-1]


def question(text: str) -> Question:
    text = CONFIDENCE_REQUEST.sub("", text).strip()
    options = tuple((letter, option.strip()) for letter, option in OPTION.findall(text))
    stem = OPTION.sub("", text).strip()
    plain = NOT_STATED.sub("", stem).strip()
    return Question(plain or stem, options if len(options) > 1 else (), plain != stem)


def documents(context: str) -> tuple[Document, ...]:
    """The `Doc n:` texts; the programs that follow the last one are not part of it."""
    texts = DOCUMENT.split(context)[1:]
    if texts:
        texts[-1] = CODE_START.split(texts[-1], maxsplit=1)[0]
    return tuple(_document(text.strip()) for text in texts)


def _document(text: str) -> Document:
    first, _, body = text.partition("\n\n")
    head = HEAD.match(" ".join(first.split()))
    return Document(head[1], head[2] or "", body) if head and body else Document("", "", text)
