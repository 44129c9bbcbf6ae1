"""`flask gsession cleanup`: expired sessions go, live ones stay, and what failed is said."""

from __future__ import annotations

import pytest
from click.testing import Result
from flask import Flask

from flask_gsession import Session, StoreUnavailable
from flask_gsession.cli import gsession
from flask_gsession.stores import Sweeps
from flask_gsession.stores.memory import MemoryStore
from tests.apps import Site


class Counting(MemoryStore):
    """Has so many expired sessions, and fails where it is told to."""

    def __init__(self, expired: int, failure: BaseException | None = None, at: int = -1) -> None:
        super().__init__()
        self.left, self.failure, self.at = expired, failure, at
        self.limits: list[int] = []

    def sweep(self, limit: int) -> int:
        if self.failure is not None and len(self.limits) == self.at:
            raise self.failure
        self.limits.append(limit)
        step = min(limit, self.left)
        self.left -= step
        return step


def clean(app: Flask, *options: str) -> Result:
    return app.test_cli_runner().invoke(gsession, ["cleanup", *options])


def application(store: object) -> Flask:
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    Session(app, store=store)
    return app


def test_the_expired_go_and_the_living_stay(site: Site) -> None:
    old = [site.visitor() for _ in range(5)]
    for visitor in old:
        visitor.run(lambda session: session.update(a=1))
    site.clock.advance(100 * 86400)
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    Session(app, store=site.store.store, clock=site.clock)
    live = site.visitor()
    live.run(lambda session: session.update(a=1))
    result = clean(app, "--batch", "2")
    assert result.exit_code == 0
    if isinstance(site.store.store, Sweeps):
        assert "expired sessions removed" in result.output
        assert len(site.stored()) == 1
    else:
        assert "nothing to do" in result.output
    assert live.run(dict) == {"a": 1}


def test_it_goes_in_batches_and_ends() -> None:
    store = Counting(expired=2500)
    result = clean(application(store))
    assert store.limits == [1000, 1000, 1000]
    assert "session: 2500 expired sessions removed" in result.output


def test_a_failure_says_how_far_it_came() -> None:
    result = clean(application(Counting(5000, StoreUnavailable("pulled the plug"), at=2)))
    assert result.exit_code == 1
    assert "failed after 2000 sessions: pulled the plug" in result.output


def test_an_interrupt_says_how_far_it_came() -> None:
    store = Counting(5000, KeyboardInterrupt(), at=3)
    result = clean(application(store))
    assert result.exit_code == 1
    assert "3000 expired sessions removed so far" in result.output
    store.failure = None
    assert "2000 expired sessions removed" in clean(application(store)).output


@pytest.mark.parametrize("batch", ["0", "many"])
def test_a_wrong_batch(batch: str) -> None:
    assert clean(application("memory://"), "--batch", batch).exit_code == 2


def test_no_session_at_all() -> None:
    assert "call Session(app) first" in clean(Flask(__name__)).output
