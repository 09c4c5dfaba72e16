from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_app.errors import ConfigError
from ray_app.retrieval.encoder import Encoder, FloatArray, load_encoder, prompts_of

TEXTS = ["How is a list sorted in place?", "A glacier.", "Sort a list, keeping the order of equal elements."]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("minilm", threads=2)


def encode(encoder: Encoder, *texts: str) -> FloatArray:
    return encoder.encode(encoder.tokenize(list(texts)))


def test_vectors_are_unit_float32_rows_in_the_order_of_the_texts(encoder: Encoder) -> None:
    vectors = encode(encoder, *TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, encoder.dim) == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.2
    alone = np.concatenate([encode(encoder, text) for text in TEXTS])
    assert vectors == pytest.approx(alone, abs=1e-5)


def test_no_texts_give_no_vectors(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


def test_tokens_rise_with_the_text_up_to_the_models_limit(encoder: Encoder) -> None:
    tokens = encoder.tokenize(["cat", "cat " * 10, "cat " * 200_000])
    assert [len(each) for each in tokens] == [3, 12, 256]


def test_text_beyond_the_limit_changes_nothing(encoder: Encoder) -> None:
    cut, longer = encode(encoder, "cat " * 5000, "cat " * 200_000)
    assert cut == pytest.approx(longer, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "query", "document"),
    [
        ("minilm", "", ""),
        ("Qwen/Qwen3-Embedding-0.6B", "Instruct: ", ""),
        ("intfloat/multilingual-e5-large", "query: ", "passage: "),
        ("/models/e5-base-v2/", "query: ", "passage: "),
        ("BAAI/bge-small-en-v1.5", "Represent this sentence", ""),
        ("BAAI/bge-m3", "", ""),
        ("somebody/other-model", "ask: ", "text: "),
    ],
)
def test_each_family_gets_its_prompts_and_others_their_own(name: str, query: str, document: str) -> None:
    own = {"query": "ask: ", "document": "text: "} if name == "somebody/other-model" else {}
    prompts = prompts_of(name, own)
    assert prompts.query.startswith(query)
    assert bool(prompts.query) == bool(query)
    assert prompts.document == document


def test_a_models_own_prompts_come_before_its_familys() -> None:
    own = {"query": "Instruct: find passages\nQuery: "}
    assert prompts_of("intfloat/multilingual-e5-large-instruct", own) == (own["query"], "")


def test_a_folder_without_a_model_is_one_line_of_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 'minilm', a model folder or a hub id") as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)
