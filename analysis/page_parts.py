"""Parts of a page, packed (deflate, base64), so that all of them fit into it.

Figures are never cut. Texts go before documents, which are the bulk and stand in the corpus too: documents
get what texts leave, and are left out where that would be too little of each to read. Where texts do not fit
they are packed denser first (bzip2, which the page unpacks by itself, some milliseconds later), then cut. How
long a beginning fits is planned from the lengths of the texts, and mended where they pack worse than prose.
"""

from __future__ import annotations

import base64
import bz2
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from analysis.page_tasks import Most, Part, Tasks
from analysis.page_texts import CUT_BYTES, Cut, Texts, shorter

LEAST_TEXT, LEAST_DOCUMENT = 32, 200
# Bytes in the page for a byte of text, of a document, and for a row's figures: on the low side.
_TEXT_COST, _DOCUMENT_COST, _ROW_BYTES = 0.3, 0.42, 27
_LEVEL, _THREADS, _AHEAD = 6, 2, 6
_ROUNDS, _SAFETY = 4, 0.98

Packing = Literal["deflate", "bzip2"]


@dataclass(frozen=True)
class Packed:
    """Parts as base64 texts, how much they hold of each text and document, and how `texts` are packed."""

    tasks: list[int]
    figures: list[bytes]
    texts: list[bytes]
    documents: list[bytes]
    most: Most
    packing: Packing = "deflate"

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return sum(map(size_of, (self.figures, self.texts, self.documents)))


def plan(texts: Texts, tasks: Tasks, most_bytes: int) -> Most:
    """How long the beginnings may be so that the page takes about `most_bytes`."""
    return _share_out(texts, Most(), most_bytes - _ROW_BYTES * len(tasks.rows), _TEXT_COST, _DOCUMENT_COST)


def pack(parts: Iterable[Part], texts: Texts, most: Most, most_bytes: int) -> Packed:
    """All parts, which hold `most`, cut further so that they take `most_bytes` at most.

    More, where their figures alone are more.
    """
    found = Packed([], [], [], [], most)
    with ThreadPoolExecutor(_THREADS) as pool:
        for group in _groups(parts, _AHEAD):
            found.tasks.extend(part.tasks for part in group)
            found.figures.extend(pool.map(packed, (part.figures for part in group)))
            found.texts.extend(pool.map(packed, (part.texts for part in group)))
            found.documents.extend(pool.map(packed, (part.documents for part in group)))
        if found.size > most_bytes and most.text:
            found = replace(found, texts=list(pool.map(_denser, found.texts)), packing="bzip2")
        for _ in range(_ROUNDS):
            if found.size <= most_bytes or not most.text:
                break
            found = _cut_down(found, texts, most_bytes, pool)
    return found


def _cut_down(found: Packed, texts: Texts, most_bytes: int, pool: ThreadPoolExecutor) -> Packed:
    room = _SAFETY * max(0, most_bytes - size_of(found.figures))
    text_cost = size_of(found.texts) / max(1, texts.pieces.kept(found.most.text))
    document_cost = size_of(found.documents) / max(1, texts.documents.kept(found.most.document))
    most = _share_out(texts, found.most, room, text_cost, document_cost)

    def cut_texts(body: bytes) -> bytes:
        return _recut(body, 2, 4, most.text, found.packing)

    def cut_documents(body: bytes) -> bytes:
        return _recut(body, 0, 2, most.document, "deflate")

    return replace(
        found,
        texts=found.texts if most.text == found.most.text else list(pool.map(cut_texts, found.texts)),
        documents=list(pool.map(cut_documents, found.documents)),
        most=most,
    )


def _share_out(texts: Texts, now: Most, room: float, text_cost: float, document_cost: float) -> Most:
    """`room` is bytes of the page; a cost is such bytes for a byte of text."""
    text = texts.pieces.fitting(now.text, LEAST_TEXT, room / (text_cost or 1)) or LEAST_TEXT
    if text < CUT_BYTES:
        return Most(text, 0)
    left = room - text_cost * texts.pieces.kept(text)
    return Most(text, texts.documents.fitting(now.document, LEAST_DOCUMENT, left / (document_cost or 1)))


def _recut(body: bytes, first: int, step: int, most_bytes: int, packing: Packing) -> bytes:
    """A packed part whose texts are held to `most_bytes`; after each stands how much of it is left out."""
    lines = unpacked(body, packing).split("\n")
    return packed("\n".join(_shorter(line, first, step, most_bytes) for line in lines), packing)


def _denser(body: bytes) -> bytes:
    return packed(unpacked(body), "bzip2")


def _shorter(line: str, first: int, step: int, most_bytes: int) -> str:
    flat = json.loads(line)
    for place in range(first, len(flat), step):
        flat[place : place + 2] = shorter(Cut(*flat[place : place + 2]), most_bytes)
    return json.dumps(flat, ensure_ascii=False, separators=(",", ":"))


_PACK: dict[Packing, Callable[[bytes], bytes]] = {
    "deflate": lambda body: zlib.compress(body, _LEVEL),
    "bzip2": bz2.compress,
}
_UNPACK: dict[Packing, Callable[[bytes], bytes]] = {"deflate": zlib.decompress, "bzip2": bz2.decompress}


def packed(text: str, packing: Packing = "deflate") -> bytes:
    """`text` as it stands in a page."""
    return base64.b64encode(_PACK[packing](text.encode("utf-8", "replace")))


def unpacked(body: bytes, packing: Packing = "deflate") -> str:
    """What was packed."""
    return _UNPACK[packing](base64.b64decode(body)).decode()


def size_of(parts: list[bytes]) -> int:
    return sum(map(len, parts))


def _groups(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    source = iter(parts)
    while group := list(islice(source, size)):
        yield group
