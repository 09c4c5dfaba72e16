"""Two runs compared: what pairs, what counts, when there is a verdict, and what CI sees of it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from analysis.__main__ import app
from analysis.compare import Comparison, compare
from analysis.compare_page import comparison_page
from analysis.paired import difference_interval, randomisation_p
from analysis.seed_import import import_run
from analysis.settled import Tasks, read_tasks, tasks_of
from tests.analysis.runs import result, run_start, write_run

FACTS = {
    "benchmark": "hle",
    "protocol": "p",
    "judge_model": "j",
    "dataset": "d.jsonl",
    "scope_policy": "scoped",
}


def row(task: str, right: bool | None, outcome: str = "ok", **columns: Any) -> dict[str, Any]:
    keys = {
        "task_id": task,
        "rollout_key": f"r-{task}",
        "judge_key": f"j-{task}",
        "trial": 0,
        "category": "Math",
    }
    spent = {"cost_usd": 1.0, "duration_s": 10.0, "prompt_tokens": 90, "completion_tokens": 10, "turn": 2}
    rest = {"outcome": outcome, "is_correct": right, "error_kind": None, "detail": ""}
    return {**keys, **spent, **rest, **columns}


def tasks(*rows: dict[str, Any], **facts: Any) -> Tasks:
    return tasks_of(rows, {**FACTS, **facts})


def of_word(word: str, **facts: Any) -> Tasks:
    """A run whose task n is right where the word has a 1."""
    return tasks(*(row(f"t{n:02}", letter == "1") for n, letter in enumerate(word)), **facts)


def test_the_figures_of_the_pairs_are_those_of_the_tasks_that_differ() -> None:
    found = compare(of_word("1100110000"), of_word("1111110001"))
    n = found.overall.difference
    assert (found.overall.first, found.overall.second, n.n, n.discordance) == (0.4, 0.7, 10, 0.3)
    assert n.mean == pytest.approx(0.3)
    assert n.p_value == 0.25  # two of eight ways in which three coins fall
    assert n.interval == difference_interval([1.0] * 3 + [0.0] * 7)
    assert [flip.task_id for flip in found.to_right] == ["t02", "t03", "t09"] and found.to_wrong == []
    assert (found.verdict, found.reason.startswith("p = 0.25")) == ("cannot tell", True)


def test_the_noise_floors_of_both_runs_stand_beside_their_difference() -> None:
    once = compare(of_word("1100110000"), of_word("1111110001"))
    assert all(floor is not None and floor.is_bound for floor in once.noise)
    assert once.repeatable == pytest.approx(2.8016 * math.sqrt(0.4 * 0.6 / 10 + 0.7 * 0.3 / 10), rel=1e-4)
    rows = [row(f"t{n}", n + trial > 3, trial=trial) for n in range(6) for trial in range(2)]
    twice = compare(tasks(*rows, trials=2), tasks(*rows, trials=2))
    floor = twice.noise[0]
    assert floor is not None and floor.by_trial == (2 / 6, 3 / 6) and not floor.is_bound
    assert floor.run_sd == pytest.approx(math.sqrt(0.5 / 2) / 6)  # one task of six falls both ways
    page = Console(width=120, file=io.StringIO())
    page.print(comparison_page(twice))
    assert isinstance(page.file, io.StringIO)
    assert "sd 8.3 points by chance alone (sd between 2 trials 11.8)" in page.file.getvalue()


@pytest.mark.parametrize(
    ("better", "worse", "verdict"), [(8, 0, "better"), (0, 8, "worse"), (5, 0, "cannot tell")]
)
def test_a_verdict_takes_the_exact_test_and_the_interval(better: int, worse: int, verdict: str) -> None:
    first, second = "0" * better + "1" * worse, "1" * better + "0" * worse
    found = compare(of_word(first + "1" * 20), of_word(second + "1" * 20))
    assert found.verdict == verdict
    assert (len(found.to_right), len(found.to_wrong)) == (better, worse)


def test_what_is_not_settled_in_both_is_left_out_and_counted() -> None:
    first = tasks(
        row("both", True),
        row("limited", None, "limited"),
        row("overflow", None, "failed", error_kind="model"),
        row("down", None, "failed", error_kind="infrastructure"),
        row("owed", True),
        row("asked", True),
        row("judged", True),
        row("first", True),
    )
    second = tasks(
        *(row(name, True) for name in ("both", "limited", "overflow", "down", "second", "third")),
        row("owed", None, "owed"),
        row("asked", True, rollout_key="another", judge_key="another"),
        row("judged", True, judge_key="another"),
    )
    found = compare(first, second)
    pairing = found.pairing
    assert (pairing.pairs, pairing.only_first, pairing.only_second, pairing.unsettled) == (3, 1, 2, 2)
    assert (pairing.asked_otherwise, pairing.judged_otherwise) == (1, 1)
    pairing = compare(first, second, ignore_labels=True).pairing
    assert (pairing.pairs, pairing.asked_otherwise, pairing.by_id_alone) == (5, 0, True)
    assert [flip.task_id for flip in found.to_right] == ["limited", "overflow"]


def test_trials_of_a_task_are_one_observation() -> None:
    first = tasks(*(row("a", trial > 1, trial=trial) for trial in range(3)), row("b", True), row("c", False))
    second = tasks(row("a", True), row("a", None, "owed", trial=1), row("b", True), row("c", True, trial=4))
    found = compare(first, second)
    assert found.overall.first == pytest.approx(4 / 9) and found.overall.second == 1.0
    assert found.overall.difference.n == 3
    assert found.overall.difference.p_value == randomisation_p(
        [1 - first.settled["a"].share, 1 - first.settled["c"].share]
    )
    assert [(flip.task_id, flip.first, flip.second) for flip in found.to_right] == [
        ("c", "0/1", "1/1"),
        ("a", "1/3", "1/1"),
    ]


def test_ratios_are_over_tasks_that_have_them_and_leave_out_times_that_a_resume_cut() -> None:
    first = tasks(row("a", True, cost_usd=1.0), row("b", True, cost_usd=4.0), row("c", True, cost_usd=0.0))
    cut = json.dumps({"replayed_calls": 3})
    second = tasks(
        row("a", True, cost_usd=4.0, duration_s=20.0),
        row("b", True, cost_usd=4.0, duration_s=0.1, detail=cut),
        row("c", True, cost_usd=9.0, duration_s=20.0),
    )
    cost, latency, *_ = compare(first, second).ratios
    assert cost.typical.n == 2 and cost.typical.ratio == pytest.approx(2.0)
    assert cost.total.ratio == pytest.approx(1.6)
    assert latency.typical.n == 2 and latency.typical.ratio == pytest.approx(2.0)


def test_categories_have_their_own_figures_where_there_are_several() -> None:
    second = [row("a", True), row("b", True, category="Physics"), row("c", False, category="Physics")]
    first = [replaced | {"is_correct": False} for replaced in second]
    groups = compare(tasks(*first), tasks(*second)).by_category
    assert [(group.name, group.difference.n, group.difference.mean) for group in groups] == [
        ("Math", 1, 1.0),
        ("Physics", 2, 0.5),
    ]
    assert compare(of_word("01"), of_word("11")).by_category == []


@pytest.mark.parametrize("name", ["protocol", "judge_model", "benchmark", "scope_policy"])
def test_scores_that_mean_different_things_get_no_verdict(name: str) -> None:
    first, second = of_word("0" * 9), of_word("1" * 9, **{name: "another"})
    found = compare(first, second)
    assert (found.verdict, name.replace("_", " ") in found.reason) == ("cannot tell", True)
    assert compare(first, second, ignore_labels=True).verdict == "better"
    assert compare(first, of_word("1" * 9, **{name: ""})).verdict == "better"  # not said: no contradiction


def test_a_dataset_of_another_name_is_the_same_where_every_question_is() -> None:
    first, second = of_word("0" * 9), of_word("1" * 9, dataset="copy.jsonl")
    assert compare(first, second).verdict == "better"
    changed = dict(second.settled) | {"t00": replace(second.settled["t00"], judge_key="another")}
    assert "another dataset" in compare(first, replace(second, settled=changed)).reason


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """A run, and one that is worse."""
    places = []
    for name, wrong in (("first", 1), ("second", 9)):
        rows = [result(f"t{n}", "ok", n >= wrong, duration_s=1.0, category="Math") for n in range(30)]
        places.append(str(write_run(tmp_path / name, [run_start(30, **FACTS), *rows])))
    return places[0], places[1]


def run(*arguments: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, ["compare", *arguments])
    assert not outcome.stderr, outcome.stderr
    return outcome.exit_code, outcome.stdout


def test_the_exit_code_tells_ci(runs: tuple[str, str]) -> None:
    first, second = runs
    code, text = run(first, second)
    assert code == 1 and text.startswith("B is worse: p = 0.0078\n") and "right in A, wrong in B: 8" in text
    assert run(second, first)[0] == run(first, first)[0] == run(first, second, "--fail-on", "never")[0] == 0
    assert run(first, first, "--fail-on", "not-better")[0] == 1
    assert run(second, first, "--fail-on", "not-better")[0] == 0


def test_json_pictures_and_filters(runs: tuple[str, str], tmp_path: Path) -> None:
    code, text = run(*runs, "--json", "--out", str(tmp_path / "out"))
    found = json.loads(text)
    assert (code, found["verdict"], found["overall"]["difference"]["n"]) == (1, "worse", 30)
    assert list(found) == list(Comparison.__dataclass_fields__)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.png", "compare.svg"}
    assert "0 tasks pair" in run(*runs, "--category", "Physics", "--out", str(tmp_path / "none"))[1]
    assert "0 tasks pair" in run(*runs, "--trial", "1")[1]


def test_an_empty_a_torn_and_an_imported_run_are_told_in_words(runs: tuple[str, str], tmp_path: Path) -> None:
    empty = str(write_run(tmp_path / "empty", []))
    torn = str(write_run(tmp_path / "torn", [replace(run_start(1), detail="{"), result("t0", "ok", True)]))
    assert run(runs[0], empty)[1].startswith("Cannot tell: no task has a settled result in both runs")
    assert "1 tasks pair" in run(runs[0], torn)[1]
    (tmp_path / "hle.log").write_text(
        "[PROFILE] 2026-01-03 10:00:00.000 task=global thread=1 type=run_start\n"
    )
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "t0.json").write_text(json.dumps({"id": "t0", "correct": False}))
    import_run(tmp_path / "hle.log", tmp_path / "results", tmp_path / "old")
    text = run(runs[0], str(tmp_path / "old"), "--ignore-labels")[1]
    assert "1 tasks pair" in text and "Paired by id alone" in text
    assert read_tasks(tmp_path / "old").facts["protocol"] == "toolorchestra"
    outcome = CliRunner().invoke(app, ["compare", runs[0], str(tmp_path / "nowhere")])
    assert (outcome.exit_code, len(outcome.stderr.splitlines())) == (2, 1)
