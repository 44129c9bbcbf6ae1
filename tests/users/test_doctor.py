"""What ``flask gsession doctor`` says about users' rosters."""

from __future__ import annotations

from typing import Any

from flask_gsession.users.checking import check_users
from tests.harness.apps import Site, SiteMaker
from tests.harness.console import Console

from .test_devices import damage, signed_in
from .test_flask_login import from_before, with_login


def findings(site: Site) -> list[tuple[str, str]]:
    repository = site.app.extensions["gsession"][site.ext].repository
    return [(each.severity, each.found) for each in check_users(repository, site.app)]


def test_without_rosters_it_says_nothing(site: Site) -> None:
    site.visitor().run(lambda session: session.update(a=1))
    assert findings(site) == []


def test_rosters_that_can_be_read(site: Site) -> None:
    signed_in(site)
    assert findings(site) == [("ok", "their lists of sessions can be read")]


def test_a_damaged_roster(site: Site) -> None:
    signed_in(site)
    signed_in(site, "bob")
    damage(site)
    assert findings(site) == [("error", "1 of 2 lists of users' sessions can't be read")]


def test_sessions_from_before(make_site: SiteMaker) -> None:
    members = with_login(make_site())
    visitor = from_before(members, make_site)
    said = "1 sessions are from before users had lists, which may be incomplete"
    assert findings(members) == [("warning", said)]
    visitor.run(dict)
    assert findings(members) == [("ok", "their lists of sessions can be read")]


def test_the_command_says_so(site: Site, clock: Any) -> None:
    signed_in(site)
    console = Console(site.store.store, clock=clock)
    assert "users: their lists of sessions can be read" in console.run("doctor").output
    damage(site)
    assert "flask gsession users rebuild" in console.run("doctor").output
    assert console.run("doctor").exit_code == 1
