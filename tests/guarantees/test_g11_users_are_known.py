"""G11: a user's sessions are known: listed, limited exactly, and ended for certain.

tests/users/ tests the behaviour on every store. These tests are about costs and failures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flask_gsession.stores.base import is_session_key
from flask_gsession.users.rosters import roster_key
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.users.test_devices import device_id, ids, owner, signed_in


def trips(site: Site, act: Callable[[], object]) -> int:
    """How many calls of the store, which are round trips, ``act`` takes."""
    with site.counted() as count:
        act()
    return len(count.calls)


def plain(site: Site) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(a=1))
    return visitor


#: Round trips of a request with an unbound session, and how many more a bound one takes.
COSTS: dict[str, tuple[Callable[[Any], object], int, int]] = {
    "read": (dict, 1, 0),
    "write": (lambda session: session.update(b=1), 2, 0),
    "atomic update": (lambda session: session.update_atomic("a", lambda a: a + 1), 2, 0),
    "rotation": (lambda session: session.rotate(), 2, 2),
    "rotation without grace": (lambda session: session.rotate(grace=0), 2, 2),
    "logout": (lambda session: session.destroy(), 1, 2),
    "logout after a look": (lambda session: (dict(session), session.destroy()), 2, 2),
    "emptied": (lambda session: session.clear(), 2, 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_round_trips_of_a_bound_session(site: Site, name: str) -> None:
    act, usual, more = COSTS[name]
    unbound, bound = plain(site), plain(site)
    bound.run(lambda session: session.bind("ada"))
    assert trips(site, lambda: unbound.run(act)) == usual
    assert trips(site, lambda: bound.run(act)) == usual + more


def test_round_trips_of_a_sign_in(site: Site) -> None:
    fresh, anonymous, again = site.visitor(), plain(site), plain(site)
    assert trips(site, lambda: fresh.run(lambda session: session.bind("ada"))) == 1 + 2
    assert trips(site, lambda: anonymous.run(lambda session: session.bind("ada"))) == 2 + 2

    def in_login(session: Any) -> None:
        with site.ext.users.login("ada"):
            session.bind("ada")

    assert trips(site, lambda: again.run(in_login)) == 2 + 3, "it looks before and after"


def test_round_trips_of_a_touch(site: Site) -> None:
    visitor = signed_in(site)
    site.clock.advance(301)
    assert trips(site, lambda: visitor.run(lambda session: session.update(a=1))) == 2 + 2
    site.clock.advance(301)
    assert trips(site, lambda: visitor.run(dict)) == 1 + 2 + 1, "with the renewal"


@pytest.mark.parametrize("number", [1, 7])
def test_round_trips_of_a_list_and_a_revocation(site: Site, number: int) -> None:
    visitors = [signed_in(site) for _ in range(number)]
    users, first = site.ext.users, device_id(visitors[0])
    with site.app.app_context():
        assert trips(site, lambda: users.devices("ada")) == 1
        assert trips(site, lambda: users.revoke("ada", first)) <= 5
        with site.counted() as count:
            users.revoke_all("ada")
        deletes = count.calls.count("delete")
        assert len(count.calls) - deletes <= 4
        assert deletes <= (number - 1 if site.store.bulk is None else 1)
    assert {owner(visitor) for visitor in visitors} == {None}


def test_a_request_that_does_not_touch_the_session_costs_nothing(site: Site) -> None:
    visitor = signed_in(site)
    site.clock.advance(301)
    assert trips(site, lambda: visitor.get("/untouched")) == 0


def test_nothing_is_stored_without_an_expiry(site: Site) -> None:
    """A roster outlives its sessions, and those that it must keep out, by a minute at most."""
    visitor = signed_in(site)
    store = site.store.store
    key = roster_key("ada")
    record = store.load(key)
    session = store.load(visitor.run(lambda session: session.handle))
    assert session.idle_expires_at < record.idle_expires_at
    assert record.idle_expires_at <= session.idle_expires_at + 300_000 + 2 * 60_000
    visitor.run(lambda session: session.destroy())
    assert store.load(key).idle_expires_at <= site.clock() * 1000 + 60_000
    with site.app.app_context():
        site.ext.users.revoke_all("ada")
    kept = store.load(key).idle_expires_at - site.clock() * 1000
    assert 31 * 86_400_000 <= kept <= 31 * 86_400_000 + 60_000
    site.clock.advance(32 * 86_400)
    assert ids(site) == []
    assert owner(signed_in(site)) == "ada"


def test_a_roster_is_not_a_session(site: Site) -> None:
    signed_in(site)
    key = roster_key("ada")
    assert not is_session_key(key)
    with site.app.app_context(), pytest.raises(ValueError, match="not the handle"):
        site.ext.open(key)
    # Nor does anybody get into it with a token.
    assert roster_key("ada") == key != roster_key("Ada")


@pytest.fixture
def sealed(make_site: SiteMaker) -> Site:
    return make_site(encryption_keys=["A" * 43])


def test_a_roster_is_encrypted_with_the_sessions(sealed: Site, site: Site) -> None:
    visitors = [signed_in(sealed, "countess", label="Analytical Engine") for _ in range(2)]
    for raw in sealed.stored().values():
        assert b"Analytical" not in raw
        assert b"countess" not in raw
    assert len(ids(sealed, "countess")) == 2
    with sealed.app.app_context():
        assert sealed.ext.users.revoke_all("countess") == 2
    assert {owner(visitor) for visitor in visitors} == {None}
    signed_in(site, "ada", label="Analytical Engine")
    assert any(b"Analytical" in raw for raw in site.stored().values()), "or this shows nothing"


def test_no_event_holds_a_secret(site: Site) -> None:
    visitor = signed_in(site, label="Firefox")
    tokens = {visitor.token}
    visitor.run(lambda session: session.rotate())
    tokens.add(visitor.token)
    with site.app.app_context():
        site.ext.users.revoke_all("ada", reason="stolen", by="support")
    text = repr(site.events)
    assert "DeviceRevoked" in text
    assert not any(token in text for token in tokens)
