"""`flask gsession doctor`: lists of users' sessions that are damaged, lost or incomplete."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask_login import LoginManager

from flask_gsession import StoreUnavailable
from flask_gsession.moving.mark import mark_key
from flask_gsession.operate import health_users
from flask_gsession.operate.health_users import check_users
from flask_gsession.stores.parts import Finding
from flask_gsession.users import format as roster_format
from flask_gsession.users.rosters import roster_key
from tests.cli.test_users import damage, signed_in
from tests.harness.apps import Site, SiteMaker
from tests.harness.console import Console


def repository_of(site: Site) -> Any:
    return site.app.extensions["gsession"][site.ext].repository


def checked(site: Site, *found: Finding) -> dict[tuple[str, str], str]:
    findings = check_users(repository_of(site), found, hasattr(site.app, "login_manager"))
    for finding in findings:
        assert bool(finding.advice) == (finding.severity != "ok")
    return {(finding.severity, finding.check): finding.found for finding in findings}


def test_nothing_is_said_without_bound_sessions(site: Site) -> None:
    site.visitor().run(lambda session: session.update(a=1, _user_id="ada"))
    assert checked(site) == {}


def test_intact_lists(site: Site) -> None:
    for user in ("ada", "ada", "bob"):
        signed_in(site, user)
    before = site.stored()
    assert checked(site) == {("ok", "rosters"): "2 checked"}
    assert site.stored() == before


def test_a_damaged_list(site: Site) -> None:
    for user in ("ada", "bob"):
        signed_in(site, user)
    damage(site)
    assert checked(site) == {("error", "rosters"): "1 of 2: corrupt"}
    with site.app.app_context():
        site.ext.users.rebuild()
    assert checked(site) == {("ok", "rosters"): "2 checked"}


def test_other_records_are_not_lists(site: Site) -> None:
    """The keys of take-over marks look like the keys of rosters."""
    signed_in(site)
    repository = repository_of(site)
    mark = mark_key("cookie", "an old session")
    repository.create(repository.other_records.draft(mark, b"x", repository.expiry.latest_end()))
    assert checked(site) == {("ok", "rosters"): "1 checked"}


def test_a_list_of_a_newer_version(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(roster_format, "FORMAT", 2)
        signed_in(site)
    (finding,) = check_users(repository_of(site), (), binds_logins=False)
    assert finding[:3] == ("error", "rosters", "1 of 1: newer format")
    assert "update it" in finding.advice
    assert finding.advice.endswith("users rebuild --replace-foreign")


def test_a_list_whose_sessions_can_not_be_read_either(make_site: SiteMaker) -> None:
    before = make_site(encryption_keys=["o" * 43])
    signed_in(before)
    site = make_site(store=before.store, encryption_keys=["n" * 43])
    assert checked(site) == {("error", "rosters"): "1 of 1: unknown encryption key"}
    signed_in(site, "bob")
    assert checked(site) == {("error", "rosters"): "1 of 2: unknown encryption key"}


def test_a_list_that_was_evicted(site: Site) -> None:
    for user in ("ada", "bob", "bob"):
        signed_in(site, user)
    site.store.store.delete(roster_key("bob"))
    assert checked(site) == {("ok", "rosters"): "2 checked"}, "a sign-in may be under way"
    site.clock.advance(61)
    assert checked(site) == {("error", "rosters"): "1 of 2 are missing, perhaps after an eviction"}


def test_sessions_of_an_earlier_version(site: Site, make_site: SiteMaker) -> None:
    earlier = make_site(store=site.store)
    for user in ("ada", "bob"):
        earlier.visitor().run(lambda session, user=user: session.update(_user_id=user))
    earlier.visitor().run(lambda session: session.update(cart=["mug"]))
    assert checked(site) == {}, "without Flask-Login, it is any key"
    LoginManager(site.app)
    expected = "sessions that aren't in a list yet: 2"
    assert checked(site) == {("warning", "lists of sessions"): expected}
    with site.app.app_context():
        assert site.ext.users.rebuild() == 2
    assert checked(site) == {("ok", "rosters"): "2 checked"}


def test_a_large_store_is_looked_at_in_part(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    LoginManager(site.app)
    for user in ("ada", "bob"):
        signed_in(site, user)
    monkeypatch.setattr(health_users, "_MAX_SECONDS", -1.0)
    assert checked(site) == {}


@pytest.mark.parametrize("bound", [False, True])
def test_eviction_is_an_error_where_rosters_are_used(site: Site, bound: bool) -> None:
    policy = Finding("warning", "eviction", "volatile-lru, without a limit yet", "advice")
    if bound:
        signed_in(site)
    found = checked(site, policy, Finding("ok", "eviction", "noeviction"))
    assert found.get(("error", "eviction of rosters")) == (policy.found if bound else None)


def test_the_doctor_shows_it(site: Site) -> None:
    signed_in(site)
    damage(site)
    console = Console(site.store, clock=site.clock)
    result = console.run("doctor", "--json")
    assert result.exit_code == 1
    rows = {row["check"]: row for row in json.loads(result.stdout)}
    assert (rows["rosters"]["severity"], rows["rosters"]["session"]) == ("error", "session")


def test_an_outage_is_left_to_the_other_checks(site: Site) -> None:
    signed_in(site)

    def down() -> None:
        raise StoreUnavailable("down")

    site.store.before("load", down)
    assert checked(site) == {}
