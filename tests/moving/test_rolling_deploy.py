"""A deployment with a real browser, real old workers, and gunicorn with two new ones."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from redis import Redis

from tests.harness.gunicorn import Gunicorn
from tests.harness.servers import redis_server

from .old import KEY, UNTIL, OldApp

PATIENCE = 60_000  # milliseconds
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PROGRAM = shutil.which("chromium")
MISSING = "NO CHROMIUM ON PATH: THE ROLLING DEPLOY WAS NOT TRIED IN A BROWSER."


@pytest.fixture
def browser(capfd: pytest.CaptureFixture[str]) -> Iterator[Browser]:
    """A headless Chromium. Without one the test is skipped, loudly."""
    if PROGRAM is None:
        with capfd.disabled():
            print(f"\nWARNING: {MISSING}", file=sys.stderr)
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PROGRAM, args=FLAGS, timeout=PATIENCE)
        yield chromium
        chromium.close()


def ask(page: Page, path: str, body: Any = None, times: int = 1) -> list[Any]:
    """The answers to so many requests that the page sends at once."""
    script = """async ([path, body, times]) => Promise.all([...Array(times)].map(async () => {
      const options = body === null ? {} : {method: "POST", body: JSON.stringify(body),
                                            headers: {"Content-Type": "application/json"}};
      const response = await fetch(path, options);
      const text = await response.text();
      return response.status === 200 && text.startsWith("{") ? JSON.parse(text) : text;
    }))"""
    answers: list[Any] = page.evaluate(script, [path, body, times])
    for answer in answers:
        if isinstance(answer, dict):
            answer.pop("_permanent", None)
    return answers


def names(context: BrowserContext) -> set[str]:
    return {str(cookie.get("name")) for cookie in context.cookies()}


def test_a_rolling_deploy_keeps_every_browser_signed_in(browser: Browser, tmp_path: Path) -> None:
    """`test_flask_session` has the other versions and stores, without a browser."""
    prefix, url = f"test_{secrets.token_hex(6)}:", redis_server().url
    config = {"SESSION_KEY_PREFIX": prefix, "SESSION_USE_SIGNER": True}
    ours = {"SECRET_KEY": KEY, "SESSION_TYPE": "redis", "SESSION_IMPORT_UNTIL": UNTIL, **config}
    given = {"package": "flask_gsession", "url": url, "config": ours}
    new = Gunicorn(
        tmp_path,
        *("--threads", "4"),
        workers=2,
        environment={"OLD_APP": json.dumps(given)},
        app="tests.moving.old_app:app",
    )
    try:
        with OldApp("0.8", "redis", url, **config) as old, new, browser.new_context() as context:
            visit(browser, context, old.base, f"http://127.0.0.1:{new.port}")
        assert "Traceback" not in new.log
    finally:
        with Redis.from_url(url) as client:
            for key in client.scan_iter(f"{prefix}*"):
                client.delete(key)


def visit(browser: Browser, context: BrowserContext, old: str, new: str) -> None:
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(old)
    before = {"user": "ada", "cart": ["mug"]}
    assert ask(page, "/set", before) == [before]
    assert names(context) == {"session"}
    stolen = context.cookies()

    # The new workers take over, and several first requests come at once.
    page.goto(new)
    assert ask(page, "/get", times=6) == [before] * 6
    assert names(context) == {"session", "session_gs"}
    after = {**before, "cart": ["mug", "pen"]}
    assert ask(page, "/set", {"cart": ["mug", "pen"]}) == [after]

    # Roll back, and go forward again.
    page.goto(old)
    assert ask(page, "/get") == [before]
    assert ask(page, "/set", {"seen": "old"}) == [{**before, "seen": "old"}]
    page.goto(new)
    assert ask(page, "/get", times=4) == [after] * 4

    # A logout ends both, for a copy of the old cookie as well.
    assert ask(page, "/logout", {}) == ["out"]
    assert names(context) == set()
    assert ask(page, "/get") == [{}]
    with browser.new_context() as thief:
        thief.add_cookies(stolen)  # type: ignore[arg-type]  # as they were given
        other = thief.new_page()
        for address in (new, old, new):
            other.goto(address)
            assert ask(other, "/get") == [{}]
        assert "user" not in ask(other, "/get")[0]
