"""The idle timeout never comes early because two requests overlap, on every store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flask_gsession.repository.debugging import debug_session
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor

IDLE = 1200  # seconds; the expiry is moved at most every 60


def saves(session: Any) -> None:
    session["written"] = True


def saves_in_a_transaction(session: Any) -> None:
    with session.transaction():
        session["written"] = True


def updates_atomically(session: Any) -> None:
    session.update_atomic("written", lambda _: True, default=False)


def saves_in_a_lock(session: Any) -> None:
    with session.lock():
        session["written"] = True


def rotates(session: Any) -> None:
    session.rotate(grace=30)


def rotates_without_grace(session: Any) -> None:
    session.rotate(grace=0)


WRITES = [
    *(saves, saves_in_a_transaction, updates_atomically, saves_in_a_lock),
    *(rotates, rotates_without_grace),
]


@pytest.fixture
def site(store_url: str, store_prefix: str, clock: FakeClock) -> Any:
    with SiteMaker(store_url, store_prefix, clock) as make:
        yield make(idle_timeout=IDLE)


def used_meanwhile(site: Site, visitor: Visitor) -> None:
    """The next write is slow: before the store does it, another tab moves the idle expiry."""
    tab = visitor.another_tab()

    def use() -> None:
        site.clock.advance(0.95)
        assert tab.run(dict)

    site.clock.advance(59.99)
    site.before_a_write(use)


@pytest.mark.parametrize("write", WRITES)
def test_a_slow_write_does_not_bring_it_early(site: Site, write: Callable[[Any], None]) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    used_meanwhile(site, visitor)
    visitor.run(write)
    site.clock.advance(IDLE - 0.5)
    assert visitor.run(lambda session: session.get("user")) == "ada"


def test_nor_does_an_order_to_debug(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    handle = visitor.run(lambda session: session.handle)
    used_meanwhile(site, visitor)
    repository = site.app.extensions["gsession"][site.ext].repository
    assert debug_session(repository, handle, repository.now() + 60_000) is not None
    site.clock.advance(IDLE - 0.5)
    assert visitor.run(lambda session: session.get("user")) == "ada"


def shortens(session: Any) -> None:
    session.set_lifetime(300)


def shortens_and_rotates(session: Any) -> None:
    session.set_lifetime(300)
    session.rotate(grace=0)


@pytest.mark.parametrize("write", [shortens, shortens_and_rotates])
def test_a_shorter_lifetime_makes_it_earlier(site: Site, write: Callable[[Any], None]) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(user="ada"))
    visitor.run(write)
    site.clock.advance(400)
    assert visitor.run(lambda session: session.get("user")) is None


def test_so_does_a_session_that_is_permanent_no_more(site: Site) -> None:
    site.app.config["PERMANENT_SESSION_LIFETIME"] = 86_400
    visitor = site.visitor()

    def remember(session: Any) -> None:
        session.permanent = True
        session["user"] = "ada"

    def forget(session: Any) -> None:
        session.permanent = False

    visitor.run(remember)
    visitor.run(forget)
    site.clock.advance(2 * IDLE)
    assert visitor.run(lambda session: session.get("user")) is None


def test_a_rotation_goes_by_settings_that_were_changed(
    store_url: str, store_prefix: str, clock: FakeClock
) -> None:
    with SiteMaker(store_url, store_prefix, clock) as make:
        before = make(idle_timeout=86_400)
        visitor = before.visitor()
        visitor.run(lambda session: session.update(user="ada"))
        now = make(idle_timeout=IDLE, store=before.store).visitor(visitor.cookie)
        now.run(rotates_without_grace)
        clock.advance(2 * IDLE)
        assert now.run(lambda session: session.get("user")) is None
