"""The beginning of every text of a run, for a page: cut while the payloads stream by, kept in a file.

So a run with gigabytes of texts takes memory for their places alone. `CUT_BYTES` of UTF-8 are kept of each.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from analysis.log import RunLog
from analysis.story import FoundText, hits_of, pieces_of, told_once
from ray_app import events

CUT_BYTES = 1024


class Cut(NamedTuple):
    """The beginning of a text, and how many of its characters are left out."""

    shown: str
    left_out: int


class Lengths:
    """How many texts have how many bytes, cut to CUT_BYTES."""

    def __init__(self) -> None:
        self._counts = [0] * (CUT_BYTES + 1)

    def add(self, shown: str) -> None:
        size = len(shown) if shown.isascii() else len(shown.encode("utf-8", "replace"))
        self._counts[min(CUT_BYTES, size)] += 1

    def kept(self, most_bytes: int) -> int:
        """Bytes that are left where each text is held to `most_bytes`."""
        return sum(min(size, most_bytes) * count for size, count in enumerate(self._counts))

    def fitting(self, most: int, least: int, room: float) -> int:
        """The most bytes a text, from `least` to `most`, of which all texts fit into `room`; else 0."""
        return next((size for size in range(most, least - 1, -8) if self.kept(size) <= room), 0)


class Told(NamedTuple):
    """What the payload of one row says: named texts, and documents in the order of their rank."""

    pieces: list[tuple[str, Cut]]
    hits: list[FoundText]


NOTHING = Told([], [])
_Signature = tuple[str, str, str]  # kind, role, tool: what decides how a payload is read


def cut(text: str, most_bytes: int) -> Cut:
    """As much of `text` as `most_bytes` of UTF-8 hold, whole characters only."""
    if len(text) <= most_bytes and text.isascii():
        return Cut(text, 0)
    # A lone surrogate, which JSON can smuggle in, has no UTF-8 form.
    body = text.encode("utf-8", "replace")
    shown = body[:most_bytes].decode("utf-8", "ignore")
    return Cut(shown, len(text) - len(shown))


class Texts(AbstractContextManager["Texts"]):
    """By payload hash, what a row's payload says. `withheld`: names and figures alone, no text is kept."""

    def __init__(self, log: RunLog, *, withheld: bool) -> None:
        self._most = 0 if withheld else CUT_BYTES
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed by __exit__)
        self._places = dict[str, int]()
        self.pieces, self.documents = Lengths(), Lengths()
        try:
            self._read(log.run_dir, _wanted(log))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def of_row(self, payload_hash: str, kind: str, role: str, tool: str) -> Told:
        """What the payload of a row of this kind says; nothing where the log does not have it."""
        entry = self._entry(payload_hash)
        told = entry.get(f"{kind}/{role}/{tool}") if isinstance(entry, dict) else None
        if told is None:
            return NOTHING
        return Told(
            [(name, Cut(*text)) for name, text in told["pieces"]], [FoundText(*hit) for hit in told["hits"]]
        )

    def document(self, text_hash: str) -> Cut | None:
        """A text that a retrieval names; None where the log does not have it."""
        entry = self._entry(text_hash)
        return Cut(*entry) if isinstance(entry, list) else None

    def _entry(self, name: str) -> Any:
        place = self._places.get(name)
        if place is None:
            return None
        self._file.seek(place)
        return json.loads(self._file.readline())

    def _read(self, run_dir: Path, wanted: Mapping[str, list[_Signature]]) -> None:
        place = 0
        for batch in events.payloads(run_dir):
            for name, body in zip(batch["hash"].to_pylist(), batch["body"].to_pylist(), strict=True):
                line = json.dumps(self._told(body, wanted.get(name)), ensure_ascii=False).encode()
                self._places[name] = place
                place += self._file.write(line + b"\n")

    def _told(self, body: str, signatures: list[_Signature] | None) -> Any:
        if signatures is None:  # no row's own payload: a document
            text = self._cut(body)
            self.documents.add(text.shown)
            return text
        return {"/".join(signature): self._of(body, *signature) for signature in signatures}

    def _of(self, body: str, kind: str, role: str, tool: str) -> dict[str, Any]:
        hits = hits_of(body) if kind == "retrieval" else None
        said = [] if hits is not None else told_once(pieces_of(kind, role, tool, body))
        pieces = [(one.name, self._cut(one.text)) for one in said]
        for _, text in pieces:
            self.pieces.add(text.shown)
        return {"pieces": pieces, "hits": hits or []}

    def _cut(self, text: str) -> Cut:
        return cut(text, self._most) if self._most else Cut("", 0)


def shorter(text: Cut, most_bytes: int) -> Cut:
    """`text`, which is cut already, held to `most_bytes`."""
    shown, left_out = cut(text.shown, most_bytes)
    return Cut(shown, text.left_out + left_out)


def _wanted(log: RunLog) -> dict[str, list[_Signature]]:
    """Of each payload of a row how it is to be read; almost always in one way."""
    hashes, columns = log.words("payload_hash"), [log.words(name) for name in ("kind", "role", "tool")]
    key = hashes.codes.astype(np.int64)
    for words in columns:
        key = key * max(1, len(words.names)) + words.codes
    found: dict[str, list[_Signature]] = {}
    _, rows = np.unique(key, return_index=True)
    for row in rows.tolist():
        kind, role, tool = (words.names[words.codes[row]] for words in columns)
        if name := hashes.names[hashes.codes[row]]:
            found.setdefault(name, []).append((kind, role, tool))
    return found
