from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.figures import Figure
from benchmarks.retriever import main, told
from benchmarks.retriever_data import Data
from benchmarks.retriever_disturbed import Load, Pair, median_of, pairs
from benchmarks.retriever_sections import table, worst_of
from benchmarks.retriever_stand import Ran, Stand, Target, median_ratio, p99, rounds
from benchmarks.stub_encoder import NOOP

ROOT = Path(__file__).parents[2]
# Of the rows that must be reached, how each begins.
ROWS = (
    "throughput against a plain server, ",
    "throughput against the reference design reading rows through datasets",
    "throughput against the reference design with an in-memory id array",
    "latency of a lone request against the plain server: by handle",
    "latency of a lone request against the plain server: over HTTP",
    "recall@50 in scope",
    "mean batch against the plain server's in the same conditions",
    "p99 of ordinary requests while three fallbacks of",
    "one 30,000-token query among 255 short ones: p99 of the short ones, against without it",
    "RssAnon of a replica with",
)
FIRST, SECOND, THIRD = (Target(name, f"http://{name}", 0, dict) for name in ("first", "second", "third"))
ONE = Ran(FIRST, 2, 4.0, [10.0, 20.0, 30.0, 40.0], [], [], {}, 2.0, 0, 0.02, 100.0, {"server": 0.04})


class Recorder(Stand):
    """A stand whose rounds only note what they would load, and whether something is beside it."""

    def __init__(self) -> None:
        super().__init__(Data(Path(), []), threads=1)
        self.order: list[tuple[str, bool]] = []

    def run(self, target: Target, clients: int, count: int, **job: Any) -> Ran:
        self.order.append((target.name, bool(job.get("extra"))))
        latencies_ms = [float(len(self.order))] * count
        return replace(ONE, target=target, clients=clients, latencies_ms=latencies_ms)


def test_a_ratio_is_of_what_one_round_saw_and_the_median_over_the_rounds() -> None:
    assert median_ratio(iter([(90.0, 100.0), (10.0, 10.0), (300.0, 100.0)])) == 1
    # Not the ratio of the medians, which a machine that slows down between rounds would move.
    assert median_ratio(iter([(100.0, 100.0), (10.0, 20.0), (1.0, 4.0)])) == 0.5


def test_the_99th_percentile_is_never_more_than_the_largest_value() -> None:
    assert p99([float(value) for value in range(101)]) == 99
    assert p99([1.0, 2.0]) == pytest.approx(1.99)


def test_a_round_is_told_per_second_and_per_request() -> None:
    assert (ONE.per_s, ONE.p50_ms, ONE.encode_ms) == (1, 25, 5)
    assert ONE.cpu_ms == {"server": 10}


def test_each_round_begins_with_another_server_and_is_told_in_one_order() -> None:
    stand = Recorder()
    done = rounds(stand, [FIRST, SECOND, THIRD], 1, 1, 3)
    begun = [name for name, _ in stand.order[::3]]
    assert begun == ["first", "second", "third"]
    assert [[ran.target for ran in each] for each in done] == [[FIRST, SECOND, THIRD]] * 3


def test_what_disturbs_comes_first_in_every_other_pair() -> None:
    stand = Recorder()
    done = pairs(stand, FIRST, Load(1, 3), 3, lambda number: [(f"query {number}", "none")])
    assert [beside for _, beside in stand.order] == [False, True, True, False, False, True]
    assert [(pair.alone.p99_ms, pair.beside.p99_ms) for pair in done] == [(1, 2), (4, 3), (5, 6)]
    assert median_of(done) == pytest.approx(6 / 5)


def test_a_disturbance_is_judged_by_its_own_round() -> None:
    slow = replace(ONE, latencies_ms=[ms * 3 for ms in ONE.latencies_ms])
    assert Pair(ONE, slow).ratio == pytest.approx(3)
    assert median_of([Pair(ONE, slow), Pair(ONE, ONE), Pair(ONE, ONE)]) == 1


def test_a_table_has_the_medians_of_each_server() -> None:
    fast = replace(ONE, seconds=1.0, rss_mib=300.0)
    values = {
        figure.name.rpartition(": ")[2]: figure.value for figure in table(NOOP, [[ONE], [fast], [fast]])
    }
    assert values == {
        "throughput": 4,
        "p50": 25,
        "p99": pytest.approx(39.7),
        "mean batch": 2,
        "time in the encoder per request": 5,
        "RSS of its process": 300,
        "CPU per request, server": 10,
    }


def test_the_worst_is_judged_and_the_others_are_told() -> None:
    figures = list(worst_of(Figure("speed", 0.8, ">=", 0.9), {"by handle": 0.8, "over HTTP": 1.1}))
    assert [figure.is_reached for figure in figures] == [False, True, True]
    assert [figure.name for figure in figures] == ["speed", "  speed: by handle", "  speed: over HTTP"]


def test_the_small_size_judges_the_recall_alone() -> None:
    assert told(Figure("throughput", 0.1, ">=", 0.9)).is_reached
    assert not told(Figure("recall@50 in scope", 0.9, "==", 1.0)).is_reached


def test_a_section_that_does_not_exist_is_named() -> None:
    app = typer.Typer()
    app.command()(main)
    ran = CliRunner().invoke(app, ["--section", "speed"])
    assert ran.exit_code == 2
    assert "'speed' is unknown" in " ".join(ran.output.replace("│", " ").split())


@pytest.mark.long
@pytest.mark.cluster
def test_the_small_size_runs_every_part_and_finds_everything(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.retriever", "--small", "--json", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Serve in throughput mode behind" in ran.stdout
    figures = {figure["name"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert [row for row in ROWS if not any(name.startswith(row) for name in figures)] == []
    assert [name for name, figure in figures.items() if figure["op"]] == ["recall@50 in scope"]
    assert figures["recall@50 in scope"]["value"] == 1
    assert figures["  recall@50 in scope: reference, ids, k=100"]["value"] < 0.95
