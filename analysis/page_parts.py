"""Parts of a page, packed, so that all of them fit into it.

Where they do, they are deflate, which browsers unpack, in base64, and the page is UTF-8. Where they do not,
all of them are packed denser: LZMA over blocks of megabytes (a third less; the page unpacks it by itself,
half a second later, `dense.js`) in letters of fifteen bits, and the page is UTF-16, whose mark at its
beginning no server's word overrides: 16/15 of a byte for a byte, where base64 takes 4/3. Figures are never
cut. Texts go before documents, which stand in the corpus too: documents get what texts leave, and are left
out where that would be too little of each to read. How long a beginning fits is planned from one block of
each, and mended.
"""

from __future__ import annotations

import base64
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np

from analysis.page_tasks import Most, Part, Tasks
from analysis.page_texts import CUT_BYTES, Cut, Texts, shorter

LEAST_TEXT, LEAST_DOCUMENT = 32, 200
# Bytes in the page for a byte of text, and for a row's figures: on the low side.
_TEXT_COST, _ROW_BYTES = 0.2, 15
_LEVEL, _THREADS, _AHEAD = 6, 2, 6
_ROUNDS, _SAFETY = 4, 0.985
BLOCK_CHARS = 8_000_000
# The kind that `dense.js` knows; the slower presets above take a third longer for half a percent.
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 5, "dict_size": 1 << 23, "lc": 4, "lp": 0, "pb": 0}]
# A letter is one of 2^15 code points in a row: no surrogate, no character of markup, no end of a line.
_FIRST_LETTER, _BITS = 0x3400, 15

Packing = Literal["deflate", "lzma"]


@dataclass(frozen=True)
class Packed:
    """Parts as the texts that stand in the page, how much they hold of each text and document, and how.

    `tasks`, `told` and `shelves` say how many tasks or documents each of the others holds, in their order.
    """

    tasks: list[int]
    told: list[int]
    shelves: list[int]
    figures: list[str]
    texts: list[str]
    documents: list[str]
    index: str
    most: Most
    packing: Packing = "deflate"

    @property
    def char_bytes(self) -> int:
        """Bytes in the page of a character."""
        return 1 if self.packing == "deflate" else 2

    @property
    def encoding(self) -> str:
        return "utf-8" if self.packing == "deflate" else "utf-16"

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return sum(map(self.size_of, ([self.index], self.figures, self.texts, self.documents)))

    def size_of(self, parts: list[str]) -> int:
        return self.char_bytes * sum(map(len, parts))


def plan(texts: Texts, tasks: Tasks, most_bytes: int) -> Most:
    """How long the beginnings may be so that the page takes about `most_bytes`."""
    return _share_out(texts, Most(), most_bytes - _ROW_BYTES * len(tasks.rows), _TEXT_COST, _TEXT_COST)


def pack(
    parts: Iterable[Part], index: str, texts: Texts, most: Most, most_bytes: int, around: int = 0
) -> Packed:
    """All parts, which hold `most`, cut further so that they take `most_bytes` at most.

    More, where their figures alone are more. `around` characters of the page are none of them.
    """
    found = Packed([], [], [], [], [], [], index, most)
    with ThreadPoolExecutor(_THREADS) as pool:
        for group in _groups(parts, _AHEAD):
            shelves = [shelf for part in group for shelf in part.shelves]
            found.tasks.extend(part.tasks for part in group)
            found.shelves.extend(shelf.documents for shelf in shelves)
            found.figures.extend(pool.map(packed, (part.figures for part in group)))
            found.texts.extend(pool.map(packed, (part.texts for part in group)))
            found.documents.extend(pool.map(packed, (shelf.texts for shelf in shelves)))
        found.told.extend(found.tasks)
        if found.size + around > most_bytes and most.text:
            found = _Dense(found, texts, pool).within(most_bytes - 2 * around)
    return found


class _Dense:
    """Packs again what did not fit."""

    def __init__(self, found: Packed, texts: Texts, pool: ThreadPoolExecutor) -> None:
        self._lengths, self._pool = texts, pool
        # As bytes: one odd character makes a str of four bytes for each of its characters.
        told, self._texts = list[int](), list[bytes]()
        for count, block in _blocks(found.tasks, map(unpacked, found.texts)):
            told.append(count)
            self._texts.append(_utf8("\n".join(block)))
        shelves, self._documents = list[int](), list[bytes]()
        for count, block in _blocks(found.shelves, map(unpacked, found.documents)):
            shelves.append(count)
            self._documents.append(_utf8(f"[{','.join(shelf[1:-1] for shelf in block)}]"))
        self._found = replace(
            found,
            told=told,
            shelves=shelves,
            figures=self._dense([_utf8(unpacked(part)) for part in found.figures]),
            texts=[],
            documents=[],
            index=packed(found.index, "lzma"),
            packing="lzma",
        )

    def within(self, most_bytes: int) -> Packed:
        """All of it in `most_bytes`, as far as cutting texts can do that."""
        room = max(0, most_bytes - self._found.size)
        most, lengths = self._found.most, self._lengths
        text_cost, document_cost = (
            2 * sum(map(len, self._dense(sample))) / max(1, sum(map(len, sample)))
            for sample in (self._texts[:1], self._documents[:1])
        )
        most = _share_out(lengths, most, _SAFETY * room, text_cost, document_cost)
        for _ in range(_ROUNDS):
            found = self._held(most)
            if found.size <= most_bytes:
                break
            text_cost = found.size_of(found.texts) / max(1, lengths.pieces.kept(most.text))
            document_cost = found.size_of(found.documents) / max(1, lengths.documents.kept(most.document))
            most = _share_out(lengths, most, _SAFETY * room, text_cost, document_cost)
        return found

    def _held(self, most: Most) -> Packed:
        """The page with texts held to `most`."""
        last = self._found
        if most.text != last.most.text:
            self._texts = [_recut(block, 2, 4, most.text) for block in self._texts]
        if most.document != last.most.document:
            self._documents = [_recut(block, 0, 2, most.document) for block in self._documents]
        again = not last.texts or most.text != last.most.text
        self._found = replace(
            last,
            texts=self._dense(self._texts) if again else last.texts,
            documents=self._dense(self._documents),
            most=most,
        )
        return self._found

    def _dense(self, bodies: list[bytes]) -> list[str]:
        return list(self._pool.map(_dense, bodies))


def _blocks(counts: list[int], bodies: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Neighbours together, as many as make a block, and what they count."""
    own, block, size = 0, list[str](), 0
    for count, body in zip(counts, bodies, strict=True):
        if block and size + len(body) > BLOCK_CHARS:
            yield own, block
            own, block, size = 0, [], 0
        own += count
        block.append(body)
        size += len(body)
    if block:
        yield own, block


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _dense(body: bytes) -> str:
    return lettered(lzma.compress(body, format=lzma.FORMAT_ALONE, filters=_LZMA))


def _share_out(texts: Texts, now: Most, room: float, text_cost: float, document_cost: float) -> Most:
    """`room` is bytes of the page; a cost is such bytes for a byte of text."""
    text = texts.pieces.fitting(now.text, LEAST_TEXT, room / (text_cost or 1)) or LEAST_TEXT
    if text < CUT_BYTES:
        return Most(text, 0)
    left = room - text_cost * texts.pieces.kept(text)
    return Most(text, texts.documents.fitting(now.document, LEAST_DOCUMENT, left / (document_cost or 1)))


def _recut(body: bytes, first: int, step: int, most_bytes: int) -> bytes:
    """A part whose texts are held to `most_bytes`; after each stands how much of it is left out."""
    return b"\n".join(_utf8(_shorter(line, first, step, most_bytes)) for line in body.split(b"\n"))


def _shorter(line: bytes, first: int, step: int, most_bytes: int) -> str:
    flat = json.loads(line)
    for place in range(first, len(flat), step):
        flat[place : place + 2] = shorter(Cut(*flat[place : place + 2]), most_bytes)
    return json.dumps(flat, ensure_ascii=False, separators=(",", ":"))


def packed(text: str, packing: Packing = "deflate") -> str:
    """`text` as it stands in a page."""
    if packing == "deflate":
        return base64.b64encode(zlib.compress(_utf8(text), _LEVEL)).decode()
    return _dense(_utf8(text))


def unpacked(body: str, packing: Packing = "deflate") -> str:
    """What was packed."""
    if packing == "deflate":
        return zlib.decompress(base64.b64decode(body)).decode()
    return lzma.decompress(unlettered(body), lzma.FORMAT_ALONE).decode()


def lettered(body: bytes) -> str:
    """`body` in letters of fifteen bits; the first says how many bits of the last are none of it."""
    over = -8 * len(body) % _BITS
    bits = np.concatenate([np.unpackbits(np.frombuffer(body, np.uint8)), np.zeros(over, np.uint8)])
    values = bits.reshape(-1, _BITS) @ (1 << np.arange(_BITS - 1, -1, -1, dtype=np.int32))
    letters = np.concatenate([[over], values]) + _FIRST_LETTER
    return str(letters.astype("<u2").tobytes(), "utf-16-le")


def unlettered(text: str) -> bytes:
    """What was lettered."""
    letters = np.frombuffer(text.encode("utf-16-le"), "<u2") - np.uint16(_FIRST_LETTER)
    bits = np.unpackbits(letters[1:].astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 1:].ravel()
    return np.packbits(bits[: len(bits) - int(letters[0])]).tobytes()


def _groups(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    source = iter(parts)
    while group := list(islice(source, size)):
        yield group
