"""An encoder for a replica, which waits where a test tells it to: by files, from another process."""

from __future__ import annotations

import time
from pathlib import Path

from ray_app.retrieval.encoder import FloatArray, Tokens
from tests.retrieval.data import WordEncoder

OPENED_S = 30.0


class GatedEncoder(WordEncoder):
    """A query "gate PATH" makes the file PATH.entered and is encoded once the file PATH is there."""

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        return [[ord(character) for character in text] for text in texts]

    def encode(self, queries: list[Tokens]) -> FloatArray:
        texts = ["".join(map(chr, tokens)) for tokens in queries]
        for text in texts:
            if text.startswith("gate "):
                _wait_at(Path(text.removeprefix("gate ")))
            if text == "broken":
                raise ValueError("this encoder is broken")
        return super().encode([self._tokens(text) for text in texts])


def _wait_at(gate: Path) -> None:
    gate.with_suffix(".entered").touch()
    deadline = time.monotonic() + OPENED_S
    while not gate.exists():
        assert time.monotonic() < deadline, f"nobody opened {gate}"
        time.sleep(0.005)
