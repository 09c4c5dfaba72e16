"""Documents as question templates see them, and the few questions that templates ask about them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PARAMETER = re.compile(r"(\w+)(?:: [^=,()]+)? ?= ?('[^']*'|-?\d+(?:\.\d+)?|None|True|False)(?=[,)])")
# How summaries that say what a function does begin.
VERBS = """
    Add Adjust Append Assert Attach Block Build Call Change Check Clear Close Compare Compute Convert Copy
    Count Create Decode Delete Determine Discard Divide Encode Ensure Execute Extend Extract Find Flush
    Format Generate Get Handle Insert Iterate Join List Load Look Make Map Mark Match Move Open Parse Pop
    Print Push Put Raise Read Register Release Remove Rename Replace Return Round Run Search Send Set Shut
    Sort Split Start Stop Strip Test Transform Update Wait Wrap Write
"""


class Passage(NamedTuple):
    """A document as the templates see it: `defaults` maps parameter to the source text of its default."""

    name: str
    content: str
    summary: str
    parameters: tuple[str, ...]
    defaults: dict[str, str]


class Draft(NamedTuple):
    """A question before it has an id. `withheld` names the documents that must stay out of its scope."""

    question: str
    answer: str
    sources: tuple[str, ...]
    withheld: tuple[str, ...] = ()


class NumberDefault(NamedTuple):
    """A parameter whose default is a positive whole number."""

    name: str
    parameter: str
    value: int


def passage_of(row: Mapping[str, Any]) -> Passage:
    head, _, body = row["content"].partition("\n\n")
    signature = head[len(row["name"]) :]
    names = re.findall(r"(?<=[(, *])([a-z]\w*)(?=[=,:)])", signature)
    parameters = tuple(name for name in names if name not in ("self", "cls", "type"))
    defaults = {key: value for key, value in PARAMETER.findall(signature) if value not in ("None", "''")}
    summary = re.split(r"(?<=[a-z)'])\.(?:\s|$)|\n\n", body)[0]
    return Passage(row["name"], row["content"], " ".join(summary.split()).rstrip("."), parameters, defaults)


def doing(passage: Passage) -> str | None:
    """The summary as a verb phrase in the third person, or None when it does not start with a verb."""
    match = re.match(r"(?:This (?:method|function) )?([A-Z][a-z]+?)(s?) (?=[a-z])", passage.summary)
    last = passage.name.rsplit(".", 1)[-1].lower()
    if not match or match[1] not in VERBS.split() or not 25 < len(passage.summary) < 130:
        return None
    verb = match[1].lower()
    phrase = f"{verb}{'es' if verb.endswith(('s', 'sh', 'ch')) else 's'} {passage.summary[match.end() :]}"
    return None if len(last) > 3 and last in phrase.lower() else phrase


def number_default(rng: random.Random, passages: Sequence[Passage]) -> NumberDefault:
    while True:
        passage = rng.choice(passages)
        whole = {key: value for key, value in passage.defaults.items() if value.isdigit() and value != "0"}
        if whole:
            key = rng.choice(sorted(whole))
            return NumberDefault(passage.name, key, int(whole[key]))


def siblings(passage: Passage, passages: Sequence[Passage]) -> list[Passage]:
    """The other passages of the same class or module."""
    home = passage.name.rpartition(".")[0]
    return [p for p in passages if p.name.rpartition(".")[0] == home and p.name != passage.name]


def is_unique(passage: Passage, passages: Sequence[Passage]) -> bool:
    return sum(other.summary == passage.summary for other in passages) == 1
