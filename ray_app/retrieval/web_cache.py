"""What the web answered, kept on disk and read back: one JSON file for each question asked of it.

Owns the folder. File names are digests, so that no query and no url becomes a path. A file appears whole or
not at all; one that cannot be read counts as absent. It never shrinks: deleting files is always safe.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ray_app.errors import ConfigError
from ray_app.records import digest

_log = logging.getLogger(__name__)

T = TypeVar("T")


class DiskCache:
    """Answers by name, a list of texts. `max_age_s`: older ones count as absent; None keeps them for ever.

    Raises ConfigError for a folder that cannot be made.
    """

    def __init__(
        self, folder: Path, max_age_s: float | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._max_age_s, self._clock = folder, max_age_s, clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cache_dir {str(folder)!r}: {error.strerror}; expected a writable folder"
            ) from None

    def get(self, name: Sequence[str], parse: Callable[[object], T]) -> T | None:
        """The answer kept under `name`, as `parse` reads it; None if there is none that can be used."""
        try:
            kept = json.loads(self._path(name).read_bytes())
            if kept["name"] != list(name) or self._is_old(float(kept["at"])):
                return None
            return parse(kept["answer"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def put(self, name: Sequence[str], answer: object) -> None:
        """Keeps `answer`, plain JSON data. A disk that takes no more is logged and harms nobody."""
        body = json.dumps({"name": list(name), "at": self._clock(), "answer": answer})
        temporary: Path | None = None
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._folder, prefix=".", delete=False) as file:
                temporary = Path(file.name)
                file.write(body)
            temporary.replace(self._path(name))
        except OSError as error:
            _log.warning("web answer not kept in %s: %s", self._folder, error.strerror)
            if temporary is not None:
                with suppress(OSError):
                    temporary.unlink()

    def _is_old(self, at: float) -> bool:
        return self._max_age_s is not None and self._clock() - at > self._max_age_s

    def _path(self, name: Sequence[str]) -> Path:
        return self._folder / f"{digest(list(name))}.json"
