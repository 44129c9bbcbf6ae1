"""The metrics in a real Prometheus: it scrapes the demo shop under load, and its alerts fire."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry

from flask_gsession import Session
from flask_gsession.contrib.metrics import SessionMetrics
from tests.harness.gunicorn import Gunicorn
from tests.harness.prometheus import SHOP, Prometheus, program, visitors
from tests.harness.servers import RedisServer, ServerMissing
from tests.harness.topologies import until

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests/harness/prometheus_rules_test.yml"
RULES = files("flask_gsession.contrib") / "prometheus-rules.yml"
DASHBOARD = files("flask_gsession.contrib") / "grafana-dashboard.json"


@pytest.fixture
def promtool(capfd: pytest.CaptureFixture[str]) -> str:
    """Prometheus' own tool. Without it the test is skipped, loudly."""
    try:
        return program("promtool")
    except ServerMissing as missing:
        with capfd.disabled():
            print(f"\nWARNING: {missing}", file=sys.stderr)
        pytest.skip(str(missing))


@pytest.fixture
def prometheus(promtool: str) -> Iterator[Prometheus]:
    """A Prometheus with our rules, which wait for a second where they say minutes.

    That they wait as long as they say is tested by promtool, which has a clock of its own.
    """
    rules = re.sub(r"for: \w+", "for: 1s", RULES.read_text(encoding="utf-8"))
    with Prometheus(rules) as server:
        yield server


def test_promtool_accepts_the_rules(promtool: str) -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(CASES)]):
        run = subprocess.run([promtool, *command], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stdout + run.stderr


def metrics() -> set[str]:
    """The names of all metrics, as Prometheus has them."""
    app, registry = Flask(__name__), CollectorRegistry()
    app.secret_key = "a key for tests"
    Session(app, store="memory://")
    SessionMetrics(app, registry=registry)
    endings = {"counter": "_total", "gauge": "", "histogram": "_count"}
    return {family.name + endings[family.type] for family in registry.collect()}


def queries() -> list[str]:
    """The queries of the dashboard, with the time span that Grafana would insert."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [
        target["expr"]
        .replace("$job", ".+")
        .replace("$instance", ".+")
        .replace("$__rate_interval", "1m")
        for panel in panels
        for target in panel["targets"]
    ]


def test_the_demo_in_a_real_prometheus(
    tmp_path: Path, store_prefix: str, prometheus: Prometheus
) -> None:
    (tmp_path / "figures").mkdir()
    with RedisServer() as redis:
        environment = {
            "WORKERS_STORE": redis.url,
            "WORKERS_PREFIX": store_prefix,
            "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "figures"),
        }
        options = ("--threads", "4")
        with (
            Gunicorn(tmp_path, *options, workers=2, environment=environment, app=SHOP) as shop,
            visitors(f"http://127.0.0.1:{shop.port}"),
        ):
            prometheus.scrape(shop.port)

            def above_zero(query: str) -> bool:
                return any(float(series["value"][1]) > 0 for series in prometheus.query(query))

            # Metrics that are above zero in a healthy shop under load.
            of_trouble = {
                "gsession_access_denied_total",
                "gsession_circuits_open",
                "gsession_writes_dropped_total",
                "gsession_large_values_lost_total",
            }
            of_edges = {name for name in metrics() if name.startswith("gsession_edge_")}
            for name in sorted(metrics() - of_trouble - of_edges):
                until(lambda name=name: above_zero(name), name)
            of_sessions = 'gsession_sessions_total{event="%s"}'
            for event in ("created", "saved", "rotated", "destroyed"):
                until(lambda event=event: above_zero(of_sessions % event), event)
            for query in queries():
                if "gsession_edge_" in query:  # the shop is none
                    continue
                until(lambda query=query: prometheus.query(query), query)
            assert "GsessionStoreDown" not in prometheus.firing()

            redis.kill()
            expected = {"GsessionStoreDown", "GsessionStoreErrors", "GsessionWritesDropped"}
            until(lambda: expected <= prometheus.firing(), "the alerts")
            assert above_zero("gsession_writes_dropped_total")

            redis.start()
            until(lambda: "GsessionStoreDown" not in prometheus.firing(), "the end of the alert")
