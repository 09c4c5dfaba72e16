"""The page of a run in a real Chromium: it asks nobody, runs nothing of a run's texts, and works by keys."""

from __future__ import annotations

import codecs
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from analysis.page import MOST_BYTES, write_page
from benchmarks.analysis_run import make_run, write_finished
from benchmarks.analysis_texts import write_texts
from benchmarks.chromium import NAMES, OPTIONS, READY, chromium
from tests.analysis.pages import HARM, SECRET, TASKS, with_questions, write_hostile
from tests.analysis.runs import event, write_run

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    if path is None:
        pytest.skip(f"no Chromium here ({', '.join(NAMES)}): apt-get install chromium, and these tests run")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a page file; at the end, it must have asked for nothing and complained of nothing."""
    said, pages = list[str](), list[Page]()

    def open_page(path: Path, **options: Any) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1300, "height": 800}, **options})
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        page.wait_for_selector(READY)
        return page

    yield open_page
    assert [page.evaluate("window.pwned") for page in pages] == [None] * len(pages)
    assert not said
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_hostile(folder / "run", benchmark="hle", dataset=str(folder / "questions.jsonl"))
    with_questions(folder / "run", folder / "questions.jsonl")
    return folder / "run"


@pytest.fixture(scope="module")
def whole(run_dir: Path) -> Path:
    return write_page(run_dir, run_dir.parent / "whole.html", redact=False).path


def go(page: Page, *keys: str, until: str) -> None:
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_selector(f"html[data-shown^='{until}']")


def rows(page: Page, column: int = 2) -> list[str]:
    return page.locator(f".row > :nth-child({column})").all_inner_texts()


def test_a_task_is_found_opened_read_and_left_by_keys_alone(opened: Open, whole: Path) -> None:
    page = opened(whole)
    go(page, "/", until="tasks")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("NEEDLE-1")
    expect(page.locator("#count")).to_have_text(f"10 of {TASKS} tasks")
    assert rows(page) == [f"task-{number}" for number in range(10, 20)]
    page.keyboard.press("Enter")  # out of the field
    go(page, "j", "ArrowDown", "ArrowDown", "k", "Enter", until="task/12")
    assert page.locator("h2").inner_text() == "task-12"
    assert page.locator("mark").all_inner_texts() == ["needle-1"]
    assert "--full task-12" in page.locator("#show-command").inner_text()
    go(page, "j", until="task/13")
    page.keyboard.press("e")
    assert page.locator("details.turn[open]").count() == 0
    go(page, "Escape", until="tasks")
    assert page.locator("[aria-selected=true] .id").inner_text() == "task-13"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    go(page, "1", until="overview")


def test_what_models_wrote_is_shown_as_it_is_and_nothing_of_it_runs(opened: Open, whole: Path) -> None:
    page = opened(whole)
    page.goto(f"{whole.as_uri()}#/task/0")
    page.wait_for_selector(".turn")
    page.locator(".hits summary").click()
    page.wait_for_selector("text=five dozen jugs")
    texts = page.locator("pre").all_inner_texts()
    assert sum(HARM in text for text in texts) >= 6 and any(text.startswith(SECRET) for text in texts)
    assert page.locator("main img, main script").count() == 0
    cut = page.locator(".cut").first.inner_text()
    assert "more characters are left out" in cut and "python -m analysis show" in cut
    command = page.locator("#show-command").inner_text()
    assert "'\\''" in command  # the quote in the id does not end the shell's
    assert {"queue", "judge"} & set(page.locator(".legend li").all_inner_texts())
    page.keyboard.press("?")
    page.keyboard.press("Escape")
    for key, name in enumerate(["overview", "timing", "usage", "path", "tasks"], 1):
        go(page, str(key), until=name)
        assert page.locator("main h2").count() >= 1


def test_lists_and_tables_sort_and_filter(opened: Open, whole: Path) -> None:
    page = opened(whole)
    go(page, "5", until="tasks")
    page.get_by_role("columnheader", name="took").get_by_role("button").click()
    assert rows(page)[:2] == ["task-39", "task-38"]
    page.get_by_role("columnheader", name="took").get_by_role("button").click()
    assert rows(page, 7)[1] == "1 s" and page.locator("[aria-sort=ascending]").inner_text().startswith("took")
    page.locator("#filter-state").select_option("limited")
    assert rows(page) == ["task-10", "task-20", "task-30"]
    page.locator("#filter-model").select_option("qwen")
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("#count")).to_have_text(f"{TASKS} of {TASKS} tasks")
    go(page, "Escape", "3", until="usage")
    model = page.locator("section", has_text="By tool and model").locator("tbody td:nth-child(2)")
    calls = page.locator("section", has_text="By tool and model").locator("tbody td:nth-child(3)")
    page.locator("section", has_text="By tool and model").get_by_role("button", name="calls").click()
    counts = [int(text) for text in calls.all_inner_texts()]
    assert counts == sorted(counts, reverse=True) and counts[0] == 20 and model.first.inner_text() == "gpt"


def test_a_gated_page_says_in_its_place_that_a_text_is_withheld(
    opened: Open, run_dir: Path, tmp_path: Path
) -> None:
    path = write_page(run_dir, tmp_path / "page.html").path
    page = opened(path, color_scheme="dark", viewport={"width": 420, "height": 800})
    assert "--no-redact" in page.locator("#banner").inner_text()
    page.goto(f"{path.as_uri()}#/task/1")
    page.wait_for_selector(".turn")
    assert "reply: text withheld" in page.locator(".step").first.inner_text()
    assert "needle" not in page.content()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    back, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    assert back == "rgb(20, 23, 27)" and ink == "rgb(228, 232, 236)"


def test_a_page_that_was_cut_says_so_and_unpacks_what_it_packed_denser(
    opened: Open, run_dir: Path, tmp_path: Path
) -> None:
    written = write_page(run_dir, tmp_path / "page.html", redact=False, most_bytes=5000)
    page = opened(written.path)
    assert f"first {written.text_bytes} bytes of each text" in page.locator("#banner").inner_text()
    go(page, "/", until="tasks")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("needle-07")
    expect(page.locator("#count")).to_have_text(f"1 of {TASKS} tasks")
    go(page, "Enter", "Enter", until="task/7")
    assert "number 7 says needle-07" in page.locator("pre").all_inner_texts()
    page.goto(f"{written.path.as_uri()}#/task/0")
    page.wait_for_selector(".hits")
    page.locator(".hits summary").click()
    assert "left out of this page" in page.locator(".hits").inner_text()


def halves(path: Path) -> tuple[bytes, bytes]:
    """A page, cut in the middle of its packed texts."""
    body = path.read_bytes()
    wide = body.startswith(codecs.BOM_UTF16)
    begins = body.index('id="texts-0"'.encode("utf-16-le" if wide else "ascii"))
    ends = body.index("</script>".encode("utf-16-le" if wide else "ascii"), begins)
    middle = (begins + ends) // 2
    middle += middle % 2  # no half letter
    return body[:middle], body[middle:]


@pytest.mark.parametrize("most_bytes", [MOST_BYTES, 5000], ids=["plain", "dense"])
def test_a_text_whose_second_half_is_still_on_its_way_is_waited_for(
    browser: Browser, opened: Open, run_dir: Path, tmp_path: Path, most_bytes: int
) -> None:
    path = write_page(run_dir, tmp_path / "page.html", redact=False, most_bytes=most_bytes).path
    told = opened(path)
    go(told, "5", "Enter", until="task/0")
    first, second = halves(path)
    comes, said = threading.Event(), list[str]()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(first)
            assert comes.wait(20)
            self.wfile.write(second)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/", wait_until="commit")
        page.wait_for_selector(READY)
        go(page, "5", until="tasks")
        page.keyboard.press("Enter")
        page.wait_for_function("location.hash === '#/task/0'")
        assert page.evaluate("document.readyState") == "loading" and page.locator(".turn").count() == 0
        comes.set()
        page.wait_for_selector(".turn")
        assert page.locator("main").inner_text() == told.locator("main").inner_text()
        page.close()
        server.shutdown()
    assert said == []


@pytest.mark.parametrize("most_bytes", [MOST_BYTES, 5000], ids=["plain", "dense"])
def test_a_page_whose_end_is_lost_says_what_cannot_be_read(
    opened: Open, run_dir: Path, tmp_path: Path, most_bytes: int
) -> None:
    path = write_page(run_dir, tmp_path / "page.html", redact=False, most_bytes=most_bytes).path
    path.write_bytes(halves(path)[0])
    page = opened(path)
    go(page, "5", "Enter", until="task/0")
    said = page.locator("main .bad").last.inner_text()
    assert said == "The turns of this task cannot be read from this page, which is not whole."
    assert "python -m analysis show" in page.locator("#show-command").inner_text()
    go(page, "Escape", "/", until="tasks")
    page.keyboard.type("needle-07")
    expect(page.locator("#count")).to_contain_text("some texts cannot be read from this page")


def test_a_run_with_hardly_anything_is_a_sentence(opened: Open, tmp_path: Path) -> None:
    for name, log in (("empty", []), ("one", [event("attempt", task="a")])):
        path = write_page(write_run(tmp_path / name, log), tmp_path / f"{name}.html").path
        page = opened(path)
        assert page.locator(".lead").inner_text().endswith((".", "yet."))
        for key, part in enumerate(["overview", "timing", "usage", "path", "tasks"], 1):
            go(page, str(key), until=part)
            assert page.locator("main").inner_text().strip()


def test_a_run_of_2500_tasks_is_small_and_soon_there(opened: Open, tmp_path: Path) -> None:
    run = make_run(events=25_000, tasks=2500)
    write_finished(run, tmp_path / "run")
    write_texts(run, tmp_path / "run", documents=1000)
    path = write_page(tmp_path / "run", tmp_path / "page.html", redact=False).path
    assert path.stat().st_size < 20e6
    started = time.monotonic()
    page = opened(path)
    go(page, "5", "End", "Enter", until="task/2499")
    assert time.monotonic() - started < 2.0
    assert page.locator(".step").count() >= 3
    data = json.loads(page.locator("#data").text_content() or "")
    assert len(data["tasks"]["id"]) == sum(data["parts"]) == 2500
