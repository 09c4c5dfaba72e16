"""A chat completion, put together from its chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_app.records import ToolCall, Usage


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer that is complete. `model` is what the endpoint calls itself, "" where it does not."""

    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    model: str
    thought_chars: int = 0  # of reasoning that was sent


class Completion:
    """What has come of one answer. Chunks that are no chat chunks raise TypeError, KeyError or ValueError."""

    __slots__ = ("_calls", "_content", "_thought_chars", "_usage", "finish_reason", "has_choice", "model")

    def __init__(self) -> None:
        self._content: list[str] = []
        self._calls: dict[Any, dict[str, str]] = {}
        self._usage: Mapping[str, Any] | None = None
        self._thought_chars = 0
        self.finish_reason = ""
        self.has_choice = False
        self.model = ""

    def add(self, chunk: Mapping[str, Any]) -> bool:
        """Take in one chunk. Returns whether it carries a token: content, reasoning or a tool call."""
        self.model = chunk.get("model") or self.model
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices")
        if not choices:
            return False
        choice = choices[0]
        self.has_choice = True
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        # A server that ignores `stream` sends the whole message.
        delta = choice.get("delta") or choice.get("message")
        if not delta:
            return False
        content, calls = delta.get("content"), delta.get("tool_calls")
        if content:
            self._content.append(content)
        if calls:
            self._merge(calls)
        # What a model thinks is no part of its answer; its tokens are in the usage, where there is one.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            self._thought_chars += len(thought)
        return bool(content or calls or thought)

    def _merge(self, parts: Iterable[Mapping[str, Any]]) -> None:
        """Add fragments of tool calls. Without an index, an id begins a call; else the last goes on."""
        for part in parts:
            index = part.get("index")
            if index is None:
                index = len(self._calls) if part.get("id") or not self._calls else len(self._calls) - 1
            call = self._calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
            call["id"] += part.get("id") or ""
            function = part.get("function") or {}
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""

    def whole(self) -> Whole:
        """What has come, put together."""
        calls = (call for _, call in sorted(self._calls.items()))
        tools = (ToolCall(call["id"], call["name"], _paired(call["arguments"])) for call in calls)
        content = _paired("".join(self._content))
        usage = _usage(self._usage or {})
        return Whole(content, tuple(tools), self.finish_reason, usage, self.model, self._thought_chars)


def _usage(counted: Mapping[str, Any]) -> Usage:
    prompt = counted.get("prompt_tokens_details") or {}
    completion = counted.get("completion_tokens_details") or {}
    return Usage(
        int(counted.get("prompt_tokens") or 0),
        int(counted.get("completion_tokens") or 0),
        int(prompt.get("cached_tokens") or 0),
        int(completion.get("reasoning_tokens") or 0),
    )


def _paired(text: str) -> str:
    """`text` with the halves of characters joined that a server sent as escapes in two chunks."""
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
