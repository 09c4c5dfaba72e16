"""Counting and cutting text in a model's own tokens.

Text is cut by character offsets and never decoded from token ids, so a cut cannot corrupt it.
`words` needs no files (a token is a run of word characters or one other character); anything else
is a `tokenizer.json`, a folder that holds one, or a hub id.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from ray_app.errors import ConfigError

WORD = re.compile(r"\w+|[^\w\s]")


class TokenCounter(Protocol):
    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character span (start, end) of every token, in order."""
        ...


class WordTokens:
    """Regular-expression tokens: an estimate where the model's tokenizer is not at hand."""

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in WORD.finditer(text)]


class ModelTokens:
    """A model's own tokenizer, through the `tokenizers` library."""

    def __init__(self, name: str) -> None:
        from tokenizers import Tokenizer  # optional at run time: `words` needs no tokenizer

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


@lru_cache(maxsize=32)
def counter(name: str) -> TokenCounter:
    """The counter called `name` in a model's config; loaded once per process."""
    return WordTokens() if name == "words" else ModelTokens(name)


def count(text: str, tokens: TokenCounter) -> int:
    return len(tokens.spans(text))


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
