"""A page in the machine's own Chromium, timed from the first byte to a task that was opened by keys."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A container has no namespaces for Chromium's own sandbox; only pages of our own are opened.
OPTIONS = ("--no-sandbox",)
READY = "html[data-shown]"  # which the page says once it answers keys


class Opening(NamedTuple):
    """Seconds since the page was asked for."""

    interactive_s: float
    task_s: float


def chromium() -> str | None:
    """Where Chromium is on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def time_page(path: Path, rounds: int) -> list[Opening]:
    """How soon the report page at `path` answers keys, and shows the turns of its last task.

    Raises RuntimeError where there is no Chromium.
    """
    from playwright.sync_api import sync_playwright  # a machine that only runs the others may lack it

    found = []
    program = chromium()
    if program is None:
        raise RuntimeError(f"no Chromium ({', '.join(NAMES)}); install one, such as apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(OPTIONS))
        for _ in range(rounds):
            page = browser.new_page()
            started = time.monotonic()
            page.goto(path.as_uri(), wait_until="commit")
            page.wait_for_selector(READY)
            interactive_s = time.monotonic() - started
            for key in ("5", "End", "Enter"):
                page.keyboard.press(key)
            page.wait_for_selector(".step")
            found.append(Opening(interactive_s, time.monotonic() - started))
            page.close()
        browser.close()
    return found
