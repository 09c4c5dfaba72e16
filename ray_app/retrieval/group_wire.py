"""How the answers to a group of queries travel by Serve handle.

As tuples: pickling a dataclass with slots costs ten times as much as a tuple of its fields, and a group has
thousands of hits.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from typing import Any, cast

from ray_app.errors import EvalError
from ray_app.records import Hit, Retrieval

# Of one part, about; a gRPC message of Serve holds 4 MiB.
PART_BYTES = 1 << 20

Answer = Retrieval | EvalError
Answered = tuple[int, Answer]


def packed(answers: Iterable[Answered]) -> Iterator[bytes]:
    """The answers, each with the position of its query, in parts of a size that one message holds."""
    part: list[tuple[int, object]] = []
    size = 0
    for position, answer in answers:
        added = _size(answer)
        if part and size + added > PART_BYTES:
            yield pickle.dumps(part, pickle.HIGHEST_PROTOCOL)
            part, size = [], 0
        part.append((position, _fields(answer)))
        size += added
    if part:
        yield pickle.dumps(part, pickle.HIGHEST_PROTOCOL)


def unpacked(part: bytes) -> list[Answered]:
    """The answers of one part."""
    return [(position, _answer(fields)) for position, fields in pickle.loads(part)]


def _size(answer: Answer) -> int:
    """Of its texts; at most three bytes a character, but four for the rarest."""
    if isinstance(answer, EvalError):
        return 0
    return sum(len(hit.text) if hit.text.isascii() else 3 * len(hit.text) for hit in answer.hits)


def _fields(answer: Answer) -> object:
    if isinstance(answer, EvalError):
        return answer
    hits = [(hit.document_id, hit.text, hit.score, hit.source) for hit in answer.hits]
    return hits, answer.cost_usd, answer.web_calls, answer.web_error


def _answer(fields: object) -> Answer:
    if isinstance(fields, EvalError):
        return fields
    hits, *web = cast(tuple[Any, ...], fields)  # as `_fields` made it
    return Retrieval(tuple(Hit(*hit) for hit in hits), *web)
