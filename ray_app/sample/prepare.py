"""The bundled sample as files: built once for each Python and code version, in the home folder."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ray_app.records import digest
from ray_app.sample.corpus import QUESTIONS, ids_by_name, load_questions, write_corpus, write_scopes


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """Where the sample lies: questions (HLE JSONL), corpus (JSONL) and scopes (`examples.json`)."""

    folder: Path

    @property
    def questions(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.jsonl"

    @property
    def examples(self) -> Path:
        return self.folder / "examples.json"


def sample_files(home: Path) -> SampleFiles:
    """The sample's paths under `home`, built or not."""
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py*"))]
    version = digest([platform.python_version(), QUESTIONS.read_text(), sources])[:12]
    return SampleFiles(home / "data" / f"sample-{version}")


def prepare(home: Path) -> SampleFiles:
    """The sample's files, built if they are not there: about 4,000 docstrings of this Python."""
    files = sample_files(home)
    if files.examples.exists():
        return files
    files.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(files.folder.with_suffix(".lock")):
        if not files.examples.exists():
            write_corpus(files.corpus)
            shutil.copyfile(QUESTIONS, files.questions)
            rows = [json.loads(line) for line in files.corpus.read_text().splitlines()]
            write_scopes(load_questions(), ids_by_name(rows), files.examples)  # last: marks completeness
    return files
