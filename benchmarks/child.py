"""A process of a benchmark, driven over its pipes: one JSON line asked, one JSON line answered.

A child announces itself with its first line and ends when its input does, so that none outlives the
benchmark. What else it writes goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

END_TIMEOUT_S = 60.0

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Child:
    """A `python -m module argument` that announces itself, answers and ends. A context manager."""

    def __init__(self, module: str, argument: object, environ: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", module, json.dumps(argument)]
        self._module = module
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environ or {})},
        )
        self.hello: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    def started(self) -> Self:
        """Waits for the child's first line. Several children start at once if this is called last."""
        if not self.hello:
            self.hello = self._read()
        return self

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one question. Raises RuntimeError where the child ended or failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(f"{self._module}: {answer['error']}")
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended without an answer; see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Closes the child's input and waits for its end; kills one that does not end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def argument() -> Any:
    """What the parent gave this child on its command line."""
    return json.loads(sys.argv[1])


async def converse(hello: Mapping[str, Any], answer: Answer) -> None:
    """The child's side: say `hello`, then answer each line until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    _say(out, hello)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            _say(out, await answer(json.loads(line)))
        except Exception as error:
            _say(out, {"error": f"{type(error).__name__}: {error}"})


def _say(out: Any, words: Mapping[str, Any]) -> None:
    out.write(json.dumps(words) + "\n")
    out.flush()
