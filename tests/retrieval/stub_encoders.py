"""Encoders for the workers of a build, which load them by name: `tests.retrieval.stub_encoders:NAME`."""

from __future__ import annotations

import os
import time

from ray_app.retrieval.encoder import FloatArray
from tests.retrieval.data import WordEncoder

HERE = "tests.retrieval.stub_encoders"
# In the texts that `fatal` and `failing` do not survive.
POISON = "volcano"


class _Stub(WordEncoder):
    def __init__(self, function: str) -> None:
        super().__init__()
        self.name = f"{HERE}:{function}"


class _Slow(_Stub):
    def encode_documents(self, texts: list[str]) -> FloatArray:
        time.sleep(0.1)
        return super().encode_documents(texts)


class _Fatal(_Stub):
    def encode_documents(self, texts: list[str]) -> FloatArray:
        if any(POISON in text for text in texts):
            os._exit(1)
        return super().encode_documents(texts)


class _Failing(_Stub):
    def encode_documents(self, texts: list[str]) -> FloatArray:
        if any(POISON in text for text in texts):
            raise MemoryError("no room for this text")
        return super().encode_documents(texts)


def plain() -> WordEncoder:
    return _Stub("plain")


def slow() -> WordEncoder:
    """Takes as long for a batch as a model does."""
    return _Slow("slow")


def fatal() -> WordEncoder:
    """Ends its process over some texts."""
    return _Fatal("fatal")


def failing() -> WordEncoder:
    return _Failing("failing")


def unloadable() -> WordEncoder:
    raise RuntimeError("this model is broken")


def misnamed() -> WordEncoder:
    return WordEncoder()
