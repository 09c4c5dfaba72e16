"""How long things take, per tool, model and stage: worked out by hand from a few events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.log import open_run
from analysis.selection import EVERYTHING, LAST_SEGMENT, Selection
from analysis.timing import COLUMNS, Timing, quantities, timing
from analysis.usage import tool_table
from ray_app.records import Event
from tests.analysis.runs import event, model_call, tool_call, write_run


def timing_of(tmp_path: Path, *rows: Event, selection: Selection = EVERYTHING) -> Timing:
    return timing(open_run(write_run(tmp_path / "run", rows), selection))


def values(found: Timing) -> dict[tuple[str, str], list[float]]:
    return {(one.group, one.name): one.values.tolist() for one in found.series}


def search(**columns: Any) -> Event:
    return event("retrieval", task="a", tool="search", **{"duration_s": 0.5, **columns})


def test_each_series_holds_its_own_calls_in_its_own_unit(tmp_path: Path) -> None:
    found = timing_of(
        tmp_path,
        tool_call("search", 2.5, model="m"),
        tool_call("answer", 4.0, model="m"),
        tool_call("answer", 0.1, model="m", status="error"),
        model_call(
            "orchestrator", 9.0, model="o", queue_s=0.25, prefill_s=0.5, decode_s=1.0, prompt_tokens=30,
            completion_tokens=4,
        ),
        model_call("orchestrator", 8.0, model="o", prefill_s=0.25, prompt_tokens=50),
        model_call("expert", 3.0, tool="search", model="m", queue_s=0.75),
        model_call("judge", 7.0, model="m", decode_s=6.0),
        search(search_backend="local_only"),
        search(search_backend="tavily_fallback", duration_s=3.5),
        event("code", task="a", duration_s=1.5, exit_status=0),
        event("code", task="a", duration_s=60.0, exit_status=-9),
    )  # fmt: skip
    assert values(found) == {
        ("tool", "all tools"): [2.5, 4.0],
        ("tool", "search"): [2.5],
        ("tool", "answer"): [4.0],
        ("model", "m"): [3.0, 7.0],
        ("model", "o"): [8.0, 9.0],
        ("stage", "queue"): [0.25, 0.75],
        ("stage", "prefill"): [0.25, 0.5],
        ("stage", "decode"): [1.0, 6.0],
        ("stage", "orchestrator"): [8.0, 9.0],
        ("stage", "expert"): [3.0],
        ("stage", "judge"): [7.0],
        ("stage", "retrieval"): [0.5],
        ("stage", "web"): [3.5],
        ("stage", "code"): [1.5],
        ("orchestrator", "queue"): [0.25],
        ("orchestrator", "prefill"): [0.25, 0.5],
        ("orchestrator", "decode"): [1.0],
        ("orchestrator", "inference"): [1.5],
        ("tokens", "prompt"): [30, 50],
        ("tokens", "completion"): [4],
        ("tokens", "prompt + completion"): [34],
    }
    assert {(row.group, row.name): row.errors for row in found.rows if row.errors} == {
        ("tool", "all tools"): 1,
        ("tool", "answer"): 1,
        ("stage", "code"): 1,
    }
    assert found.row("tool", "all tools").stats.share_under_5s == 1.0
    assert found.row("tokens", "prompt").stats.share_under_5s is None


def test_the_parts_of_a_mean_call_add_up_to_it(tmp_path: Path) -> None:
    found = timing_of(
        tmp_path,
        tool_call("search", 6.0),
        tool_call("search", 2.0),
        model_call("expert", 4.0, tool="search", queue_s=0.5, prefill_s=0.5, decode_s=2.0),
        model_call("expert", 1.0, tool="search", queue_s=0.5, prefill_s=0.25, decode_s=0.25),
        search(duration_s=1.0),
        model_call("orchestrator", 2.0, queue_s=0.5, prefill_s=0.5, decode_s=1.0),
    )
    tool, orchestrator = found.components
    assert (tool.name, tool.calls, tool.mean_s) == ("search", 2, 4.0)
    expected = {"queue": 0.5, "prefill": 0.375, "decode": 1.125, "retrieval": 0.5, "other": 1.5}
    assert tool.parts == pytest.approx(expected)
    assert orchestrator.parts == {"queue": 0.5, "prefill": 0.5, "decode": 1.0}


def test_the_last_segment_is_the_newest_epoch_and_all_runs_are_all(tmp_path: Path) -> None:
    rows = [tool_call("search", 1.0), replace(tool_call("search", 2.0), epoch=2), event("run_start", epoch=2)]
    rows.append(replace(tool_call("search", 9.0), epoch=2, is_replayed=True))
    # A judge-only pass is no segment.
    rows.append(model_call("judge", 5.0, alias="second", epoch=3))
    run = write_run(tmp_path / "run", rows)
    assert values(timing(open_run(run, LAST_SEGMENT)))["tool", "search"] == [2.0]
    assert values(timing(open_run(run, EVERYTHING)))["tool", "search"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(tools=("search",)), [1.0, 2.0, 4.0]),
        (Selection(models=("gpt-5",)), [1.0]),
        (Selection(models=("gpt-5", "gpt-5-mini")), [1.0, 2.0]),
        (Selection(categories=("Math",)), [2.0]),
        (Selection(trials=(1,)), [4.0]),
        (Selection(statuses=("error",)), [8.0]),
        (Selection(benchmarks=("hle",)), [1.0, 2.0, 4.0]),
        (Selection(benchmarks=("frames",)), []),
        (Selection(tools=("searc",)), []),
    ],
)
def test_filters_compare_whole_values(tmp_path: Path, selection: Selection, expected: list[float]) -> None:
    found = timing_of(
        tmp_path,
        event("run_start", detail='{"benchmark": "hle"}'),
        tool_call("search", 1.0, model="gpt-5", category="Mathematics"),
        tool_call("search", 2.0, model="gpt-5-mini", category="Math"),
        tool_call("search", 4.0, trial=1),
        tool_call("search", 8.0, status="error"),
        selection=selection,
    )
    assert values(found).get(("tool", "all tools"), []) == expected
    assert bool(found.note) is (expected == [])


def test_of_a_dialogue_the_user_the_experts_and_the_environment_are_stages_of_their_own(
    tmp_path: Path,
) -> None:
    log = open_run(
        write_run(
            tmp_path / "run",
            [
                model_call("orchestrator", 2.0, model="o"),
                model_call("expert", 5.0, model="e", tool="call_expert"),
                tool_call("call_expert", 5.5, model="e"),
                tool_call("get_order", 0.25, alias="agent", call_seq=2),
                tool_call("turn_wifi_on", 0.5, alias="user", call_seq=3, status="error"),
                model_call("user", 3.0, model="u", prefill_s=1.0),
                model_call("judge", 1.0, model="o"),
            ],
        )
    )
    found = values(timing(log))
    stages = {name: times for (group, name), times in found.items() if group == "stage"}
    assert stages == {
        **{"orchestrator": [2.0], "expert": [5.0], "user": [3.0], "judge": [1.0]},
        **{"environment": [0.25], "prefill": [1.0]},
    }
    assert timing(log).row("stage", "environment").errors == 1
    (user,) = (row for row in timing(log).components if row.name == "user")
    assert user.parts == {"prefill": 1.0, "other": 2.0}
    names = [row.name for row in tool_table(log)]
    assert names == ["call_expert", "get_order", "turn_wifi_on", "orchestrator", "user", "judge"]


@pytest.mark.parametrize("models", [200, 300])
def test_few_words_and_many_are_told_apart(tmp_path: Path, models: int) -> None:
    names = [f"m{number % models}" for number in range(2 * models)]
    rows = [model_call("expert", 1.0 + place, model=name) for place, name in enumerate(names)]
    log = open_run(write_run(tmp_path, [*rows, tool_call("search", 1.0, model="")]), columns=COLUMNS)
    words = log.words("model")
    assert words.codes.itemsize == (1 if models < 256 else 4)
    for wanted in (["m7"], ["m7", "m199", "other"], [f"m{number}" for number in range(0, models, 9)], ["no"]):
        assert words.is_in(*wanted).sum() == 2 * len({*wanted} & {*names})
    found = {one.name: sorted(one.values.tolist()) for one in quantities(log) if one.group == "model"}
    assert found == {f"m{place}": [1.0 + place, 1.0 + place + models] for place in range(models)}
