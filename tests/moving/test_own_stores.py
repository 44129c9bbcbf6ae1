"""Moving between stores and settings of ours while the application runs: nobody is logged out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.events import SessionImported
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor

from .old import UNTIL


@pytest.fixture
def old_site(tmp_path: Path, clock: FakeClock) -> Iterator[Site]:
    """The application as it was, on SQLite."""
    with SiteMaker(f"sqlite:///{tmp_path}/old.sqlite3", "old:", clock) as make:
        yield make()


@pytest.fixture
def site(make_site: SiteMaker, old_site: Site) -> Site:
    """The application as it is, on each store in turn."""
    return make_site(imports=[{"store": old_site.url, "key_prefix": "old:"}], import_until=UNTIL)


def carried(site: Site, visitor: Visitor) -> Visitor:
    """The same browser at another application."""
    other = site.visitor()
    assert visitor.cookie is not None
    other.set_cookie(visitor.site.cookie_name, visitor.cookie)
    return other


def test_a_session_continues_in_another_store(site: Site, old_site: Site) -> None:
    before = old_site.visitor()
    values = {"cart": ("mug", 2), "_user_id": "7", "big": "x" * 40_000, "file": b"y" * 300_000}
    before.run(lambda session: session.update(values))
    before.run(lambda session: session.set("soon", 1, ttl=60))
    visitor = carried(site, before)
    assert visitor.run(lambda session: dict(session.items())) == {**values, "soon": 1}
    assert visitor.run(lambda session: session.ttl("soon")) == 60
    assert visitor.cookie != before.cookie
    assert len(site.happened(SessionImported)) == 1
    assert before.run(lambda session: session["cart"]) == ("mug", 2)  # rolling back
    visitor.run(lambda session: session.destroy())
    assert before.run(dict) == {}
    assert carried_cookie(site, before).run(dict) == {}


def carried_cookie(site: Site, visitor: Visitor) -> Visitor:
    return carried(site, visitor) if visitor.cookie else site.visitor()


def test_a_moved_session_keeps_its_expiry(site: Site, old_site: Site, clock: FakeClock) -> None:
    before = old_site.visitor()
    before.run(lambda session: session.update(a=1))
    day = 86_400
    before.run(lambda session: session.set_lifetime(31 * day))
    clock.advance(30 * day)
    visitor = carried(site, before)
    assert visitor.run(dict) == {"a": 1}
    clock.advance(day - 1)
    assert visitor.run(dict) == {"a": 1}
    clock.advance(1)
    assert visitor.run(dict) == {}
    assert carried(site, before).run(dict) == {}


def test_an_old_token_in_its_grace_yields_none(site: Site, old_site: Site) -> None:
    before = old_site.visitor()
    before.run(lambda session: session.update(a=1))
    tab = before.another_tab()
    before.run(lambda session: session.rotate(grace=100))
    late, now = carried(site, tab), carried(site, before)
    assert late.run(dict) == {"a": 1}
    assert late.cookie is None
    assert now.run(dict) == {"a": 1}
    assert now.cookie is not None
    handles = {visitor.run(lambda session: session.handle) for visitor in (late, now)}
    assert len(handles) == 1
    assert len(site.happened(SessionImported)) == 1


@pytest.mark.parametrize("new_name", [False, True])
def test_another_prefix_and_another_cookie_name(make_site: SiteMaker, new_name: bool) -> None:
    if make_site._where[0] == "memory://":
        return  # two stores in memory share nothing
    before = make_site()
    visitor = before.visitor()
    visitor.run(lambda session: session.update(a=1))
    url, prefix, clock = make_site._where
    source: dict[str, Any] = {"store": url, "key_prefix": prefix}
    config: dict[str, Any] = {"SESSION_IMPORT": [source], "SESSION_IMPORT_UNTIL": UNTIL}
    if new_name:
        config |= {"SESSION_COOKIE_NAME": "shop", "SESSION_IMPORT_COOKIE_NAME": "session"}
    else:
        prefix = f"{prefix}{secrets.token_hex(3)}:"
    with SiteMaker(url, prefix, clock) as make:
        site = make(config=config)
        assert site.cookie_name == ("shop" if new_name else "session_gs")
        other = carried(site, visitor)
        assert other.run(dict) == {"a": 1}
        other.run(lambda session: session.update(b=2))
        assert visitor.run(dict) == {"a": 1}
        again = carried(site, visitor)
        assert again.run(dict) == {"a": 1, "b": 2}
        again.run(lambda session: session.destroy())
        assert visitor.run(dict) == {}


def test_another_domain_and_path(make_site: SiteMaker) -> None:
    """The old cookie is deleted where it was set, not where ours is."""
    config: dict[str, Any] = {
        "SESSION_COOKIE_DOMAIN": "example.com",
        "SESSION_COOKIE_PATH": "/shop",
        "SESSION_IMPORT": ["memory://"],
        "SESSION_IMPORT_UNTIL": UNTIL,
        "SESSION_IMPORT_COOKIE_DOMAIN": "www.example.com",
        "SESSION_IMPORT_COOKIE_PATH": "/",
        "SESSION_IMPORT_COOKIE_NAME": "__Secure-session",
        "SESSION_COOKIE_SECURE": True,
        "SESSION_COOKIE_SAMESITE": "None",
        "SESSION_COOKIE_PARTITIONED": True,
    }
    site = make_site(config=config)
    client = site.app.test_client(use_cookies=False)
    with site.visit(dict) as page:
        response = client.get(page.path, headers={"Cookie": "__Secure-session=nonsense"})
    (deleted,) = response.headers.getlist("Set-Cookie")
    assert deleted.startswith("__Secure-session=;")
    assert {"Secure", "Partitioned"} <= {part.strip() for part in deleted.split(";")}
    assert "Max-Age=0" in deleted
    assert "Domain=www.example.com" in deleted
    assert "Path=/;" in f"{deleted};"
    assert response.headers["Cache-Control"] == "no-store"


def test_several_old_stores(
    make_site: SiteMaker, old_site: Site, tmp_path: Path, clock: FakeClock
) -> None:
    """A second move, before the first is over."""
    with SiteMaker(f"sqlite:///{tmp_path}/older.sqlite3", "older:", clock) as make:
        older = make()
        sources = [
            {"store": old_site.url, "key_prefix": "old:"},
            {"store": older.url, "key_prefix": "older:"},
        ]
        site = make_site(imports=sources, import_until=UNTIL, import_watch=True)
        for before in (old_site.visitor(), older.visitor()):
            before.run(lambda session: session.update(a=1))
            visitor = carried(site, before)
            assert visitor.run(dict) == {"a": 1}
            assert visitor.run(dict) == {"a": 1}
            late = carried(site, before)
            assert late.run(dict) == {"a": 1}
            visitor.run(lambda session: session.destroy())
            assert before.run(dict) == {}
            assert late.run(dict) == {}


def test_another_secret_key(make_site: SiteMaker, old_site: Site) -> None:
    """The old cookie was signed with a fallback key; marks made before stay good after."""
    before = old_site.visitor()
    before.run(lambda session: session.update(a=1))
    settings: dict[str, Any] = {
        "imports": [{"store": old_site.url, "key_prefix": "old:"}], "import_until": UNTIL
    }  # fmt: skip
    site = make_site(**settings)
    visitor = carried(site, before)
    assert visitor.run(dict) == {"a": 1}
    config = {"SECRET_KEY": "a new key", "SECRET_KEY_FALLBACKS": ["a key for tests"]}
    later = make_site(config=config, store=site.store, **settings)
    again = carried(later, before)
    assert again.run(lambda session: session.handle) == visitor.run(lambda session: session.handle)
    assert again.cookie is not None
    assert again.cookie.partition(".")[0] == visitor.token
    again.run(lambda session: session.destroy())
    assert before.run(dict) == {}
