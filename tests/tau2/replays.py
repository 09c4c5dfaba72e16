"""Gold replays through our loop, for tests: no model, no cluster, events in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ray_app.tau2
from ray_app.journal import NOTHING, Record
from ray_app.prompting import Prompts, load_prompts
from ray_app.records import Task
from ray_app.tau2.dialogue import Entry, Said
from ray_app.tau2.domain import Domain, prepare
from ray_app.tau2.gold import GoldScript, GoldSpeaker
from ray_app.tau2.loop import Dialogue, Rules
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.tasks import TaskSpec
from tests.stand_ins import MemoryLog, journal

PROMPTS: Prompts = load_prompts(bundled=Path(ray_app.tau2.__file__).parent / "prompts")


async def replayed(
    domain: Domain,
    spec: TaskSpec,
    script: GoldScript,
    *,
    rules: Rules = Rules(),  # noqa: B008  # frozen
    log: MemoryLog | None = None,
    record: Record = NOTHING,
) -> Simulation:
    """The simulation in which both sides say what the script says."""
    own = journal(Task(spec.id, "", ""), log or MemoryLog(), record)
    sides = GoldSpeaker(script, "assistant"), GoldSpeaker(script, "user")
    environment = prepare(domain, spec, is_solo=rules.is_solo)
    return await Dialogue(spec, environment, *sides, rules, own, domain.greeting).run(domain.name)


def content(entries: tuple[Entry, ...]) -> list[Entry]:
    """Entries without what differs between two runs: times, costs, sources."""
    return [
        replace(entry, at=0.0, took_s=0.0, cost_usd=0.0, source={})
        if isinstance(entry, Said)
        else replace(entry, at=0.0)
        for entry in entries
    ]
