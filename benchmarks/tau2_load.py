"""What the tau2 benchmark runs: each domain's tasks with their gold actions, and the least that they take.

A task's own work is measured alone, in a process that does nothing else: environment, dialogue and reward of
its gold replay, with a model that answers at once. With as many processes busy at once as there are cores it
takes the same, so the ideal has it as it is. `python -c "..." main` prints it, task by task.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

from benchmarks.gold_model import Script, judged, mark
from ray_app.event_writer import EventWriter
from ray_app.journal import Journal
from ray_app.prompting import load_prompts
from ray_app.records import Event, Task
from ray_app.tau2 import upstream
from ray_app.tau2.config import Tau2Config
from ray_app.tau2.dialogue import Said
from ray_app.tau2.domain import Domain, prepare
from ray_app.tau2.gold import GoldScript, GoldSpeaker
from ray_app.tau2.loop import Dialogue, Rules
from ray_app.tau2.run import PROMPTS, load_domains, spec_of, task_of
from ray_app.tau2.tasks import TaskSpec

OFFICIAL = ("retail", "telecom", "airline")  # in turns, as configs/tau2_full.yaml has them
BUILT_IN = ("service_desk",)
CORES = 2


@dataclass(frozen=True, slots=True)
class Work:
    """One simulation of one task: its model calls, its own CPU seconds by part, its reward."""

    domain: str
    calls: int
    prepare_s: float
    talk_s: float
    reward_s: float
    reward: float

    @property
    def cpu_s(self) -> float:
        return self.prepare_s + self.talk_s + self.reward_s

    @property
    def bursts(self) -> list[float]:
        """CPU seconds before, between and after its calls."""
        between = [self.talk_s / self.calls] * self.calls
        return [self.prepare_s, *between[:-1], between[-1] + self.reward_s]


@dataclass(frozen=True)
class Load:
    """Tasks in the order in which they start; task n has script n. `trials` simulations of each."""

    domains: tuple[str, ...]
    raw: tuple[tuple[str, Mapping[str, Any]], ...]  # (domain, tau2's JSON of the task)
    trials: int = 1

    @property
    def simulations(self) -> int:
        return len(self.raw) * self.trials

    def tasks(self) -> list[Task]:
        return [task_of(domain, raw) for domain, raw in self.raw]

    def scripts(self) -> list[Script]:
        return [_script(spec_of(task)) for task in self.tasks()]

    def of(self, domain: str) -> list[Mapping[str, Any]]:
        return [raw for name, raw in self.raw if name == domain]


def read_load(domains: Sequence[str], limit: int | None = None, simulations: int = 0) -> Load:
    """The base split of the domains in turns; trials enough for `simulations`. Raises ConfigError."""
    folder = upstream.data_folder()
    each = [
        [(name, raw) for raw in domain.tasks("base")[:limit]]
        for name, domain in open_domains(domains, folder).items()
    ]
    found = [one for one in chain.from_iterable(zip_longest(*each)) if one is not None]
    marked = tuple((name, _marked(raw, number)) for number, (name, raw) in enumerate(found))
    return Load(tuple(domains), marked, max(1, -(-simulations // len(marked))))


def open_domains(domains: Sequence[str], folder: str | None) -> dict[str, Domain]:
    return load_domains(config_of(domains, "http://127.0.0.1:9"), load_prompts(None, PROMPTS), folder)


def config_of(domains: Sequence[str], url: str, in_flight: int = 48, workers: int = 4) -> Tau2Config:
    """A run whose sides and judge are the gold model at `url`."""
    paths = {"gold-agent": "agent/v1", "gold-user": "user/v1", "gold-judge": "judge/v1"}
    models = {name: {"endpoints": [{"base_url": f"{url}/{path}"}]} for name, path in paths.items()}
    sides = {"orchestrator": "gold-agent", "user": "gold-user", "judge": "gold-judge"}
    return Tau2Config.model_validate(
        {
            "domains": list(domains),
            "models": models,
            **{side: {"model": model} for side, model in sides.items()},
            "concurrency": in_flight,
            "workers": workers,
        }
    )


def _marked(raw: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The task with its number in the persona, which only the user's model is told."""
    scenario = {**raw["user_scenario"], "persona": mark(number)}
    return {**raw, "user_scenario": scenario}


def _script(spec: TaskSpec) -> Script:
    gold = GoldScript.of(spec)
    calls = [(action.requestor, action.name, dict(action.arguments)) for action in gold.actions]
    return Script(calls, list(gold.told))


def measured(load: Load) -> list[Work]:
    """The own work of each task, measured in a fresh process."""
    program = "from benchmarks.tau2_load import main; main()"
    command = [sys.executable, "-c", program, json.dumps([list(load.domains), len(load.raw)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Work(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Print the work of the tasks of the domains of the command line, as JSON."""
    domains, count = json.loads(sys.argv[1])
    load = read_load(domains, None)
    if len(load.raw) != count:
        load = read_load(domains, -(-count // len(domains)))
    print(json.dumps([asdict(work) for work in works(load)]))


def works(load: Load, *, is_frozen: bool = True) -> list[Work]:
    """The own work of each task, one after the other in this process."""
    domains = open_domains(load.domains, upstream.data_folder())
    for domain in domains.values():
        domain.environment()
    if is_frozen:
        upstream.freeze()
    with tempfile.TemporaryDirectory(prefix="bench-tau2-") as name:
        log = EventWriter(Path(name), "own-work")
        try:
            return [_work(domains[task.category], task, log) for task in load.tasks()]
        finally:
            log.close()


def _work(domain: Domain, task: Task, log: EventWriter) -> Work:
    clock = [time.thread_time()]
    spec = spec_of(task)
    script = GoldScript.of(spec)
    sides = GoldSpeaker(script, "assistant"), GoldSpeaker(script, "user")
    base = Event("attempt", time.time(), task_id=task.task_id, rollout_key=task.rollout_key)
    environment = prepare(domain, spec)
    journal = Journal(task, log, base)
    dialogue = Dialogue(spec, environment, *sides, Rules(), journal, greeting=domain.greeting)
    clock.append(time.thread_time())
    simulation = asyncio.run(dialogue.run(domain.name))
    clock.append(time.thread_time())
    asked = domain.questions(spec, simulation)
    reward = domain.reward(spec, simulation, judged()["content"] if asked else "")
    clock.append(time.thread_time())
    said = sum(isinstance(entry, Said) for entry in simulation.entries[len(spec.history()) :])
    calls = said - (not spec.history()) + bool(asked)  # nobody asks a model for the greeting
    prepare_s, talk_s, reward_s = (after - before for before, after in pairwise(clock))
    return Work(domain.name, calls, prepare_s, talk_s, reward_s, reward.value)


def ideal_s(
    works: Iterable[Work], latency_s: float, slots: int, cores: int = CORES, share: float = 1.0
) -> float:
    """The makespan of greedy list scheduling, where models and engine cost nothing but the calls' latency.

    Each simulation, in order, starts on the slot that is free first. It computes (its environment), calls
    and computes in turns (the dialogue), computes (its reward); who wants to compute first has a core first.
    `share`: of the cores' time, what is left by others.
    """
    waiting, numbers, end_s = iter(works), count(), 0.0
    free_at = [0.0] * cores
    queue: list[
        tuple[float, int, list[float]]
    ] = []  # (when it wants a core, its number, CPU seconds to come)

    def start(at_s: float) -> None:
        for work in islice(waiting, 1):
            heapq.heappush(queue, (at_s, next(numbers), work.bursts))

    for _ in range(slots):
        start(0.0)
    while queue:
        at_s, number, bursts = heapq.heappop(queue)
        if not bursts:
            end_s = at_s
            start(at_s)
            continue
        done_s = max(at_s, free_at[0]) + bursts[0] / share
        heapq.heapreplace(free_at, done_s)
        heapq.heappush(queue, (done_s + (latency_s if bursts[1:] else 0.0), number, bursts[1:]))
    return end_s
