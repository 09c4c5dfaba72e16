import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ray_app.errors import ConfigError
from ray_app.tokens import ModelTokens, WordTokens, counter, tail


@pytest.fixture
def byte_tokens(tmp_path: pytest.TempPathFactory) -> ModelTokens:
    """A tokenizer that cuts every non-ASCII character into several byte tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))  # type: ignore[operator]
    return ModelTokens(str(tmp_path))


def test_a_cut_never_corrupts_a_character_and_never_exceeds_the_limit(byte_tokens: ModelTokens) -> None:
    rng = random.Random(3)
    text = "".join(rng.choice("aé∑🙂 \n€x") for _ in range(200))
    total = byte_tokens.count(text)
    for limit in range(0, total + 5):
        kept = tail(text, limit, byte_tokens)
        assert text.endswith(kept)
        assert "\ufffd" not in kept
        assert byte_tokens.count(kept) <= limit
        # Token-exact: one more character in front would not have fitted.
        if kept != text:
            assert byte_tokens.count(text[len(text) - len(kept) - 1 :]) > limit


@pytest.mark.parametrize("limit", [0, -5])
def test_a_budget_that_is_used_up_keeps_nothing(limit: int) -> None:
    assert tail("some words here", limit, WordTokens()) == ""


def test_text_inside_the_budget_is_untouched() -> None:
    text = "  “quoted” text, with spaces  "
    assert tail(text, 100, WordTokens()) == text


def test_an_unknown_tokenizer_is_named(tmp_path: pytest.TempPathFactory) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="tokenizer"):
        counter(str(tmp_path))


def test_a_script_without_spaces_is_not_one_token() -> None:
    assert WordTokens().count("\u673a\u5668 learns, caf\u00e9 3\u00d74") == 8
