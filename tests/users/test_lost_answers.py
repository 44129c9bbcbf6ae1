"""A roster was changed, or not, and the answer of the store was lost."""

from __future__ import annotations

from typing import Any

import pytest

from flask_gsession import StoreUnavailable
from tests.harness.apps import Site, SiteMaker

from .test_devices import device_id, down, ids, owner, signed_in


def lose_the_answer(site: Site, of_a_new_roster: bool) -> None:
    """The next change of a roster is stored, and fails. The session before it is stored as well."""
    if of_a_new_roster:
        site.store.after("create", lambda: site.store.after("create", down))
    else:
        site.store.after("save", down)


def bind(session: Any) -> None:
    session.bind("ada")


@pytest.mark.parametrize("way", ["first", "another", "confirm", "switch", "block"])
def test_a_sign_in_that_fails_takes_no_place(make_site: SiteMaker, way: str) -> None:
    site = make_site(max_per_user=1 if way == "first" else 2, max_policy="refuse")
    visitor, before = site.visitor(), way != "first"
    if before:
        signed_in(site)
    if way == "confirm":
        visitor = signed_in(site)
    elif way == "switch":
        visitor = signed_in(site, "bob")
    elif way == "block":
        visitor.run(lambda session: session.update(a=1))

    def step(session: Any) -> None:
        if way == "confirm":
            session.confirm()
        elif way == "block":
            with pytest.raises(StoreUnavailable), session.transaction():
                session.bind("ada")
        else:
            session.bind("ada")

    lose_the_answer(site, not before)
    assert visitor.ask(step).status_code == (200 if way == "block" else 503)
    assert owner(visitor) is None, "no response carried the token"
    assert len(ids(site)) == len(site.sessions()) == before
    assert ids(site, "bob") == []
    assert owner(signed_in(site)) == "ada", "there is room"


def test_a_long_outage_leaves_a_roster_entry_that_makes_room(make_site: SiteMaker) -> None:
    """The session could be deleted, but its roster not be changed."""
    site = make_site(max_per_user=1, max_policy="refuse")
    lose_the_answer(site, True)
    site.store.after("delete", lambda: site.store.before("load", down))
    assert site.visitor().ask(bind).status_code == 503
    assert (len(ids(site)), site.sessions()) == (1, {})
    assert owner(signed_in(site)) == "ada"


def test_a_rotation_with_grace_keeps_its_session(site: Site) -> None:
    """The old token still leads to it, so it doesn't end with the failure."""
    visitor = signed_in(site)
    device = device_id(visitor)
    lose_the_answer(site, False)
    assert visitor.ask(lambda session: session.rotate(60)).status_code == 503
    assert (owner(visitor), ids(site)) == ("ada", [device])
