"""Which tasks a run has, in what order they start, and which of them a pilot takes. Pure, but for the file
that `--ids` may name.

Which tasks is part of what a run measures: a choice makes another run. Order and pilot are not.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_app.dataset import TaskSet
from ray_app.errors import ConfigError
from ray_app.planning import Plan, WorkItem
from ray_app.records import Task

SHOWN = 3


@dataclass(frozen=True)
class Asked:
    """What a command asks of its tasks: which of them, how often, in what order, how many now."""

    limit: int | None = None
    ids: str | None = None
    trials: int | None = None
    is_shuffled: bool = False
    seed: int = 0
    durations_from: Path | None = None
    pilot: int | None = None

    @property
    def overrides(self) -> list[str]:
        """What of it is a key of the config."""
        return [] if self.trials is None else [f"trials={self.trials}"]

    @property
    def is_choice(self) -> bool:
        return self.limit is not None or self.ids is not None


NOTHING_ASKED = Asked()


@dataclass(frozen=True)
class Durations:
    """Seconds that tasks took, by rollout key; by id for those whose question or scope has changed since."""

    by_key: Mapping[str, float] = field(default_factory=dict)
    by_id: Mapping[str, float] = field(default_factory=dict)

    def of(self, task: Task) -> float | None:
        found = self.by_key.get(task.rollout_key)
        return self.by_id.get(task.task_id) if found is None else found


def read_ids(text: str) -> tuple[str, ...]:
    """`--ids`: ids with commas between them, or a file of one id a line. Raises ConfigError."""
    path = Path(text)
    try:
        is_file = path.is_file()
    except OSError:  # too long for a name
        is_file = False
    try:
        listed = path.read_text().splitlines() if is_file else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids {text}: {error}; expected a file of one id a line") from None
    ids = tuple(dict.fromkeys(one.strip() for one in listed if one.strip()))
    if not ids:
        raise ConfigError(f"--ids {text}: no id in it; expected id,id or a file of one id a line")
    return ids


def choose(data: TaskSet, asked: Asked) -> TaskSet:
    """The tasks of `data` that are asked for; what is left out is told with the score.

    `limit` takes the first ones of the file, or of the shuffled order. Raises ConfigError for an id that is
    not there.
    """
    if not asked.is_choice:
        return data
    tasks = list(data.tasks)
    if asked.ids is not None:
        wanted = set(read_ids(asked.ids))
        unknown = sorted(wanted - {task.task_id for task in tasks})
        if unknown:
            shown = ", ".join(repr(name) for name in unknown[:SHOWN])
            raise ConfigError(
                f"--ids: {len(unknown)} of {len(wanted)} are not among the {len(tasks)} tasks: {shown}"
            )
        tasks = [task for task in tasks if task.task_id in wanted]
    if asked.is_shuffled:
        random.Random(asked.seed).shuffle(tasks)
    tasks = tasks[: asked.limit]
    left_out = len(data.tasks) - len(tasks)
    reasons = {**data.left_out, "not chosen (--limit, --ids)": left_out} if left_out else data.left_out
    return replace(data, tasks=tuple(tasks), left_out=reasons)


def identity(data: TaskSet, chosen: TaskSet) -> dict[str, str]:
    """What a choice adds to a run's identity, so that a resume without it is refused in plain words."""
    if len(chosen.tasks) == len(data.tasks):
        return {}
    return {"tasks_chosen": f"{len(chosen.tasks)} of {len(data.tasks)}"}


def arranged(work: Plan, tasks: Sequence[Task], asked: Asked, known: Durations) -> Plan:
    """The plan in the order in which its items are to start; what is not for this command is set aside.

    `tasks` are all of the run: a pilot is a sample of them, whatever is done already.
    """
    items = order(work.items, asked, known)
    if asked.pilot is None:
        return replace(work, items=tuple(items))
    first = pilot(tasks, asked.pilot, asked.seed)
    now = tuple(item for item in items if item.trial == 0 and item.task.rollout_key in first)
    keys = {item.key for item in now}
    return replace(work, items=now, later=tuple(item for item in items if item.key not in keys))


def order(items: Sequence[WorkItem], asked: Asked, known: Durations) -> list[WorkItem]:
    """At random, where that is asked for; longest first, where durations are known; else category by turns.

    Whoever starts last sets the end: so the long ones go first, and what was never measured goes where the
    mean of its category would. Without any measurement a prompt's length is all there is, and comparable
    only within a category: the categories take turns, each with its longest prompts first, trial after trial.
    """
    if asked.is_shuffled:
        return _shuffled(items, asked.seed)
    found = {item.task.rollout_key: known.of(item.task) for item in items}
    if all(seconds is None for seconds in found.values()):
        return _by_turns(items)
    means = _means((item.task.category, found[item.task.rollout_key]) for item in items)

    def seconds(item: WorkItem) -> float:
        own = found[item.task.rollout_key]
        return own if own is not None else means.get(item.task.category, means[None])

    return sorted(items, key=lambda item: (-seconds(item), -len(item.task.question)))


def _shuffled(items: Sequence[WorkItem], seed: int) -> list[WorkItem]:
    """An item's place follows from its own key: a resume goes on in the same order."""
    return sorted(
        items, key=lambda item: random.Random(f"{seed} {item.task.rollout_key} {item.trial}").random()
    )


def _by_turns(items: Sequence[WorkItem]) -> list[WorkItem]:
    """Each category is spread evenly over the whole trial, whatever its size."""
    groups: defaultdict[tuple[int, str], list[WorkItem]] = defaultdict(list)
    for item in sorted(items, key=lambda item: -len(item.task.question)):
        groups[item.trial, item.task.category].append(item)
    placed = [
        (trial, (place + 0.5) / len(group), category, item)
        for (trial, category), group in groups.items()
        for place, item in enumerate(group)
    ]
    return [item for *_, item in sorted(placed, key=lambda one: one[:3])]


def _means(found: Iterable[tuple[str, float | None]]) -> dict[str | None, float]:
    """The mean of each category that has one, and of all under None."""
    values: defaultdict[str | None, list[float]] = defaultdict(list)
    for category, seconds in found:
        if seconds is not None:
            values[category].append(seconds)
            values[None].append(seconds)
    return {category: sum(own) / len(own) for category, own in values.items()}


def stratum(task: Task) -> str:
    """What tasks are alike in: category (a domain, where a benchmark has them) and type of answer."""
    return f"{task.category} / {task.answer_type}"


def pilot(tasks: Sequence[Task], size: int, seed: int) -> set[str]:
    """Rollout keys of `size` tasks: of each stratum its share, at random within it.

    Shares are rounded by largest remainder, ties by lot. The same tasks, size and seed give the same sample,
    whatever has run since: a pilot that was stopped goes on.
    """
    rng = random.Random(seed)
    strata: defaultdict[str, list[Task]] = defaultdict(list)
    for task in sorted(tasks, key=lambda task: task.rollout_key):
        strata[stratum(task)].append(task)
    size = min(size, len(tasks))
    exact = {name: size * len(members) / len(tasks) for name, members in sorted(strata.items())}
    taken = Counter({name: math.floor(share) for name, share in exact.items()})
    ranked = sorted(exact, key=lambda name: (taken[name] - exact[name], rng.random()))
    taken.update(ranked[: size - taken.total()])
    return {
        task.rollout_key
        for name in sorted(strata)
        for task in rng.sample(strata[name], min(taken[name], len(strata[name])))
    }
