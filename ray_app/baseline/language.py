"""Words, weights and normal forms: the little linguistics that all rules share.

Pure functions of text. There is no dictionary of meanings: "strip" and "remove" are different words here,
and that is the baseline's most common mistake.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

TOKEN = re.compile(r"\w+|[^\w\s]")
WORD = re.compile(r"[A-Za-z]+|\d+(?:\.\d+)?")
STOP_WORDS = """
    a an the of in on at to for from by with and or not no is are was were be been being do does did has
    have had it its this that these those there which what who whom whose when where how why if then than as
    into out up can may might will would shall should must you your i me my we our they them their so such
    one any all some other each both between about after before only very just get gives give given called
    call make makes made use used uses using function method class module parameter argument returns return
    value say says said document documents state
"""
STOP = frozenset(STOP_WORDS.split())
NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
]


def count_tokens(text: str) -> int:
    """Tokens for the usage figures: runs of word characters, and every other visible character."""
    return len(TOKEN.findall(text))


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A crude stem, the same for a question's and a document's form of a word."""
    word = word.lower()
    for ending in ("ing", "ies", "ed", "es", "ly", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def content_words(text: str) -> list[str]:
    """Stems of the words that carry meaning, in order."""
    return [stem(word) for word in WORD.findall(text) if word.lower() not in STOP]


def weights(texts: Iterable[str]) -> dict[str, float]:
    """Inverse document frequency of each stem over `texts`; a word they lack is not in the result."""
    bags = [set(content_words(text)) for text in texts]
    seen = Counter(word for bag in bags for word in bag)
    return {word: math.log(1 + len(bags) / number) for word, number in seen.items()}


def coverage(wanted: Sequence[str], found: Iterable[str], weight: Mapping[str, float]) -> float:
    """The weighted share of the words `wanted` that are `found`, 0 to 1; unknown words weigh most."""
    top = max(weight.values(), default=1.0)
    words, have = set(wanted), set(found)
    total = sum(weight.get(word, top) for word in words)
    return sum(weight.get(word, top) for word in words & have) / total if total else 0.0


def sentences(text: str) -> list[str]:
    """The text's sentences and list lines, each on one line."""
    pieces = re.split(r"(?<=[.!?])\s+(?=[A-Z'\"*`(])|\n\s*\n|\n(?=\s*(?:[-*>]|\w+\s{2,}|\w+:\s))|::\s", text)
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def normal(text: str) -> list[str]:
    """The words of an answer without case, quotes, articles and punctuation; number words as digits."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower()).replace(",", " ")
    words = re.findall(r"[a-z0-9_.+-]*[a-z0-9_]|[^\w\s'\"`()]", text)
    plain = [word.strip(".") or word for word in words if word not in {"a", "an", "the", "."}]
    return [str(NUMBERS.index(word)) if word in NUMBERS else word for word in plain]
