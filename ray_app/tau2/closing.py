"""What a tau2 run is closed with beside what every run is: its simulations' figures, and files for tau2."""

from __future__ import annotations

from dataclasses import asdict

from ray_app import object_store, rundir
from ray_app.driver import Command, patiently
from ray_app.tau2.export import export
from ray_app.tau2.run import Tau2Job

FIGURES = "analysis/tau2.json"


def close(job: Tau2Job, command: Command) -> None:
    """Prints the page of `python -m analysis tau2`, writes its figures and the files that tau2 reads."""
    from analysis.log import open_run  # as in the driver: what only the end needs is not waited for
    from analysis.simulations import COLUMNS, Simulations, simulations
    from analysis.simulations_page import simulations_page

    def written() -> tuple[Simulations, list[str]]:
        found = simulations(open_run(job.run_dir, columns=COLUMNS))
        rundir.write_json(job.run_dir / FIGURES, asdict(found))
        object_store.push(job.run_dir, [FIGURES])
        return found, list(export(job))

    found, lines = patiently(written)
    command.console.print(simulations_page(found))
    for line in lines:
        command.say(line)
