"""A run as one HTML file that asks nobody for anything: figures, plots, and every turn of every task.

The file holds its data beside the program that shows them. No text of a run becomes markup: data are JSON in
which no `<` stands, or letters alone, and the program writes them as text nodes alone; the page's own policy
(CSP) runs no script but that program, loads nothing and connects to nothing. What does not fit is left out
by the end of each text, and said in place (`page_parts.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from analysis.gated import gated_reason
from analysis.log import EVERY, open_run
from analysis.page_figures import figures_of
from analysis.page_parts import Packed, pack, plan
from analysis.page_tasks import (
    COLUMNS,
    EXIT_ZERO,
    MORE_COLUMNS,
    Most,
    Vocabulary,
    index_of,
    parts_of,
    tasks_of,
)
from analysis.page_texts import CUT_BYTES, Texts
from analysis.questions import Questions, questions_of
from analysis.selection import EVERYTHING, Selection
from ray_app.errors import RunDirError

MOST_BYTES = 19_950_000  # under 20 MB
_PROGRAM_CHARS = 70_000  # of the page, with its style
SCRIPTS = (
    "dense.js",
    "page.js",
    "format.js",
    "tables.js",
    "plots.js",
    "data.js",
    "list.js",
    "story.js",
    "main.js",
)
COLUMNS_READ = tuple(dict.fromkeys((*EVERY, *COLUMNS, *MORE_COLUMNS)))


@dataclass(frozen=True, slots=True)
class Page:
    """The file that was written, how much it holds of each text and document, and why none, if so."""

    path: Path
    size: int
    tasks: int
    text_bytes: int
    document_bytes: int
    withheld: str
    sentence: str


def write_page(
    run_dir: Path,
    path: Path,
    selection: Selection = EVERYTHING,
    *,
    redact: bool | None = None,
    most_bytes: int = MOST_BYTES,
) -> Page:
    """Write the page of the run at `run_dir` to `path`, at any moment of the run's life.

    `redact` None withholds the texts of a gated set alone. The page takes about `most_bytes` at most, unless
    the run's figures alone are more. Raises RunDirError where there is no run, or where `path` cannot be
    written.
    """
    log = open_run(run_dir, replace(selection, all_runs=True), COLUMNS_READ)
    withheld = gated_reason(log.facts) if redact is None else "asked for by --redact" if redact else ""
    is_dialogue = log.facts.get("benchmark") == "tau2"  # what was asked is told by its user
    questions = Questions() if withheld or is_dialogue else questions_of(run_dir, log.facts)
    figures, tasks, words = figures_of(log), tasks_of(log), Vocabulary(log)
    index = index_of(tasks, words)
    with Texts(log, withheld=bool(withheld)) as texts:
        around = _PROGRAM_CHARS + len(json.dumps(figures.content))
        most = Most(0, 0) if withheld else plan(texts, tasks, most_bytes - around)
        parts = parts_of(tasks, words, texts, questions, most)
        packed = pack(parts, _json(index), texts, most, most_bytes, around)
    head = {
        **{"name": Path(log.name).name, "run": log.name, "state": figures.run.state},
        **{"made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), "withheld": withheld},
        **{"note": questions.note, "absence": log.absence or "", "cut": CUT_BYTES, "exit_zero": EXIT_ZERO},
        "is_dialogue": is_dialogue,
        **{
            "text_bytes": packed.most.text,
            "document_bytes": packed.most.document,
            "packing": packed.packing,
            "pieces": words.pieces,
        },
    }
    data = {**head, "figures": figures.content, "words": words.names, "parts": packed.tasks}
    data |= {"told": packed.told, "shelves": packed.shelves}
    data["tasks"] = index if packed.packing == "deflate" else packed.index
    size = _write(path, _lines(data, packed), packed.encoding)
    return Page(path, size, len(tasks), *packed.most, withheld, figures.content["sentence"])


def _lines(data: dict[str, Any], packed: Packed) -> Iterator[str]:
    template, style = _file("page.html"), _file("page.css")
    program = '"use strict";\n(() => {\n' + "\n".join(map(_file, SCRIPTS)) + "\n})();\n"
    before, after = template.split("<!-- parts -->")
    places = {"{{encoding}}": packed.encoding, "{{policy}}": _policy(program, style)}
    places |= {"{{style}}": style, "{{program}}": program}
    places |= {"{{data}}": _inert(data), "{{title}}": _text(f"{data['name']} \N{MIDDLE DOT} run report")}
    for name, value in places.items():
        head, found, tail = before.partition(name)
        before = head + value + tail if found else before
    yield before
    for kind in ("figures", "texts", "documents"):
        for number, body in enumerate(getattr(packed, kind)):
            yield f'<script type="text/plain" id="{kind}-{number}">{body}</script>\n'
    yield after


def _policy(program: str, style: str) -> str:
    """Nothing may run, style or load but what stands in the template; not even a handler in an attribute."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (program, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _inert(data: dict[str, Any]) -> str:
    """JSON that cannot end the element that it stands in, whatever it holds."""
    return _json(data).translate({ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"})


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _file(name: str) -> str:
    return resources.files("analysis").joinpath("report_page", name).read_text(encoding="utf-8")


def _write(path: Path, lines: Iterator[str], encoding: str) -> int:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding=encoding, errors="replace", newline="") as file:
            file.writelines(lines)
        size = temporary.stat().st_size
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunDirError(f"{path}: {error.strerror}; expected a file that can be written") from None
    return size
