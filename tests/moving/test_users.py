"""Imported sessions of a known user are in the user's roster before their token leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from flask_login import LoginManager

from tests.harness.apps import Site, SiteMaker

from .old import OldFiles, visit

DAY = 86_400


@pytest.fixture
def old(tmp_path: Path) -> OldFiles:
    return OldFiles(tmp_path / "old")


@pytest.fixture
def site(make_site: SiteMaker, old: OldFiles) -> Site:
    return with_login(make_site(config=old.config))


def with_login(site: Site) -> Site:
    LoginManager(site.app)
    return site


def users(site: Site) -> set[str]:
    """The handles of the sessions of the user 7."""
    with site.app.app_context():
        return {device.handle for device in site.ext.users.devices("7")}


def test_an_imported_session_is_listed(site: Site, old: OldFiles) -> None:
    sids = [old.add(_user_id="7"), old.add(_user_id="7"), old.add(cart=1)]
    handles = [visit(site, sid).run(lambda session: session.handle) for sid in sids]
    assert users(site) == set(handles[:2])
    visit(site, sids[0]).run(dict)
    assert users(site) == set(handles[:2])


def test_revoking_all_ends_imported_and_other_sessions(site: Site, old: OldFiles) -> None:
    imported, waiting, other = old.add(_user_id="7"), old.add(_user_id="7"), old.add(_user_id="8")
    visitor = visit(site, imported)
    visitor.run(dict)
    with site.app.app_context():
        site.ext.users.revoke_all("7")
    assert visitor.run(dict) == {}
    assert not old.has(imported)
    late = visit(site, waiting)
    assert late.run(dict) == {}
    assert late.get_cookie("session") is None
    assert not old.has(waiting)
    for sid in (imported, waiting):
        old.add(sid, _user_id="7")
        assert visit(site, sid).run(dict) == {}
    assert visit(site, other).run(lambda session: session["_user_id"]) == "8"


def test_a_revocation_between_the_session_and_its_roster(site: Site, old: OldFiles) -> None:
    """The session and its mark are stored, and all of the user's sessions are revoked."""
    sid = old.add(_user_id="7")

    def revoke_all() -> None:
        with site.app.app_context():
            site.ext.users.revoke_all("7")

    site.before_each("create", lambda: None, lambda: None, revoke_all)  # session, mark, roster
    late = visit(site, sid)
    assert late.run(dict) == {}
    assert late.cookie is None
    assert not old.has(sid)
    assert users(site) == set()


def test_the_epoch_is_known_for_as_long_as_marks(site: Site, old: OldFiles) -> None:
    """An old record that lives for years, and a revocation that is years ago."""
    sid = old.add(_user_id="7")
    visit(site, old.add(_user_id="7")).run(dict)
    with site.app.app_context():
        site.ext.users.revoke_all("7")
    site.clock.advance(400 * DAY)
    old.add(sid, _user_id="7")
    assert visit(site, sid).run(dict) == {}


def test_imports_respect_the_limit_of_sessions(make_site: SiteMaker, old: OldFiles) -> None:
    site = with_login(make_site(config=old.config, max_per_user=2))
    visitors = [visit(site, old.add(_user_id="7")) for _ in range(4)]
    for visitor in visitors:
        visitor.run(dict)
    assert len(users(site)) == 2
    assert [bool(visitor.run(dict)) for visitor in visitors] == [False, False, True, True]


def test_without_flask_login_nobody_is_listed(make_site: SiteMaker, old: OldFiles) -> None:
    site = make_site(config=old.config)
    assert visit(site, old.add(_user_id="7")).run(lambda session: session["_user_id"]) == "7"
    assert users(site) == set()
