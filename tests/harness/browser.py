"""A headless Chromium for the tests, and checks for every page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

PATIENCE = 60.0  # seconds until the browser must be there; nothing takes that long
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
)
PROGRAM = shutil.which("chromium")
MISSING = (
    "NO CHROMIUM ON PATH: THE PAGES WERE NOT TRIED IN A BROWSER. "
    "Install it (Debian: apt-get install chromium) and run the tests again."
)


@contextmanager
def launched() -> Iterator[Browser]:
    """The browser of several tests, each in a context of its own: as if it were a new one."""
    with sync_playwright() as playwright:
        expect.set_options(timeout=1000 * PATIENCE)
        browser = playwright.chromium.launch(
            executable_path=PROGRAM, args=FLAGS.split(), timeout=1000 * PATIENCE
        )
        yield browser
        browser.close()


def assert_accessible(page: Page) -> None:
    """axe finds nothing to complain about: WCAG 2.2 AA and good practice.

    Playwright gives it a world of its own, so that it runs under any Content-Security-Policy.
    """
    found = Axe().run(page)
    assert found.violations_count == 0, f"{page.url}\n{found.generate_report()}"
