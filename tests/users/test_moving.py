"""Sessions of users in archives: ``flask gsession export`` and ``import``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.apps import Site, SiteMaker
from tests.harness.console import Console
from tests.moving.test_archive import console_of

from .test_devices import damage, ids, owner, signed_in


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "archive")


def test_bound_sessions_are_exported_and_imported_into_the_roster(
    site: Site, store_prefix: str, clock: Any, file: str
) -> None:
    visitors = [signed_in(site, label="Firefox") for _ in range(2)]
    devices = set(ids(site))
    text = console_of(site).done("export", file)
    assert "2 sessions" in text or "2" in text, "no roster is counted"
    with SiteMaker("memory://", store_prefix, clock) as make:
        other = make()
        assert console_of(other).done("import", file) == "session: 2 imported\n"
        assert set(ids(other)) == devices
        guests = [other.visitor(visitor.cookie) for visitor in visitors]
        with other.counted() as count:
            assert [owner(guest) for guest in guests] == ["ada", "ada"]
        assert count.calls == ["load", "load", "load", "save"] * 2, "looked up and touched"
        assert [owner(guest) for guest in guests] == ["ada", "ada"]
        with other.app.app_context():
            assert other.ext.users.revoke_all("ada") == 2
        assert [owner(guest) for guest in guests] == [None, None]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_sessions_from_before_a_revocation_are_not_imported(
    site: Site, file: str, overwrite: tuple[str, ...]
) -> None:
    visitors = [signed_in(site), signed_in(site, "bob")]
    console_of(site).done("export", file)
    site.clock.advance(60)
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
        site.ext.users.revoke_all("bob")
    site.clock.advance(60)
    again = signed_in(site, "bob")
    text = console_of(site).done("import", file, *overwrite)
    assert text == "session: 0 imported, 2 revoked since their sign-in\n"
    assert [owner(visitor) for visitor in visitors] == [None, None]
    assert owner(again) == "bob"
    assert len(site.sessions()) == 1


def test_a_device_that_was_rotated_since_is_not_imported(site: Site, file: str) -> None:
    visitor = signed_in(site)
    old = visitor.another_tab()
    console_of(site).done("export", file)
    visitor.run(lambda session: session.rotate(grace=0))
    text = console_of(site).done("import", file)
    assert text == "session: 0 imported, 1 revoked since their sign-in\n"
    assert (owner(old), owner(visitor)) == (None, "ada")


def test_a_dry_run_enters_nobody(site: Site, file: str) -> None:
    signed_in(site)
    console_of(site).done("export", file)
    console_of(site).done("revoke", "--all", "--yes")
    stored = site.stored()
    assert console_of(site).done("import", file, "--dry-run").startswith("session: 1 ")
    assert site.stored() == stored


def test_an_import_that_died_before_the_entry_serves_nobody(site: Site, file: str) -> None:
    visitor = signed_in(site)
    cookie = visitor.cookie
    console_of(site).done("export", file)
    visitor.run(lambda session: session.destroy())
    console = console_of(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flask_gsession.moving.importing.enter", lambda *_: True)
        assert console.done("import", file) == "session: 1 imported\n"
    assert len(site.sessions()) == 1
    assert owner(site.visitor(cookie)) is None
    assert len(site.sessions()) == 0, "it ended when it was looked up"


def test_an_import_that_died_before_the_entry_is_repeated(site: Site, file: str) -> None:
    visitor = signed_in(site)
    cookie = visitor.cookie
    console_of(site).done("export", file)
    visitor.run(lambda session: session.destroy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flask_gsession.moving.importing.enter", lambda *_: True)
        console_of(site).done("import", file)
    assert console_of(site).done("import", file) == "session: 0 imported, 1 there already\n"
    assert owner(site.visitor(cookie)) == "ada"


def test_revoking_all_beside_an_import(site: Site, file: str) -> None:
    visitor = signed_in(site)
    cookie = visitor.cookie
    console_of(site).done("export", file)
    visitor.run(lambda session: session.destroy())
    console = Console(site.store, clock=site.clock, key_prefix=site.prefix)

    def revoke() -> None:
        with site.app.app_context():
            site.ext.users.revoke_all("ada")

    for when in ("before", "after"):
        getattr(site.store, when)("create", revoke)
        text = console.done("import", file)
        assert text == "session: 0 imported, 1 revoked since their sign-in\n"
        assert owner(site.visitor(cookie)) is None
        assert site.sessions() == {}
        site.clock.advance(60)


def test_a_user_with_a_damaged_roster_holds_up_nobody(site: Site, file: str) -> None:
    signed_in(site), signed_in(site, "bob")
    console_of(site).done("export", file)
    damage(site)
    text = console_of(site).done("import", file)
    assert "1 of a user whose list of sessions can't be read" in text
    assert "1 there already" in text
