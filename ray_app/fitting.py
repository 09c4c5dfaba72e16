"""What fits into a model's context: how much gathered text a prompt carries, how long the reply may be.

The context gives way first, then the reply, the question never. Sizes are the model's own tokens as we
count them; a chat template and an image take what only the endpoint knows, so they are constants here. Where
the endpoint refuses a prompt all the same, `shortened` says what to ask in its place. Pure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_app.config import ModelConfig
from ray_app.errors import ContextOverflow
from ray_app.records import Message
from ray_app.tokens import TokenCounter

# Marks of role and end that a chat template writes around a message: 4 to 7 tokens in Qwen's and Llama's.
MESSAGE_TOKENS = 8
# What a template says around the schemas of tools: about 130 tokens in Qwen3's.
TOOLS_TOKENS = 200
# An image in high detail takes 800 to 1,500 tokens at the usual services.
IMAGE_TOKENS = 1500
# A reply that may be no longer says nothing.
MIN_REPLY_TOKENS = 256
# `words` counts fewer tokens than a model does: so much of the context is used by that estimate.
ESTIMATED_SHARE = 0.75
# How often a prompt that the endpoint refuses is shortened and asked again.
MAX_SHORTENINGS = 4
# Tokens left free beside what the endpoint says, since a cut moves the borders of tokens.
SPARE_TOKENS = 16

_NUMBER = r"(\d[\d,]*)"
_LIMIT = re.compile(rf"(?:context|model) length\D{{0,20}}?{_NUMBER}|must be <= {_NUMBER}", re.IGNORECASE)
_PROMPT = re.compile(
    rf"(?<!at least ){_NUMBER} (?:`inputs`|input tokens|tokens in the messages|in the messages)"
    rf"|resulted in {_NUMBER} tokens|prompt \(length {_NUMBER}\)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Fit:
    """A call in tokens: what its prompt holds in any case, the context that it carries, the reply's limit."""

    fixed: int
    context: int
    reply: int


def size(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], tokens: TokenCounter) -> int:
    """Tokens of a prompt, chat template included."""
    text = sum(tokens.count(message.content) + MESSAGE_TOKENS for message in messages)
    text += sum(
        tokens.count(call.name + call.arguments) for message in messages for call in message.tool_calls
    )
    images = IMAGE_TOKENS * sum(len(message.images) for message in messages)
    schemas = TOOLS_TOKENS + tokens.count(json.dumps(list(tools))) if tools else 0
    return text + images + schemas


def fit(name: str, model: ModelConfig, wanted: Fit, tokens: TokenCounter, question: str = "") -> Fit:
    """`wanted`, cut to the context of the model called `name`.

    Raises ContextOverflow where not even the shortest reply has room beside the question. An estimate
    refuses no more than what it is sure of: the rest is for the endpoint to say.
    """
    length, share = model.context_length, ESTIMATED_SHARE if tokens.is_estimate else 1.0
    room = math.floor((length - wanted.reply) * share) - wanted.fixed
    if room >= 0:
        return replace(wanted, context=max(0, min(wanted.context, room)))
    least = min(MIN_REPLY_TOKENS, wanted.reply)
    if wanted.fixed + least > length:
        asked = f"a question of {tokens.count(question)} tokens" if question else "messages"
        raise ContextOverflow(
            f"model {name}: {asked} in a prompt of {wanted.fixed} leaves no room for a reply of {least} in "
            f"its context of {length} (models.{name}.context_length); a longer context is needed"
        )
    return Fit(wanted.fixed, 0, max(least, min(wanted.reply, length - math.ceil(wanted.fixed / share))))


def shortened(sent: Fit, message: str, number: int = 1) -> Fit | None:
    """What to send in place of `sent`, which the endpoint called too long; None where nothing can give way.

    `number` counts the shortenings of the call, this one included.

    By the numbers of its message where it names them, in the endpoint's tokens, which may be other than
    ours; else half of the context, and without one, half of the reply.
    """
    limit, prompt = _said(_LIMIT, message), _said(_PROMPT, message)
    over = prompt + sent.reply - limit if limit and prompt else 0
    if over <= 0:
        return _halved(sent)
    theirs = prompt / max(1, sent.fixed + sent.context)  # their tokens for one of ours
    # If that was not enough, a template that we do not see is why, and it does not shrink with the context.
    drop = math.ceil((over + SPARE_TOKENS) / (theirs if number == 1 else min(1.0, theirs)))
    if drop < sent.context:
        return replace(sent, context=sent.context - drop)
    reply = math.floor(limit - sent.fixed * theirs) - SPARE_TOKENS
    return _with_reply(replace(sent, context=0), min(sent.reply, reply))


def _halved(sent: Fit) -> Fit | None:
    if sent.context:
        return replace(sent, context=sent.context // 2)
    return _with_reply(sent, sent.reply // 2)


def _with_reply(sent: Fit, reply: int) -> Fit | None:
    return replace(sent, reply=reply) if reply >= min(MIN_REPLY_TOKENS, sent.reply) else None


def _said(pattern: re.Pattern[str], message: str) -> int:
    found = pattern.search(message)
    numbers = [text for text in found.groups() if text] if found else []
    return int(numbers[0].replace(",", "")) if numbers else 0
