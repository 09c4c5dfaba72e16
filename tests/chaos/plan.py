"""Which faults a seed means: a pure function, so that a failure is made again by its number alone.

A seed is one run of the sample, or of the service desk, with several blows. Ten seeds are a *block* of forty,
in which every kind of blow has its share, so that any block of a long pass covers all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal[
    "worker",
    "raylet",
    "checkpoint",
    "driver",
    "retriever",
    "model",
    "proxy",
    "controller",
    "web",
    "s3",
    "cluster",
    "stop",
    "full disk",
    "slow disk",
    "clock",
]
Benchmark = Literal["hle", "tau2"]
# Where the run lives: a folder, an object store, or a file system that can be filled up and slowed down.
Storage = Literal["folder", "s3", "disk"]

# Blows of each kind in a block.
SHARES: Mapping[Kind, int] = {
    "worker": 4,
    "raylet": 3,
    "checkpoint": 4,
    "driver": 4,
    "retriever": 3,
    "model": 3,
    "proxy": 2,
    "controller": 2,
    "web": 2,
    "s3": 2,
    "cluster": 3,
    "stop": 3,
    "full disk": 2,
    "slow disk": 1,
    "clock": 2,
}
BLOCK = 10
BLOWS = sum(SHARES.values()) // BLOCK
SCENES: Sequence[tuple[Benchmark, Storage]] = (
    ("hle", "folder"),
    ("hle", "folder"),
    ("hle", "folder"),
    ("hle", "folder"),
    ("hle", "s3"),
    ("hle", "s3"),
    ("hle", "disk"),
    ("hle", "disk"),
    ("tau2", "folder"),
    ("tau2", "s3"),
)
# The questions of the sample, and its twenty dialogues twice.
TASKS: Mapping[Benchmark, int] = {"hle": 60, "tau2": 40}
# After the first tasks, and before so few are left that the run could end first.
EARLIEST, LATEST = 0.05, 0.75
# Where many come one after the other, each of them later than it is meant to.
LATEST_OF_MANY = 0.6


@dataclass(frozen=True, slots=True)
class Blow:
    """One fault: struck once this share of the tasks is done."""

    kind: Kind
    at: float


@dataclass(frozen=True, slots=True)
class Round:
    """One run and what hits it. `number` seeds everything else that is left to chance in it."""

    number: int
    benchmark: Benchmark
    storage: Storage
    blows: tuple[Blow, ...]
    tasks: int
    # How long what is held up or away stays so.
    outage_s: tuple[float, float] = (1.5, 8.0)

    @property
    def title(self) -> str:
        return f"{self.benchmark} on {self.storage}: {', '.join(blow.kind for blow in self.blows)}"


@dataclass
class _Draft:
    benchmark: Benchmark
    storage: Storage
    kinds: list[Kind] = field(default_factory=list)

    def takes(self, kind: Kind) -> bool:
        """The retriever and the web are asked by questions alone, and one lost cluster is enough of it."""
        return (
            len(self.kinds) < BLOWS
            and (kind not in ("retriever", "web") or self.benchmark == "hle")
            and (kind != "s3" or self.storage == "s3")
            and (kind not in ("full disk", "slow disk") or self.storage == "disk")
            and (kind != "cluster" or "cluster" not in self.kinds)
        )


def rounds(first: int, last: int) -> Iterator[Round]:
    """The rounds of the seeds `first` to `last`, both of them (from 1 on)."""
    for seed in range(first, last + 1):
        yield _block((seed - 1) // BLOCK)[(seed - 1) % BLOCK]


def _block(number: int) -> list[Round]:
    rng = random.Random(f"block {number}")
    while True:
        drafts = [_Draft(*scene) for scene in rng.sample(SCENES, BLOCK)]
        if _dealt(drafts, rng):
            break
    return [
        _round(number * BLOCK + place, draft.benchmark, draft.storage, draft.kinds)
        for place, draft in enumerate(drafts, 1)
    ]


def _dealt(drafts: Sequence[_Draft], rng: random.Random) -> bool:
    """Deal a block's blows, those first that few rounds take; False where the last of them find no place."""
    deck = [kind for kind, share in SHARES.items() for _ in range(share)]
    empty = [_Draft(draft.benchmark, draft.storage) for draft in drafts]
    rng.shuffle(deck)
    for kind in sorted(deck, key=lambda kind: sum(draft.takes(kind) for draft in empty)):
        places = [draft for draft in drafts if draft.takes(kind)]
        if not places:
            return False
        rng.choice(places).kinds.append(kind)
    for draft in drafts:
        rng.shuffle(draft.kinds)
    return True


def _round(number: int, benchmark: Benchmark, storage: Storage, kinds: Sequence[Kind]) -> Round:
    """With many blows the moments are apart, or the last ones would come when all is done."""
    rng, share = random.Random(f"moments {number}"), (LATEST_OF_MANY - EARLIEST) / len(kinds)
    if len(kinds) > BLOWS:
        moments = [EARLIEST + share * (place + rng.random() / 2) for place in range(len(kinds))]
    else:
        moments = sorted(rng.uniform(EARLIEST, LATEST) for _ in kinds)
    blows = tuple(map(Blow, kinds, (round(at, 3) for at in moments)))
    return Round(number, benchmark, storage, blows, TASKS[benchmark])


def every_kind_once(seed: int) -> list[Round]:
    """Two runs that meet all kinds between them: the short form."""
    of_questions: list[Kind] = ["retriever", "web", "full disk", "slow disk", "clock", "worker", "checkpoint"]
    of_dialogues = [kind for kind in SHARES if kind not in of_questions]
    rng = random.Random(f"short {seed}")
    rng.shuffle(of_questions)
    rng.shuffle(of_dialogues)
    questions = _round(-2 * seed, "hle", "disk", of_questions)
    dialogues = _round(-2 * seed - 1, "tau2", "s3", of_dialogues)
    return [
        replace(questions, tasks=48, outage_s=(1.0, 2.0)),
        replace(dialogues, outage_s=(1.0, 2.5)),
    ]
