"""Ordinary requests while something large goes on: a fallback to the web, a very long query.

Each comparison is of pairs of rounds, one alone and one with the disturbance beside it, in an order that
changes from pair to pair. A disturbance that did not happen, or one that was not asked for, is an error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.figures import Figure
from benchmarks.retriever_data import EMPTY_EIDS
from benchmarks.retriever_stand import WEB_KEY_VARIABLE, Ran, Stand, Target, p99
from benchmarks.stub_encoder import CHARS_PER_TOKEN, PACED

SEARCH_S, PAGE_S = 1.0, 6.0
FALLBACKS = 3
LONG_TOKENS, SHORT_QUERIES = 30_000, 255
# More than any client sends before its time is over.
NO_END = 100_000

Extra = list[tuple[str, str]]


class Pair(NamedTuple):
    """Two rounds of the same load."""

    alone: Ran
    beside: Ran

    @property
    def ratio(self) -> float:
        return self.beside.p99_ms / self.alone.p99_ms


@dataclass(frozen=True)
class Load:
    """What is sent in each round. With `seconds`, the round ends then."""

    clients: int
    count: int
    seconds: float | None = None

    def run(self, stand: Stand, target: Target, extra: Extra) -> Ran:
        job: dict[str, Any] = {} if self.seconds is None else {"seconds": self.seconds}
        return stand.run(target, self.clients, self.count, extra=extra, **job)


def pairs(stand: Stand, target: Target, load: Load, times: int, extra: Callable[[int], Extra]) -> list[Pair]:
    """So many pairs; `extra(number)` is what is sent beside the load of one of them."""
    done = []
    for number in range(times):
        beside = extra(number)
        if number % 2:
            with_it, without = load.run(stand, target, beside), load.run(stand, target, [])
        else:
            without, with_it = load.run(stand, target, []), load.run(stand, target, beside)
        done.append(Pair(without, with_it))
    return done


def median_of(done: Sequence[Pair]) -> float:
    return statistics.median(pair.ratio for pair in done)


def fallbacks(stand: Stand, clients: int, seconds: float, times: int) -> Iterator[Figure]:
    """Three fallbacks that take as long as the round, beside ordinary requests."""
    share = seconds / (SEARCH_S + PAGE_S)
    web = {
        "base_url": stand.web(share * SEARCH_S, share * PAGE_S),
        "api_key_env": WEB_KEY_VARIABLE,
        "cache_dir": str(stand.folder / "web"),
        "max_concurrency": 20 * FALLBACKS,
    }
    load = Load(clients, NO_END, seconds)
    found: dict[Target, list[Pair]] = {}
    for target in stand.ours("web", encoder=PACED, web=web):
        found[target] = pairs(stand, target, load, times, lambda number: _unknown(target.name, number))  # noqa: B023
        _check_fallbacks(found[target])
    name = f"p99 of ordinary requests while three fallbacks of {seconds:g} s run, against none running"
    yield Figure(name, max(map(median_of, found.values())), "<=", 1.3)
    reference = stand.reference(PACED, "ids", fallback_s=seconds)
    found[reference] = pairs(stand, reference, load, 1, lambda number: _unknown("reference", number))
    yield from told(found, ("with none", "with three", "a fallback takes"), "ordinary requests")


def _unknown(name: str, number: int) -> Extra:
    """Queries without local hits, different each time: what a cache has is no fallback."""
    return [(f"{name} {number} {eid}", eid) for eid in EMPTY_EIDS[:FALLBACKS]]


def _check_fallbacks(done: Sequence[Pair]) -> None:
    for alone, beside in done:
        if alone.fallbacks or beside.fallbacks != FALLBACKS or 0 in beside.extra_hits:
            raise RuntimeError(
                f"{alone.target.name}: {alone.fallbacks} and {beside.fallbacks} fallbacks, which found "
                f"{beside.extra_hits} pages; expected none, {FALLBACKS}, and some pages each"
            )


def long_query(stand: Stand, times: int, each: int) -> Iterator[Figure]:
    """Short queries that come at once, with a very long one in their midst; the same in a closed loop.

    `times` bursts with and without, a quarter as many loops, of `each` queries of each client.
    """
    text = "word " * (LONG_TOKENS * CHARS_PER_TOKEN // 5)
    extra = [(text, stand.data.queries[0].eid)]
    targets = [*stand.ours("paced", encoder=PACED), stand.plain(PACED)]
    burst = Load(SHORT_QUERIES, SHORT_QUERIES)
    found = {target: pairs(stand, target, burst, times, lambda number: extra) for target in targets}
    name = f"one {LONG_TOKENS:,}-token query among {SHORT_QUERIES} short ones: p99 of the short ones"
    yield Figure(f"{name}, against without it", max(median_of(found[t]) for t in targets[:2]), "<=", 1.5)
    yield from told(found, ("without it", "with it", "the long one takes"), "the short ones")
    for target, done in found.items():
        sides = [[ms for pair in done for ms in pair[side].latencies_ms] for side in (0, 1)]
        yield Figure(f"  the same of all bursts together: {target.name}", p99(sides[1]) / p99(sides[0]))
    loop = Load(SHORT_QUERIES, SHORT_QUERIES * each)
    looped = {
        target: pairs(stand, target, loop, max(1, times // 4), lambda number: extra) for target in targets
    }
    for target, done in looped.items():
        yield Figure(f"  the same where each client sends {each}: {target.name}", median_of(done))


def told(found: Mapping[Target, Sequence[Pair]], names: tuple[str, str, str], who: str) -> Iterator[Figure]:
    """What stands behind a ratio, for each server. `names`: of both sides, and of the disturbance."""
    without, with_it, takes = names
    for target, done in found.items():
        yield Figure(f"  the same: {target.name}", median_of(done))
        for side, name in ((0, without), (1, with_it)):
            p99_ms = statistics.median(pair[side].p99_ms for pair in done)
            yield Figure(f"  p99 of {who}, {name}: {target.name}", p99_ms, unit="ms")
        took_ms = statistics.median(ms for pair in done for ms in pair.beside.extra_ms)
        yield Figure(f"  {takes}: {target.name}", took_ms / 1000, unit="s")
