"""Progress that a person can watch, and marker lines that scripts can parse.

On a terminal: one live bar. Without one: a line every 30 s. In both, the markers of the system that
this one replaces, on stdout: `[HLE_TASK_COMPLETE] id=... status=...` and `[OVERALL_ETA] done=a/b ...`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ray_app.planning import Tally, WorkItem
from ray_app.records import TaskResult

LINE_EVERY_S = 30.0


def clock(seconds: float) -> str:
    """MM:SS, or HH:MM:SS from one hour."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    return f"{hours:02d}:{minutes % 60:02d}:{whole % 60:02d}" if hours else f"{minutes:02d}:{whole % 60:02d}"


class Display:
    """Follows one run. Skipped tasks are counted as done and leave the rate and the ETA alone."""

    def __init__(
        self,
        tally: Tally,
        *,
        marker: str = "HLE",
        console: Console | None = None,
        waits: Callable[[], str] = str,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        """`waits` says what the run waits for, "" for nothing."""
        self._console = console or Console()
        self._marker, self._waits, self._timer = marker, waits, timer
        self._tally = tally
        self._skipped = tally.planned - tally.pending
        self._started = self._line_at = timer()
        self._in_flight = self._finished = 0
        self._cost_usd = 0.0
        self._bar = self._open_bar() if self._console.is_terminal else None

    def _open_bar(self) -> Progress:
        bar = Progress(
            TextColumn("[bold]{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
        )
        bar.start()
        self._task = bar.add_task("", total=self._tally.planned, completed=self._skipped, status="starting")
        return bar

    def started(self, item: WorkItem) -> None:
        self._in_flight += 1

    def committed(self, result: TaskResult, tally: Tally) -> None:
        self._tally = tally
        self._in_flight -= 1
        self._finished += 1
        self._cost_usd += result.cost_usd
        status = "error" if result.outcome == "failed" else "done"
        correct = bool(result.verdict and result.verdict.is_correct)
        error = f" error_type={result.error_kind}" if status == "error" else ""
        self._print(
            f"[{self._marker}_TASK_COMPLETE] id={result.task_id} status={status} correct={correct}{error}"
        )
        self.tick()

    def skipped(self, task_id: str) -> None:
        self._print(f"[{self._marker}_TASK_COMPLETE] id={task_id} status=skipped")

    def status(self) -> str:
        """done / failed / in flight, rate, ETA and cost so far, in one line."""
        counts = self._tally.counts
        elapsed_s = self._timer() - self._started
        rate = 60 * self._finished / elapsed_s if elapsed_s > 0 else 0.0
        tallied = ", ".join(f"{count} {name}" for name, count in counts.items())
        waits = f"; {waits}" if (waits := self._waits()) else ""
        return (
            f"{tallied}, {self._in_flight} in flight, {rate:.1f}/min, ETA {self.eta()}, "
            f"${self._cost_usd:.2f}{waits}"
        )

    def eta(self) -> str:
        if not self._finished:
            return "--:--"
        elapsed_s = self._timer() - self._started
        return clock(elapsed_s / self._finished * self._tally.pending)

    def tick(self) -> None:
        """Bring the display up to date; called at least once a second, so a stuck run shows itself."""
        done = self._tally.planned - self._tally.pending
        if self._bar:
            self._bar.update(self._task, completed=done, status=self.status())
        now = self._timer()
        if self._tally.pending and now - self._line_at < LINE_EVERY_S:
            return
        self._line_at = now
        elapsed = clock(now - self._started)
        self._print(f"[OVERALL_ETA] done={done}/{self._tally.planned} elapsed={elapsed} eta={self.eta()}")
        if not self._bar:
            self._print(f"progress: {self.status()}")

    def _print(self, line: str) -> None:
        # Plain text, unstyled: scripts parse these lines, and an id may hold markup characters.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
