"""`flask gsession doctor` on the near cache."""

from __future__ import annotations

import json

import pytest
from flask import Flask

from flask_gsession import Session
from flask_gsession.cli import gsession
from tests.harness.servers import RedisServer
from tests.harness.topologies import RedisACL, TCPProxy

pytest_plugins = ["tests.harness.topologies"]


def found(url: str, bound: float) -> dict[str, str] | None:
    """The doctor's finding on the near cache."""
    app = Flask(__name__)
    app.secret_key = "a key of some length, for tests"
    ext = Session(app, store=url, near_cache=bound)
    rows = json.loads(app.test_cli_runner().invoke(gsession, ["doctor", "--json"]).stdout)
    ext.close(app)
    return next((row for row in rows if row["check"] == "near cache"), None)


def test_a_near_cache_that_works(redis_url: str) -> None:
    row = found(redis_url, 5.0)
    assert row is not None
    assert row["severity"] == "ok"
    assert "ms old at most" in row["found"]
    assert found(redis_url, 0) is None


def test_a_bound_too_short_for_the_network(own_redis: RedisServer) -> None:
    with TCPProxy(own_redis.port) as proxy, proxy.delay(0.05):
        row = found(f"redis://127.0.0.1:{proxy.port}", 0.02)
    assert row is not None
    assert row["severity"] == "warning"
    assert "SESSION_NEAR_CACHE is 0.02 s" in row["advice"]


def test_a_missing_permission(redis_acl: RedisACL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_gsession.operate.near_cache._PATIENCE", 1.0)
    redis_acl.allow("~* +@all -client")
    row = found(redis_acl.url, 0.25)
    redis_acl.allow("~* +@all +client")
    assert row is not None
    assert row["severity"] == "error"
    assert "+client|tracking" in row["found"]
