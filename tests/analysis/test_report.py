"""`analyse`: complete and readable at every moment of a run's life."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest

from analysis.report import AnalysisOutput, analyse
from ray_app.errors import RunDirError
from ray_app.event_writer import EventWriter
from tests.analysis.runs import model_call, result, run_start, tool_call, write_run

ALWAYS = {"overview", "outcomes", "usage", "timing_parts"}


def assert_complete(output: AnalysisOutput, *groups: str) -> None:
    stems = ALWAYS | {f"timing_{group}" for group in groups} | ({"timeline"} if groups else set())
    names = {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")}
    assert {path.name for path in output.pictures} == names
    assert {path.name for path in output.stats.parent.iterdir()} == names | {"stats.json"}
    for path in output.pictures:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_statistics_agree_with_the_standard_library(tmp_path: Path) -> None:
    generator = random.Random(3)
    durations_s = [generator.lognormvariate(1, 1) for _ in range(60)]
    rows = [tool_call(generator.choice(["search", "answer"]), value) for value in durations_s]
    output = analyse(write_run(tmp_path / "run", [run_start(2), *rows, result("a", "ok", True)]))
    assert_complete(output, "tool")
    content = json.loads(output.stats.read_text())
    assert content["source"] == str(tmp_path / "run")
    metric = content["timing"]["rows"][0]
    assert (metric["name"], metric["unit"], metric["stats"]["n"]) == ("all tools", "s", 60)
    assert metric["stats"]["mean"] == pytest.approx(statistics.fmean(durations_s))
    assert metric["stats"]["std"] == pytest.approx(statistics.stdev(durations_s))
    assert metric["stats"]["p50"] == pytest.approx(statistics.median(durations_s))
    for scale in ("hist_linear", "hist_log"):
        assert sum(metric[scale]["counts"]) == 60
        assert len(metric[scale]["edges"]) == 11
    assert content["summary"]["accounting"]["accuracy"] == output.run.accounting.accuracy == 0.5
    assert [row["name"] for row in content["tools"]] == [row.name for row in output.tools]
    assert output.message.startswith("1 of 2 tasks have a result; accuracy 50.0% of all planned")


def test_an_empty_run_gives_a_sentence_and_panels_without_data(tmp_path: Path) -> None:
    output = analyse(write_run(tmp_path / "run", []))
    assert_complete(output)
    assert "nothing to analyse yet" in output.message
    assert "no data" in (output.stats.parent / "timing_parts.svg").read_text()
    assert "no data" in (output.stats.parent / "outcomes.svg").read_text()


def test_one_call_of_a_live_run_is_enough_to_draw(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "run", "w")
    writer.append(tool_call("search", 3.0))
    writer.flush()
    output = analyse(tmp_path / "run")
    writer.close()
    assert_complete(output, "tool")
    assert "no task has a result yet" in output.message
    assert "100.0%" in (output.stats.parent / "timing_tool.svg").read_text()


def test_zero_durations_and_hostile_names_are_drawn(tmp_path: Path) -> None:
    name = "$\\frac{[bold]$\x1b[31m\N{CJK UNIFIED IDEOGRAPH-65E5}\n" + "x" * 300
    rows = [
        tool_call(name, 0.0, model=name),
        model_call("orchestrator", prefill_s=0.0, decode_s=0.0, prompt_tokens=0, completion_tokens=0),
        *(result(f"t{number}", "ok", True, category=f"{name}{number}") for number in range(20)),
    ]
    output = analyse(write_run(tmp_path / "run", [run_start(20, protocol=name), *rows]))
    assert_complete(output, "tool", "model", "stage", "orchestrator", "tokens")
    assert "6 smaller categories not shown" in (output.stats.parent / "outcomes.svg").read_text()


def test_pictures_go_where_they_are_sent_and_replace_older_ones(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", [tool_call("search", 3.0)]), tmp_path / "out" / "here"
    out.mkdir(parents=True)
    (out / "overview.png").write_text("older")
    assert_complete(analyse(run, out), "tool")
    assert not (run / "analysis").exists()


def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"file/out: .*expected a writable folder"):
        analyse(write_run(tmp_path / "run", []), tmp_path / "file" / "out")
