"""What a call took, where the endpoint does not say: counted here, so that a limit of spending holds.

The prompt as `fitting.size` counts it, and every word that came back, in the model's own tokens where its
config names a tokenizer, else in `words`. Nothing tells what was cached or thought in secret: the former
counts at the full price, the latter not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_app import fitting
from ray_app.completion import Whole
from ray_app.records import Message, Usage
from ray_app.tokens import TokenCounter

# Of thoughts only the length is kept. Measured on English prose: 4 to 5 characters a token.
CHARS_PER_TOKEN = 4


def usage(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], answer: Whole, tokens: TokenCounter
) -> Usage:
    """Tokens of the call that `answer` came from, marked as estimated."""
    thought = -(-answer.thought_chars // CHARS_PER_TOKEN)
    said = tokens.count(answer.content) + thought
    said += sum(tokens.count(call.name + call.arguments) for call in answer.tool_calls)
    return Usage(fitting.size(messages, tools, tokens), said, reasoning_tokens=thought, is_estimated=True)
