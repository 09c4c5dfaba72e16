"""The page of a run as a file: what it holds, what it withholds, what it leaves out, and that it is inert."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis.gated import gated_reason
from analysis.log import open_run
from analysis.page import COLUMNS_READ, write_page
from analysis.page_parts import LEAST_DOCUMENT, LEAST_TEXT, Packed, lettered, pack, plan, unlettered, unpacked
from analysis.page_tasks import Most, Vocabulary, parts_of, tasks_of
from analysis.page_texts import CUT_BYTES, Texts, cut
from analysis.questions import Questions
from analysis.story import story_of
from ray_app.errors import RunDirError
from ray_app.event_writer import EventWriter
from ray_app.journal import RETRIEVAL
from ray_app.records import Hit, Retrieval
from tests.analysis.pages import (
    HARM,
    HARMED_ID,
    NOISE_CHARS,
    SECRET,
    TASKS,
    TEXTS,
    contents,
    with_questions,
    write_hostile,
    write_noise,
)
from tests.analysis.runs import Teller


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated")
    write_hostile(folder / "run", benchmark="hle", dataset=str(folder / "q.jsonl"))
    with_questions(folder / "run", folder / "q.jsonl")
    return folder / "run"


def test_texts_of_a_gated_set_are_withheld_unless_they_are_asked_for(gated: Path, tmp_path: Path) -> None:
    page = write_page(gated, tmp_path / "page.html")
    markup, packed = contents(page.path)
    assert "gated" in page.withheld and "--no-redact" in markup and page.tasks == TASKS
    for text in TEXTS:
        assert not any(text in body for body in packed)
    assert SECRET not in markup and "needle-07" not in "".join(packed)
    shown = write_page(gated, tmp_path / "whole.html", redact=False)
    everything = "".join(contents(shown.path)[1])
    assert not shown.withheld and all(text in everything for text in (*TEXTS, "needle-07", "because"))


def test_a_set_is_open_only_where_it_is_known_to_be() -> None:
    assert gated_reason({"benchmark": "hle", "dataset": "sample"}) == ""
    assert gated_reason({"benchmark": "tau2", "dataset": "retail"}) == ""
    assert "hle" in gated_reason({"benchmark": "hle", "dataset": "cais/hle"}) and gated_reason({})


def test_what_models_and_ids_say_cannot_become_markup(gated: Path, tmp_path: Path) -> None:
    markup = contents(write_page(gated, tmp_path / "page.html", redact=False).path)[0]
    assert (
        markup.count("<script") == markup.count("</script>") == 2 + 3
    )  # data, program, one part of each kind
    assert "<img" not in markup and "window.pwned = " in markup and HARM not in markup
    data = markup.partition('id="data">')[2].partition("</script>")[0]
    assert HARMED_ID in json.loads(data)["tasks"]["id"]


def test_the_page_tells_the_same_rows_in_the_same_order_as_show(gated: Path, tmp_path: Path) -> None:
    markup, packed = contents(write_page(gated, tmp_path / "page.html").path)
    data = json.loads(markup.partition('id="data">')[2].partition("</script>")[0])
    columns, words, first = json.loads(packed[0]), data["words"], 0
    for task, count in enumerate(columns["count"]):
        story = story_of(gated, data["tasks"]["id"][task])
        steps = [step for attempt in story.attempts for turn in attempt.turns for step in turn.steps]
        own = range(first, first + count)
        told = [
            (words[columns["kind"][at]], words[columns["model"][at]], words[columns["status"][at]])
            for at in own
        ]
        assert told == [(step.kind, step.model, step.status) for step in steps]
        spans = [columns["duration_s"][at] * 1e-4 for at in own]
        assert spans == pytest.approx([step.duration_s for step in steps], abs=5e-5)
        began = np.cumsum(columns["since"])[list(own)] / 1e6
        starts = [attempt.t_start for attempt in story.attempts for turn in attempt.turns for _ in turn.steps]
        at = [start + step.at_s for start, step in zip(starts, steps, strict=True)]
        assert began.tolist() == pytest.approx(at, abs=1e-5, rel=0)
        first += count
    assert first == len(columns["kind"]) and len(columns["count"]) == TASKS


def test_questions_are_shown_only_from_the_file_that_the_run_asked(gated: Path, tmp_path: Path) -> None:
    log = tmp_path / "run"
    write_hostile(log, benchmark="hle", dataset=str(tmp_path / "q.jsonl"))
    with_questions(log, tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text() + "\n")
    markup, packed = contents(write_page(log, tmp_path / "page.html", redact=False).path)
    assert SECRET not in "".join(packed) and "is not the file that this run asked" in markup


def test_a_text_is_cut_between_characters_and_says_how_many_are_left_out() -> None:
    assert cut("abc", 3) == ("abc", 0) and cut("abcd", 3) == ("abc", 1)
    assert cut("aäöü", 4) == ("aä", 2) and cut("a\ud800b", 9) == ("a?b", 0)


@pytest.mark.parametrize("is_planned", [True, False], ids=["planned", "mended after packing"])
def test_what_does_not_fit_is_cut_further_documents_first_and_figures_never(
    tmp_path: Path, is_planned: bool
) -> None:
    log = open_run(write_noise(tmp_path / "run", tasks=50), columns=COLUMNS_READ)
    tasks, words = tasks_of(log), Vocabulary(log)
    with Texts(log, withheld=False) as texts:

        def packed(most_bytes: int) -> Packed:
            most = plan(texts, tasks, most_bytes) if is_planned else Most()
            parts = parts_of(tasks, words, texts, Questions(), most)
            found = pack(parts, "[]", texts, most, most_bytes)
            assert found.size <= most_bytes and found.tasks == [50]
            return found

        whole, some, hardly = packed(10**6), packed(55_000), packed(21_000)
    assert whole.most == Most(CUT_BYTES, CUT_BYTES) == Most()
    assert some.most.text == CUT_BYTES and LEAST_DOCUMENT <= some.most.document < CUT_BYTES
    assert LEAST_TEXT < hardly.most.text < CUT_BYTES and hardly.most.document == 0
    assert whole.packing == "deflate" and some.packing == hardly.packing == "lzma"
    assert some.size > 40_000 and hardly.size > 14_000
    figures = [unpacked(found.figures[0], found.packing) for found in (whole, some, hardly)]
    assert figures[0] == figures[1] and '"prompt_tokens"' in figures[2]
    assert json.loads(figures[2])["prompt_tokens"] == json.loads(figures[0])["prompt_tokens"]
    for found, most in ((whole, CUT_BYTES), (hardly, hardly.most.text)):
        flat = json.loads(unpacked(found.texts[0], found.packing).splitlines()[0])
        (place,) = (at for at in range(0, len(flat), 4) if words.pieces[flat[at + 1]] == "reply")
        assert len(flat[place + 2]) == most and len(flat[place + 2]) + flat[place + 3] == NOISE_CHARS


def test_a_document_found_by_many_tasks_stands_in_the_page_once(tmp_path: Path) -> None:
    log = EventWriter(tmp_path / "run", "w")
    for number in range(120):  # three parts
        tell = Teller(log, f"task-{number}")
        hits = Hit(7, "found again and again", 0.5), Hit(number, f"of task {number} alone", 0.25)
        tell.call(RETRIEVAL, Retrieval(hits), number, turn=0, tool="search")
    log.close()
    markup, packed = contents(write_page(tmp_path / "run", tmp_path / "page.html", redact=False).path)
    data = json.loads(markup.partition('id="data">')[2].partition("</script>")[0])
    shelf = json.loads(packed[-1])
    assert data["shelves"] == [121] and len(data["parts"]) == 3
    assert shelf[::2].count("found again and again") == 1 and shelf[-2] == "of task 119 alone"
    places = [place for part in packed[:3] for place in json.loads(part)["hits"][4]]
    assert places[::2] == [0] * 120 and sorted(places[1::2]) == list(range(1, 121))


@pytest.mark.parametrize("size", [*range(17), 1000])
def test_letters_give_back_every_byte(size: int) -> None:
    body = np.random.default_rng(size).bytes(size)
    letters = lettered(body)
    assert unlettered(letters) == body and len(letters) == 1 + -(-8 * size // 15)
    assert all("\u3400" <= letter < "\ub400" for letter in letters)


def test_a_file_that_cannot_be_written_is_one_sentence(gated: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="expected a file that can be written"):
        write_page(gated, tmp_path / "file" / "page.html")
