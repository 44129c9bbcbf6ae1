"""The pages for a load balancer."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from flask_gsession import Session
from flask_gsession.errors import UnreadableRecord
from flask_gsession.pages.health import health_blueprint
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import HookedStore
from tests.harness.apps import Site, hasty
from tests.harness.servers import RedisServer, free_port


def application(store: object, **settings: Any) -> Flask:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    Session(app, store=store, **settings)
    app.register_blueprint(health_blueprint())
    return app


def test_a_healthy_store(site: Site) -> None:
    site.app.register_blueprint(health_blueprint("/probe"))
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    before = site.stored()
    with site.counted() as count:
        answer = visitor.get("/probe/ready")
    assert (answer.status_code, answer.json) == (200, {"status": "ready"})
    assert count.calls == ["load"]
    assert site.stored() == before
    assert "Set-Cookie" not in answer.headers
    assert "Vary" not in answer.headers
    with site.counted() as count:
        assert visitor.get("/probe/live").status_code == 200
    assert count.calls == []


def test_a_store_that_is_down() -> None:
    app = application(f"redis://user:canary@127.0.0.1:{free_port()}/0")
    answer = app.test_client().get("/health/ready")
    assert (answer.status_code, answer.json) == (503, {"status": "store unavailable"})
    assert answer.headers["Retry-After"] == "1"
    assert app.test_client().get("/health/live").status_code == 200


def test_it_recovers_without_a_restart(own_redis: RedisServer) -> None:
    app = application(own_redis.url, breaker_failures=0)
    get = app.test_client().get
    assert get("/health/ready").status_code == 200
    (ext,) = app.extensions["gsession"]
    with own_redis.paused(), hasty(ext.store(app), 0.5):
        assert get("/health/ready").status_code == 503
    assert get("/health/ready").status_code == 200


def test_a_second_store_counts_too() -> None:
    app = application("memory://")
    Session(app, store=f"redis://127.0.0.1:{free_port()}/0", cookie_name="second")
    assert app.test_client().get("/health/ready").status_code == 503


def test_a_store_that_answers_nonsense() -> None:
    store = HookedStore(MemoryStore())

    def fail() -> None:
        raise UnreadableRecord("corrupt")

    store.before("load", fail)
    assert application(store).test_client().get("/health/ready").status_code == 503


def test_no_session_at_all() -> None:
    app = Flask(__name__)
    app.register_blueprint(health_blueprint())
    assert app.test_client().get("/health/ready").status_code == 500


@pytest.mark.parametrize("page", ["live", "ready"])
def test_others_cannot_post(page: str) -> None:
    assert application("memory://").test_client().post(f"/health/{page}").status_code == 405
