"""Runs of earlier systems (text logs, `{id}.json` results) as run directories of this one, for every command.

Times come from the logs, outcomes from the results. Tasks are known by their ids: where a result says how
the question was put, its key is the one that a run of that question without images or scope would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.seed_events import Converter
from analysis.seed_log import read_logs
from analysis.seed_results import Results, read_results
from ray_app import rundir
from ray_app.errors import RunDirError
from ray_app.event_writer import EventWriter


@dataclass(frozen=True, slots=True)
class Imported:
    """What was taken over, and what could not be used."""

    run_dir: str
    files: int
    segments: int
    events: int
    tasks: int
    results: int
    torn_lines: int
    foreign_lines: int
    double_lines: int
    nameless_lines: int
    unreadable_results: list[str]
    double_results: int

    def line(self) -> str:
        left = {
            "torn lines": self.torn_lines,
            "lines of something else": self.foreign_lines,
            "lines that another file has too": self.double_lines,
            "lines that name no task": self.nameless_lines,
            "unreadable results": len(self.unreadable_results),
            "older results of the same id": self.double_results,
        }
        dropped = ", ".join(f"{count} {name}" for name, count in left.items() if count)
        return (
            f"{self.events} events and {self.results} results of {self.tasks} tasks from {self.files} logs, "
            f"{self.segments} run segments" + (f"; left out: {dropped}" if dropped else "")
        )


def import_run(logs: Path, results: Path | None, run_dir: Path, pattern: str = "hle*.log") -> Imported:
    """Write the run at `logs` and `results` as the new run directory `run_dir`.

    Raises RunDirError where there is nothing to read, or `run_dir` holds something.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise RunDirError(f"{run_dir}: there is something already; expected a new folder")
    reading = read_logs(logs, pattern)
    found = Results() if results is None else read_results(results)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        log = EventWriter(run_dir, "import", flush_rows=50_000, flush_s=3600.0)
        converter = Converter(run_dir.name, found, log)
        names = [path.name for path in reading.files]
        converter.write(reading.lines(), names)
        log.close()
        summary = Imported(
            str(run_dir),
            len(names),
            converter.segments,
            converter.events,
            len(converter.tasks),
            len(found.by_id),
            reading.torn,
            reading.foreign,
            reading.doubles,
            converter.nameless,
            found.unreadable,
            found.doubles,
        )
        rundir.write_json(run_dir / "provenance.json", {"imported": summary.line(), "logs": names})
    except OSError as error:
        raise rundir.unusable(run_dir, error) from None
    return summary
