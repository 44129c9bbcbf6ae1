"""A real Prometheus, and the demo shop under load for it to look at.

    with Prometheus(rules) as prometheus, Gunicorn(..., app=SHOP) as shop:
        prometheus.scrape(shop.port)
        with visitors(f"http://127.0.0.1:{shop.port}"):
            prometheus.query("rate(gsession_sessions_total[5s])")

The program is `GSESSION_TEST_PROMETHEUS`, or `prometheus` on PATH, or what `make test` put into the
environment (tests/harness/setup_prometheus.sh).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from tests.harness.servers import Server, ServerMissing

SHOP = "tests.harness.metrics_app:create_shop()"
PATIENCE = 30.0  # seconds for an answer


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`.

    :raises ServerMissing: without one; the text says how to get it.
    """
    given = os.environ.get("GSESSION_TEST_PROMETHEUS")
    beside = [Path(sys.prefix) / "prometheus", *([Path(given).parent] if given else [])]
    for folder in reversed(beside):
        if (folder / name).exists():
            return str(folder / name)
    if found := shutil.which(name):
        return found
    raise ServerMissing(Prometheus.missing)


class Prometheus(Server):
    """A Prometheus that scrapes its targets several times a second."""

    binary = "prometheus"
    missing = (
        "NO PROMETHEUS: THE METRICS WERE NOT TRIED WITH A REAL ONE. "
        "Install it (Debian: apt-get install prometheus, or make prometheus) or name the program "
        "in GSESSION_TEST_PROMETHEUS, and run tests/contrib/test_prometheus.py again."
    )

    def __init__(self, rules: str = "groups: []", interval: str = "500ms") -> None:
        super().__init__()
        self._rules = rules
        self._interval = interval

    @property
    def url(self) -> str:
        """The address of its pages and of its API."""
        return f"http://127.0.0.1:{self.port}"

    def scrape(self, *ports: int) -> None:
        """Scrape these loopback ports from now on."""
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        new = self._directory / "targets.new"
        new.write_text(json.dumps(targets))
        new.rename(self._directory / "targets.json")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of a PromQL query now: series with `metric` and `value`."""
        return list(self._ask("query", query=expression)["result"])

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        """The result of a PromQL query over a time: series with `metric` and `values`."""
        times = {"start": start, "end": end, "step": step}
        return list(self._ask("query_range", query=expression, **times)["result"])

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        alerts = self._ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def _ask(self, what: str, **parameters: object) -> Any:
        form: Mapping[str, Any] = parameters
        answer = requests.get(f"{self.url}/api/v1/{what}", params=form, timeout=PATIENCE)
        told = answer.json()
        assert told["status"] == "success", told
        return told["data"]

    def _program(self) -> str:
        return program(self.binary)

    def _prepare(self) -> None:
        (self._directory / "rules.yml").write_text(self._rules)
        (self._directory / "prometheus.yml").write_text(
            f"global:\n  scrape_interval: {self._interval}\n"
            f"  evaluation_interval: {self._interval}\n"
            "rule_files: [rules.yml]\n"
            "scrape_configs:\n"
            "  - job_name: shop\n"
            "    file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]\n"
        )
        self.scrape()

    def _arguments(self) -> list[str]:
        return [
            f"--config.file={self._directory}/prometheus.yml",
            f"--storage.tsdb.path={self._directory}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/-/ready", timeout=PATIENCE).status_code == 200
        except requests.ConnectionError:
            return False


class Visitors:
    """Threads that shop until ``stop``, whatever the answers are."""

    def __init__(self, url: str, count: int, pause: float) -> None:
        self._url = url
        self._pause = pause
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._shop, daemon=True) for _ in range(count)]

    def start(self) -> None:
        """Let them in."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask them to leave, and wait until they have."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _shop(self) -> None:
        while not self._stop.is_set():
            try:
                with requests.Session() as browser:
                    self._visit(browser)
            except (requests.RequestException, LookupError):
                self._stop.wait(self._pause)

    def _visit(self, browser: requests.Session) -> None:
        """One round through the shop. Raises `LookupError` where a page is an error page."""
        self._get(browser, "/")
        for sku in re.findall(r'href="/product/([\w-]+)"', self._get(browser, "/"))[:5]:
            self._get(browser, f"/product/{sku}")
            self._post(browser, f"/cart/{sku}/add", quantity="1")
            self._get(browser, "/cart")
        for page in ("/merged", "/counted", "/locked", "/bound"):
            self._get(browser, page)
        self._post(browser, "/session/rotate")
        self._post(browser, "/session/forget")
        for forged in ("nonsense", "x" * 43 + "." + "y" * 22):
            requests.get(f"{self._url}/cart", cookies={"session": forged}, timeout=PATIENCE)

    def _get(self, browser: requests.Session, path: str) -> str:
        answer = browser.get(self._url + path, timeout=PATIENCE)
        self._stop.wait(self._pause)
        if answer.status_code >= 500:
            raise LookupError(path)
        return answer.text

    def _post(self, browser: requests.Session, path: str, **fields: str) -> None:
        page = self._get(browser, "/preferences")
        token = re.search(r'name="csrf_token" value="([^"]*)"', page)
        if token is None:
            raise LookupError(path)
        browser.post(self._url + path, data={"csrf_token": token[1], **fields}, timeout=PATIENCE)
        self._stop.wait(self._pause)


@contextmanager
def visitors(url: str, count: int = 2, pause: float = 0.03) -> Iterator[None]:
    """People in the shop at `url` for the length of a `with` block."""
    people = Visitors(url, count, pause)
    people.start()
    try:
        yield
    finally:
        people.stop()
