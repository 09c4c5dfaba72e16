"""A Qwen3 of a few hundred thousand random weights with a tokenizer of ASCII characters, for the real engine.

It says nothing that means anything; what is forced by a schema is valid. Its tokenizer knows no control
characters, which would break JSON in mid-string. One token a character: budgets are easy to reckon with.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END, "<tool_call>", "</tool_call>"]
CONTEXT = 8192

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tiny_model(folder: Path) -> Path:
    """Writes checkpoint, tokenizer and chat template into `folder`; the same ones each time."""
    tokenizer = _tokenizer()
    torch.manual_seed(5)
    model = Qwen3ForCausalLM(  # type: ignore[no-untyped-call]
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
            pad_token_id=0,
        )
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The engine reads what ends a reply from here.
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids(END), "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *characters, "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m)."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL[:3])
    backend.add_tokens(SPECIAL[3:])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        eos_token=END,
        pad_token=SPECIAL[0],
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
