"""The replies of a recorded run, found by what is asked.

Equal requests may have had several replies: they come in their recorded order, those of one session (the
rollout key of a task) to that session, and after the last the first again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray_app.chat import ChatRequest
from ray_app.config import RunConfig, Sampling
from ray_app.journal import CHAT, RETRIEVAL, RecordedCall, request_digest
from ray_app.recording import Recording
from ray_app.records import Message
from ray_app.tools.base import what_is_asked

ANY = ""  # in place of a session: whoever asks


@dataclass
class Replies:
    """All calls of the counted results of a run, in memory; each `take` moves on to the next one."""

    config: RunConfig
    tasks: Mapping[str, str]  # rollout key -> task id
    calls: Mapping[tuple[str, str], Sequence[RecordedCall]]  # by digest and session
    _taken: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def of(cls, recording: Recording, config: RunConfig) -> Replies:
        """Reads the whole record. Raises StorageError."""
        found: dict[tuple[str, str], list[RecordedCall]] = {}
        records = recording.records(recording.results)
        for key in sorted(recording.results, key=lambda key: (key[1], recording.results[key]["task_id"])):
            # As a replay sees them: of a call that was made twice, the last.
            known = {(call.call_seq, call.request_hash): call for call in records[key].calls}
            for call in known.values():
                if call.error is None or not call.error.is_cancelled:
                    found.setdefault((call.request_hash, key[0]), []).append(call)
                    found.setdefault((call.request_hash, ANY), []).append(call)
        tasks = {key[0]: row["task_id"] for key, row in recording.results.items()}
        return cls(config, tasks, found)

    def chat(self, request: ChatRequest) -> RecordedCall | None:
        return self._take(request_digest(CHAT, what_is_asked(request)), request.session)

    def retrieval(self, query: str, scope_id: str | None, top_k: int) -> RecordedCall | None:
        return self._take(request_digest(RETRIEVAL, [query, scope_id, top_k]), ANY)

    def _take(self, asked: str, session: str) -> RecordedCall | None:
        place = (asked, session) if (asked, session) in self.calls else (asked, ANY)
        replies = self.calls.get(place)
        if replies is None:
            return None
        self._taken[place] += 1
        return replies[(self._taken[place] - 1) % len(replies)]

    def models(self, served_name: str) -> list[str]:
        """The models of the config that an endpoint knows by this name."""
        models = self.config.models.items()
        return [name for name, model in models if served_name in (model.served_name, name)]

    def served_names(self) -> list[str]:
        return sorted({model.served_name or name for name, model in self.config.models.items()})

    def nearest(self, request: ChatRequest) -> str:
        """In one line, what of the request is not as recorded. Prompts are not in a record, so a prompt
        can only be said to be another one."""
        for what, other in self._variants(request):
            if (request_digest(CHAT, what_is_asked(other)), ANY) in self.calls:
                return f"these messages are recorded with {what}"
        task = self.tasks.get(request.session)
        whose = f"task {task!r}" if task is not None else f"any of the {len(self.tasks)} tasks"
        return f"no recorded call of {whose} has these messages"

    def _variants(self, request: ChatRequest) -> Iterator[tuple[str, ChatRequest]]:
        for sampling in self._samplings():
            yield f"other sampling: {sampling.model_dump()}", replace(request, sampling=sampling)
        for model in self.config.models_used():
            yield f"another model: {model}", replace(request, model=model)
            for sampling in self._samplings():
                other = replace(request, model=model, sampling=sampling)
                yield f"another model and sampling: {model}, {sampling.model_dump()}", other
        if request.tools:
            yield "no tools", replace(request, tools=())

    def _samplings(self) -> list[Sampling]:
        aliases = [alias.sampling for tool in self.config.tools.values() for alias in tool.values()]
        return [self.config.orchestrator.sampling, self.config.judge.sampling, *aliases]


def read_request(body: Mapping[str, Any], model: str, token_field: str, session: str) -> ChatRequest:
    """The call that a client of `model` made with this body. Raises ValueError, TypeError or KeyError."""
    tokens = body.get(token_field, body.get("max_tokens", body.get("max_completion_tokens")))
    values = {name: body.get(name) for name in ("temperature", "top_p", "seed")}
    sampling = Sampling.model_validate(values | ({} if tokens is None else {"max_tokens": tokens}))
    messages = tuple(_message(message) for message in body["messages"])
    return ChatRequest(model, messages, sampling, tuple(body.get("tools") or ()), session)


def _message(message: Mapping[str, Any]) -> Message:
    content = message["content"] or ""
    if isinstance(content, str):
        return Message(message["role"], content)
    texts = [part["text"] for part in content if part["type"] == "text"]
    images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return Message(message["role"], "".join(texts), tuple(images))
