"""Whether a run survives everything that can die around it: `python -m benchmarks.chaos --seeds 1..54`.

A seed is a run of the sample or of the service desk on a real cluster, with four blows (tests/chaos/plan.py
has the kinds); 54 seeds are a full pass: 216 blows, of which some come after the end of their run. A pass
can be interrupted: `--folder` keeps what was played, and the same command goes on. What a seed does follows
from its number, so a round that failed is played again by `--seeds 17..17 --again`.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.figures import Figure, report
from ray_app import rundir
from tests.chaos.plan import SHARES, Round, every_kind_once, rounds
from tests.chaos.play import play
from tests.chaos.world import world

FULL = "1..54"
FULL_BLOWS = 200
MOST_MINUTES = 75.0
LEAST_CLUSTERS = 15


def parse(seeds: str) -> tuple[int, int]:
    """`a..b`, or one number. Raises typer.BadParameter."""
    first, _, last = seeds.partition("..")
    try:
        found = int(first), int(last or first)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise typer.BadParameter(f"--seeds {seeds}: expected a..b, numbers from 1 on, as in {FULL}")
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def played(folder: Path) -> list[dict[str, Any]]:
    """What earlier commands put down, a round or a session each."""
    file = folder / "rounds.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def put_down(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def pass_over(todo: Sequence[Round], folder: Path) -> None:
    """Play these rounds on one cluster and put each down when it is over."""
    began = time.monotonic()
    with world(folder / f"world-{time.time_ns()}") as found:
        say(f"cluster and services are up after {time.monotonic() - began:.0f} s")
        found.learn(*todo)
        spent = time.monotonic() - began
        put_down(folder, {"start_s": spent})
        for one in todo:
            say(f"seed {one.number}: {one.title}")
            outcome = play(found, one, folder, say)
            put_down(folder, asdict(outcome))
            say(f"seed {one.number}: {'good' if outcome.is_good else 'BAD'} after {outcome.seconds:.0f} s")
            for name in ("lost", "double", "hung", "wrong", "broken", "missed"):
                for line in getattr(outcome, name):
                    say(f"  {name}: {line}")
            if not outcome.is_good:
                found.start_again()  # what this round left behind must not be the next one's


def figures(entries: Sequence[dict[str, Any]], wanted: Sequence[Round]) -> Iterator[Figure]:
    """The figures of the newest play of each wanted round."""
    newest = {entry["round"]: entry for entry in entries if "round" in entry}
    found = [newest[one.number] for one in wanted if one.number in newest]
    kinds = Counter(blow["kind"] for each in found for blow in each["struck"])
    is_full = sum(len(one.blows) for one in wanted) >= FULL_BLOWS
    yield Figure("rounds played", len(found), "==", len(wanted))
    yield Figure("blows struck", kinds.total(), ">=" if is_full else None, FULL_BLOWS if is_full else None)
    yield Figure("  kinds of blows", len(kinds), "==" if is_full else None, len(SHARES) if is_full else None)
    for kind in SHARES:
        is_judged = is_full and kind == "cluster"
        least = LEAST_CLUSTERS if is_judged else None
        yield Figure(f"  {kind}", kinds[kind], ">=" if is_judged else None, least)
    for name in ("lost", "double", "hung", "wrong"):
        what = {"double": "double counted", "wrong": "wrong result"}.get(name, name)
        yield Figure(f"seeded kills over all kinds: {what}", sum(len(each[name]) for each in found), "==", 0)
    yield Figure("  other promises broken", sum(len(each.get("broken", ())) for each in found), "==", 0)
    yield Figure(
        "  calls made again without a blow that explains it", sum(each["repeated"] for each in found)
    )
    codes = sum(code != 0 for each in found for code in each["codes"])
    yield Figure("  commands that ended with failures and were typed again", codes)
    yield Figure("  blows that came too late", sum(len(each["missed"]) for each in found))
    started = sum(entry.get("start_s", 0.0) for entry in entries)
    minutes = (started + sum(each["seconds"] for each in found)) / 60
    bound = MOST_MINUTES if is_full else None
    yield Figure("wall time of the full pass on two cores", minutes, "<=" if is_full else None, bound, "min")


def main(
    seeds: Annotated[str, typer.Option(help="a..b; a full pass is 1..54.")] = FULL,
    folder: Annotated[Path | None, typer.Option(help="What was played, to go on with.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Play also what was played.")] = False,
    quick: Annotated[bool, typer.Option(help="Every kind once, in two runs.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Play seeded rounds of blows and count what they did."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the cluster ends with it
    wanted = every_kind_once(parse(seeds)[0]) if quick else list(rounds(*parse(seeds)))
    folder = folder or rundir.home() / "chaos"
    folder.mkdir(parents=True, exist_ok=True)
    known = {entry["round"] for entry in played(folder) if "round" in entry}
    todo = [one for one in wanted if again or one.number not in known]
    if todo:
        say(f"{len(todo)} rounds to play, kept in {folder}")
        pass_over(todo, folder)
    raise typer.Exit(report(list(figures(played(folder), wanted)), json_path))


if __name__ == "__main__":
    typer.run(main)
