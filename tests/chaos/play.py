"""One round: a run, its blows, and what is left of it."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
from typer.testing import CliRunner

from analysis.__main__ import app as analysis_app
from tests.chaos.blows import Hung, NoVictim, Scene, Wrong
from tests.chaos.plan import BLOWS, Benchmark, Blow, Kind, Round
from tests.chaos.world import Expected, World
from tests.jobs.kills import Kill, Told

# No task has ended for so long, and nothing holds the run up: it hangs.
SILENT_S = 120.0
# Tasks in flight: few enough for four blows to come before the end.
IN_FLIGHT = (4, 12)
# With more blows, slow enough for all of them to come.
IN_FLIGHT_OF_MANY: Mapping[Benchmark, int] = {"hle": 2, "tau2": 3}
# Between two blows: what a blow costs is promised for one at a time.
APART_S = 2.0
# What was answered so long before a blow was safe, but for the loss of everything at once.
SETTLED_S = {"cluster": 2.0, "full disk": 2.5, "slow disk": 2.5, "s3": 2.5}
SETTLED_ELSE_S = 0.5
# A run that ends with failures is started again, as its user would; not for ever.
MOST_AGAIN = 5


@dataclass(frozen=True)
class Struck:
    """A blow that came: `began` and `done` in Unix seconds."""

    kind: Kind
    what: str
    done_tasks: int
    began: float
    done: float


@dataclass
class Outcome:
    """What a round came to. The lists name tasks, or say what is wrong; all empty in a good one."""

    round: int
    title: str
    run_dir: str
    struck: list[Struck] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # kinds that this machine cannot do, and why
    lost: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # promises of another kind
    repeated: int = 0  # calls made again without a blow that explains it
    codes: list[int] = field(default_factory=list)  # of commands that ended by themselves
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.double or self.hung or self.wrong or self.broken)


def play(world: World, one: Round, folder: Path, say: Callable[[str], None]) -> Outcome:
    """Play a round. `folder` gets the output of its commands and a line for each blow."""
    began = time.monotonic()
    world.learn(one)
    world.heal()
    world.witness.answered.clear()
    name = f"round-{one.number}-{time.time_ns() % 10**9}"
    run_dir = world.run_dir(one.storage, name)
    outcome = Outcome(one.number, one.title, run_dir)
    rng = random.Random(f"round {one.number}")
    concurrency = IN_FLIGHT_OF_MANY[one.benchmark] if len(one.blows) > BLOWS else rng.randint(*IN_FLIGHT)
    with world.carried(one, run_dir, concurrency, folder / f"{name}.log") as job:
        scene = Scene(world, job, rng, one.outage_s)
        try:
            for blow in one.blows:
                if blow.kind in world.unavailable:
                    outcome.skipped.append(f"{blow.kind}: {world.unavailable[blow.kind]}")
                    continue
                _strike(scene, blow, one.tasks, outcome, folder, say)
            _end(scene)
        except Hung as hung:
            outcome.hung.append(str(hung))
        except Wrong as wrong:
            outcome.broken.append(str(wrong))
        outcome.codes = job.codes
    outcome = judged(world, outcome, world.expected[one.benchmark, one.tasks])
    outcome.seconds = time.monotonic() - began
    return outcome


def _strike(
    scene: Scene, blow: Blow, tasks: int, outcome: Outcome, folder: Path, say: Callable[[str], None]
) -> None:
    free_at = outcome.struck[-1].done + APART_S if outcome.struck else 0.0
    while not _wait(scene, lambda: scene.job.command.done >= blow.at * tasks and time.time() >= free_at):
        if scene.job.command.process.wait() == 0:
            outcome.missed.append(f"{blow.kind}: the run had ended")
            return
        _again(scene)
    done, began = scene.job.command.done, time.time()
    try:
        what = scene.strike(blow.kind)
    except NoVictim as error:
        outcome.missed.append(f"{blow.kind}: no {error}")
        return
    struck = Struck(blow.kind, what, done, began, time.time())
    outcome.struck.append(struck)
    with (folder / "blows.jsonl").open("a") as file:
        file.write(json.dumps({"round": outcome.round, **asdict(struck)}) + "\n")
    say(f"  {done:3d} done  {blow.kind:11} {what} ({struck.done - began:.1f} s)")


def _end(scene: Scene) -> None:
    _wait(scene, lambda: False)
    while scene.job.command.process.wait() != 0:
        _again(scene)
        _wait(scene, lambda: False)


def _again(scene: Scene) -> None:
    if len(scene.job.codes) > MOST_AGAIN:
        raise Hung(f"the command ended with {scene.job.codes}, again and again")
    scene.world.heal()
    scene.job.again()


def _wait(scene: Scene, until: Callable[[], bool]) -> bool:
    """Until that holds; False where the command has ended. Raises Hung where no task ends for long."""
    command = scene.job.command
    began = time.monotonic()
    while not command.has_ended:
        deadline = max(began, command.spoken_at) + SILENT_S
        if command.wait(until, deadline):
            return True
        if not command.has_ended and time.monotonic() > max(began, command.spoken_at) + SILENT_S:
            raise Hung(f"no task ended for {SILENT_S:g} s, {command.done} had")
    return until()


def judged(world: World, outcome: Outcome, expected: Expected) -> Outcome:
    """The outcome with what its run's log says, held against `expected`."""
    told = world.told(outcome.run_dir)
    found = Expected.of(told)
    lost, wrong = [], []
    for key, answer in expected.answers.items():
        if key not in found.answers:
            lost.append(_name(key))
        elif found.answers[key] != answer:
            wrong.append(f"{_name(key)}: {found.answers[key]!r:.300}, expected {answer!r:.300}")
        elif found.dialogues.get(key) != expected.dialogues.get(key):
            wrong.append(f"{_name(key)}: another dialogue")
        elif (searches := found.searches.get(key)) != expected.searches.get(key):
            wrong.append(f"{_name(key)}: searches {searches}, expected {expected.searches.get(key)}")
    unknown = found.answers.keys() - expected.answers.keys()
    wrong += [f"{_name(key)}: never asked for" for key in unknown]
    wrong += _summed(told, len(expected.answers))
    kills = [
        Kill(blow.began - SETTLED_S.get(blow.kind, SETTLED_ELSE_S), blow.done) for blow in outcome.struck
    ]
    repeated = world.witness.repeated(*kills, settled_s=0.0)
    return replace(outcome, lost=lost, wrong=wrong, double=_doubles(told), repeated=repeated)


def _doubles(told: Told) -> list[str]:
    """Tasks that were done more than once, and rows that are in two files.

    One that failed for want of what was away is done again by the next command, and counts once.
    """
    done = [row for row in told.rows("result") if row["outcome"] != "failed"]
    rows = Counter((row["task_id"], row["trial"]) for row in done)
    files = (told.run_dir / "log").glob("*.parquet")
    ids = Counter(name for file in files for name in pq.read_table(file)["event_id"].to_pylist())
    return [_name(key) for key, times in rows.items() if times > 1] + [
        f"event {name}" for name, times in ids.items() if times > 1
    ]


def _summed(told: Told, tasks: int) -> list[str]:
    """What the summary says that is not so."""
    page = CliRunner().invoke(analysis_app, ["summary", str(told.run_dir), "--json"])
    if page.exit_code:
        return [f"summary: {page.output}{page.exception!r}"]
    summary = json.loads(page.output)
    account = summary["accounting"]
    counted = sum(account[name] for name in ("ok", "failed", "limited", "owed", "pending"))
    if account["planned"] != tasks or counted != tasks or account["ok"] != tasks:
        return [f"summary: {account}"]
    if summary["totals"]["repeated_calls"] != told.repeated():
        return [
            f"summary: {summary['totals']['repeated_calls']} repeated calls, the log has {told.repeated()}"
        ]
    return []


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]} (trial {key[1]})"
