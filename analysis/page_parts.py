"""Parts of a page, packed (deflate, base64), so that all of them fit into it.

Figures are never cut. Texts go before documents, which are the bulk and stand in the corpus too: documents
get what texts leave, and are left out where that would be too little of each to read. How long a beginning
fits is planned from the lengths of the texts, and mended where they pack worse than prose does.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from analysis.page_tasks import Most, Part, Tasks
from analysis.page_texts import CUT_BYTES, Cut, Texts, shorter

LEAST_TEXT, LEAST_DOCUMENT = 32, 200
# Bytes in the page for a byte of text, and for a row's figures: what is usual, on the low side.
_TEXT_BYTES, _ROW_BYTES = 0.4, 27
_LEVEL, _THREADS, _AHEAD = 6, 2, 4
_ROUNDS, _SAFETY = 4, 0.98


@dataclass(frozen=True)
class Packed:
    """Parts as base64 texts, and how much they hold of each text and document."""

    tasks: list[int]
    figures: list[bytes]
    texts: list[bytes]
    documents: list[bytes]
    most: Most

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return sum(map(size_of, (self.figures, self.texts, self.documents)))


def plan(texts: Texts, tasks: Tasks, most_bytes: int) -> Most:
    """How long the beginnings may be so that the page takes about `most_bytes`."""
    room = (most_bytes - _ROW_BYTES * len(tasks.rows)) / _TEXT_BYTES
    return _share_out(texts, Most(), room, room)


def pack(parts: Iterable[Part], texts: Texts, most: Most, most_bytes: int) -> Packed:
    """All parts, which hold `most`, cut further so that they take `most_bytes` at most.

    More, where their figures alone are more.
    """
    found = Packed([], [], [], [], most)
    with ThreadPoolExecutor(_THREADS) as pool:
        for group in _groups(parts, _AHEAD):
            found.tasks.extend(part.tasks for part in group)
            found.figures.extend(pool.map(_packed, (part.figures for part in group)))
            found.texts.extend(pool.map(_packed, (part.texts for part in group)))
            found.documents.extend(pool.map(_packed, (part.documents for part in group)))
        for _ in range(_ROUNDS):
            if found.size <= most_bytes or not found.most.text:
                break
            found = _cut_down(found, texts, most_bytes, pool)
    return found


def _cut_down(found: Packed, texts: Texts, most_bytes: int, pool: ThreadPoolExecutor) -> Packed:
    room = _SAFETY * max(0, most_bytes - size_of(found.figures))
    for_text = size_of(found.texts) / max(1, texts.pieces.kept(found.most.text))
    for_document = size_of(found.documents) / max(1, texts.documents.kept(found.most.document))
    left = room - size_of(found.texts)
    most = _share_out(texts, found.most, room / (for_text or 1), left / (for_document or 1))
    return Packed(
        found.tasks,
        found.figures,
        list(pool.map(lambda body: _recut(body, 2, 4, most.text), found.texts)),
        list(pool.map(lambda body: _recut(body, 0, 2, most.document), found.documents)),
        most,
    )


def _share_out(texts: Texts, now: Most, room: float, room_for_documents: float) -> Most:
    """Rooms are in bytes of text, the second one for what texts leave."""
    text = texts.pieces.fitting(now.text, LEAST_TEXT, room) or LEAST_TEXT
    if text < CUT_BYTES:
        return Most(text, 0)
    if room_for_documents == room:
        room_for_documents -= texts.pieces.kept(text)
    return Most(text, texts.documents.fitting(now.document, LEAST_DOCUMENT, room_for_documents))


def _recut(body: bytes, first: int, step: int, most_bytes: int) -> bytes:
    """A packed part whose texts are held to `most_bytes`; after each stands how much of it is left out."""
    return _packed("\n".join(_shorter(line, first, step, most_bytes) for line in unpacked(body).split("\n")))


def _shorter(line: str, first: int, step: int, most_bytes: int) -> str:
    flat = json.loads(line)
    for place in range(first, len(flat), step):
        flat[place : place + 2] = shorter(Cut(*flat[place : place + 2]), most_bytes)
    return json.dumps(flat, ensure_ascii=False, separators=(",", ":"))


def _packed(text: str) -> bytes:
    return base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), _LEVEL))


def unpacked(body: bytes) -> str:
    """What was packed."""
    return zlib.decompress(base64.b64decode(body)).decode()


def size_of(parts: list[bytes]) -> int:
    return sum(map(len, parts))


def _groups(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    source = iter(parts)
    while group := list(islice(source, size)):
        yield group
