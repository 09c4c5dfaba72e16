"""Counting and cutting text in a model's own tokens.

Text is cut by character offsets and never decoded from token ids, so a cut cannot corrupt it. `words` needs
no files (a token is a run of word characters, one character of Chinese, Japanese or Korean, or one other
character) and is an estimate; anything else is a `tokenizer.json`, a folder that holds one, or a hub id.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path

from ray_app.errors import ConfigError

# Measured on prose, code, Markdown and LaTeX: 0.90 to 1.05 of what o200k counts.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]|[^\w\s]")
# Counts that a counter remembers, about 200 bytes each: what a process's tasks have in their prompts.
REMEMBERED = 50_000


class TokenCounter(ABC):
    """Tokens of one kind. Counts are remembered by text: a task's documents stand in each of its prompts."""

    is_estimate = False

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], int] = {}  # the least recently used first

    @abstractmethod
    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character span (start, end) of every token, in order."""

    def count(self, text: str) -> int:
        """How many tokens `text` has."""
        key = (hash(text), len(text))
        known = self._counts.pop(key, None)
        if known is None:
            known = self._measure(text)
            if len(self._counts) >= REMEMBERED:
                del self._counts[next(iter(self._counts))]
        self._counts[key] = known
        return known

    def _measure(self, text: str) -> int:
        return len(self.spans(text))


class WordTokens(TokenCounter):
    """Regular-expression tokens: an estimate where the model's tokenizer is not at hand."""

    is_estimate = True

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in WORD.finditer(text)]

    def _measure(self, text: str) -> int:
        return len(WORD.findall(text))


class ModelTokens(TokenCounter):
    """A model's own tokenizer, through the `tokenizers` library."""

    def __init__(self, name: str) -> None:
        from tokenizers import Tokenizer  # optional at run time: `words` needs no tokenizer

        super().__init__()
        path = Path(name)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._tokenizer = (
                Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
            )
        except Exception as error:
            raise ConfigError(
                f"tokenizer {name!r}: no tokenizer.json there and no such hub id ({error}); "
                "use `words`, a file or a folder"
            ) from None

        # A tokenizer file may cut and pad by itself, which would make every count wrong.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def spans(self, text: str) -> list[tuple[int, int]]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def _measure(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=32)
def counter(name: str) -> TokenCounter:
    """The counter called `name` in a model's config; loaded once per process."""
    return WordTokens() if name == "words" else ModelTokens(name)


def tail(text: str, limit: int, tokens: TokenCounter) -> str:
    """The longest end of `text` with at most `limit` tokens; empty when `limit` is not positive."""
    if limit <= 0:
        return ""
    spans = tokens.spans(text)
    first = len(spans) - limit
    if first <= 0:
        return text
    # A character can be several byte tokens with one span: start after it rather than inside it.
    while first < len(spans) and spans[first][0] < spans[first - 1][1]:
        first += 1
    return text[spans[first][0] :] if first < len(spans) else ""
