"""G2: few round trips, counted by the servers themselves, and an idle timeout that holds."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import flask
import pytest

from tests.harness.apps import Site, SiteMaker, Visitor

# The server's command for a plain read, for stores with a server.
PLAIN_READ = {"redis": Counter(get=1), "mongodb": Counter(query=1)}


@pytest.fixture
def site(make_site: SiteMaker) -> Site:
    """A site whose store has been used: connections are open, scripts and indexes are there."""
    site = make_site()
    visitor = site.visitor()
    visitor.run(lambda session: session.update(key=1))
    visitor.run(lambda session: session.update(key=2))
    visitor.run(lambda session: session.rotate(grace=0))
    site.clock.advance(120)
    visitor.run(dict)
    visitor.run(lambda session: session.destroy())
    return site


def give_content(session: Any) -> None:
    session.update(name="Ada", cart=["mug"], visits=1)


@pytest.fixture
def visitor(site: Site) -> Visitor:
    """Somebody with a session."""
    visitor = site.visitor()
    visitor.run(give_content)
    return visitor


READS = {
    "one key": lambda session: session["name"],
    "a missing key": lambda session: session.get("missing"),
    "every key": dict,
    "many times": lambda session: [session["name"] for _ in range(20)],
    "a mutable value": lambda session: len(session["cart"]),
    "the length": len,
    "what it says of itself": lambda session: (session.handle, session.size, session.expires_at),
    "whether it is new": lambda session: session.new,
    "no flashes": lambda session: flask.get_flashed_messages(),
    "an equal value assigned": lambda session: session.update(name="Ada", cart=["mug"]),
    "a change taken back": lambda session: (session["cart"].append(1), session["cart"].pop()),
}


def test_a_read_is_one_plain_read(site: Site, visitor: Visitor) -> None:
    for what, read in READS.items():
        with site.counted() as count:
            visitor.run(read)
        assert (count.calls, count.trips) == (["load"], 1), what
        if count.commands is not None:
            assert count.commands == PLAIN_READ[urlsplit(site.url).scheme], what


WRITES = {
    "a key that was read": lambda session: session.update(visits=session["visits"] + 1),
    "a key that was not": lambda session: session.update(visits=7),
    "a nested change": lambda session: session["cart"].append("cup"),
    "a new key": lambda session: session.setdefault("wishes", []),
    "a deletion": lambda session: session.pop("name"),
    "many keys": lambda session: session.set_many({f"key {n}": n for n in range(50)}),
    "a flash": lambda session: flask.flash("hello"),
    "permanent": lambda session: setattr(session, "permanent", True),
    "a forced save": lambda session: setattr(session, "modified", True),
    "a lifetime": lambda session: session.set_lifetime(60),
    "an atomic update": lambda session: session.update_atomic("visits", lambda n: n + 1),
    "the last key": lambda session: session.remove(*session),
    "clear": lambda session: session.clear(),
}


def test_read_and_write_are_two(site: Site) -> None:
    for what, write in WRITES.items():
        visitor = site.visitor()
        visitor.run(give_content)
        with site.counted() as count:
            visitor.run(write)
        assert (len(count.calls), count.trips) == (2, 2), what
        assert count.calls[0] == "load", what


def test_a_write_that_is_due_for_renewal_needs_no_third(site: Site, visitor: Visitor) -> None:
    before = visitor.run(lambda session: session.expires_at)
    site.clock.advance(3600)
    with site.counted() as count:
        visitor.run(lambda session: session.update(visits=2))
    assert (count.calls, count.trips) == (["load", "save"], 2)
    assert visitor.run(lambda session: session.expires_at) - before == timedelta(hours=1)


def test_creating_takes_one_round_trip(site: Site) -> None:
    for write in (
        lambda session: session.update(key=1),
        lambda session: (session.get("key"), session.update({str(n): n for n in range(50)})),
        lambda session: (session.rotate(), session.set_lifetime(60), session.update(key=1)),
        lambda session: session.update_atomic("key", lambda n: n + 1, 0),
        lambda session: flask.flash("hello"),
    ):
        with site.counted() as count:
            site.visitor().run(write)
        assert (count.calls, count.trips) == (["create"], 1)


def test_logout_is_two_at_most(site: Site) -> None:
    for logout, trips in (
        (lambda session: session.destroy(), 1),
        (lambda session: (session["key"], session.destroy()), 2),
        (lambda session: (session.update(key=2), session.destroy()), 2),
        (lambda session: session.clear(), 2),
    ):
        visitor = site.visitor()
        visitor.run(lambda session: session.update(key=1))
        with site.counted() as count:
            visitor.run(logout)
        assert (len(count.calls), count.trips) == (trips, trips)
        assert not site.stored()


def test_an_unknown_token_costs_one_look(site: Site, visitor: Visitor) -> None:
    tab = visitor.another_tab()
    visitor.run(lambda session: session.destroy())
    with site.counted() as count:
        assert tab.run(dict) == {}
    assert (count.calls, count.trips) == (["load"], 1)
    with site.counted() as count:
        assert tab.run(lambda session: session.update(key=1)) is None
    assert (count.calls, count.trips) == (["load", "create"], 2)


def test_rotation_takes_the_place_of_the_save(site: Site, visitor: Visitor) -> None:
    for grace in (0, 10):
        with site.counted() as count:
            visitor.run(lambda session, grace=grace: (session.update(n=1), session.rotate(grace)))
        assert count.calls == ["load", "replace"]
        # Two documents on MongoDB, hence two operations.
        assert count.trips == (3 if site.url.startswith("mongodb") else 2)


def test_an_old_token_within_the_grace_costs_one_look_more(site: Site, visitor: Visitor) -> None:
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate())
    with site.counted() as count:
        tab.run(dict)
    assert (count.calls, count.trips) == (["load", "load"], 2)
    with site.counted() as count:
        tab.run(lambda session: session.update(visits=2))
    assert (count.calls, count.trips) == (["load", "load", "save"], 3)


def test_reload_takes_one_round_trip(site: Site, visitor: Visitor) -> None:
    with site.counted() as count:
        visitor.run(lambda session: (dict(session), session.reload(), dict(session)))
    assert (count.calls, count.trips) == (["load", "load"], 2)


def test_each_lost_race_costs_two_more(site: Site, visitor: Visitor) -> None:
    other = visitor.another_tab()
    site.before_each(
        "save",
        lambda: other.run(lambda session: session.update(n=2)),
        lambda: other.run(lambda session: session.update(n=3)),
    )
    with site.counted() as count:
        visitor.run(lambda session: session.update(name="Grace"))
    the_others = Counter(load=2, save=2)
    assert Counter(count.calls) - the_others == Counter(load=3, save=3)
    # MongoDB looks why nothing matched.
    assert count.trips == 10 + 2 * site.url.startswith("mongodb")
    assert visitor.run(dict) == {"name": "Grace", "cart": ["mug"], "visits": 1, "n": 3}


def test_a_session_transaction_costs_as_much_as_a_request(site: Site, visitor: Visitor) -> None:
    with site.counted() as count, visitor.session_transaction() as session:
        session["visits"] = session["visits"] + 1
    assert (count.calls, count.trips) == (["load", "save"], 2)
    with site.counted() as count, visitor.session_transaction() as session:
        assert session["visits"] == 2
    assert (count.calls, count.trips) == (["load"], 1)


# The idle timeout ----------------------------------------------------------------------------


def test_renewed_at_most_once_per_interval(make_site: SiteMaker) -> None:
    site = make_site(idle_timeout=1000, renew_interval=50)
    visitor = site.visitor()
    visitor.run(lambda session: session.update(key=1))
    with site.counted() as count:
        for _ in range(100):
            site.clock.advance(10)
            visitor.run(dict)
    renewals = count.calls.count("renew")
    assert 15 <= renewals <= 20
    assert count.trips == len(count.calls) == 100 + renewals
    with site.counted() as count:
        for _ in range(20):  # at one moment
            visitor.run(dict)
    assert count.calls.count("renew") <= 1


def test_renewed_every_minute_by_default(make_site: SiteMaker) -> None:
    for idle, interval in ((7200, 60), (200, 10)):  # a twentieth, a minute at most
        site = make_site(idle_timeout=idle)
        visitor = site.visitor()
        visitor.run(lambda session: session.update(key=1))
        with site.counted() as count:
            site.clock.advance(interval - 0.1)
            visitor.run(dict)
        assert count.calls == ["load"]
        with site.counted() as count:
            site.clock.advance(0.2)
            visitor.run(dict)
            visitor.run(dict)
        assert count.calls == ["load", "renew", "load"]


def lives(site: Site, visitor: Visitor) -> bool:
    return bool(visitor.run(lambda session: "key" in session))


def write(session: Any) -> None:
    session["key"] = session.get("key", 0) + 1


@pytest.mark.parametrize(("idle", "setting", "interval"), [(7200, None, 60), (100, 25, 25)])
def test_idle_never_fires_early_and_an_interval_late_at_most(
    make_site: SiteMaker, idle: float, setting: float | None, interval: float
) -> None:
    site = make_site(idle_timeout=idle, renew_interval=setting)
    uses = (
        [],
        [0],
        [interval / 2],
        [interval - 0.001],
        [interval],
        [interval + 0.001],
        [interval * 0.6] * 5,
        [idle - 0.001],
        [idle * 0.9] * 3,
    )
    for gaps in uses:
        for use in (dict, write):
            for wait, alive in ((idle - 0.002, True), (idle + interval + 0.002, False)):
                visitor = site.visitor()
                visitor.run(write)
                for gap in gaps:
                    site.clock.advance(gap)
                    visitor.run(use)
                    assert visitor.cookie is not None
                site.clock.advance(wait)
                assert lives(site, visitor) is alive, (gaps, use, wait)


def test_a_session_has_its_own_idle_timeout(make_site: SiteMaker) -> None:
    """The idle timeout of permanent sessions, or its own."""
    site = make_site(
        idle_timeout=100,
        renew_interval=0,
        config={"PERMANENT_SESSION_LIFETIME": timedelta(seconds=1000)},
    )
    for choose, idle in (
        (lambda session: None, 100),
        (lambda session: setattr(session, "permanent", True), 1000),
        (lambda session: session.set_lifetime(300), 300),
        (lambda session: session.set_lifetime(20), 20),
        (lambda session: (setattr(session, "permanent", True), session.set_lifetime(300)), 300),
    ):
        for wait, alive in ((idle - 0.002, True), (idle + 0.002, False)):
            for first in (True, False):  # chosen when the session is created, or later
                visitor = site.visitor()
                if not first:
                    visitor.run(write)
                visitor.run(lambda session, choose=choose: (write(session), choose(session)))
                site.clock.advance(idle - 0.002)
                assert lives(site, visitor), (idle, first)
                site.clock.advance(wait)
                assert lives(site, visitor) is alive, (idle, first)


def test_a_lifetime_survives_saves_and_rotations(make_site: SiteMaker) -> None:
    site = make_site(idle_timeout=1000, renew_interval=0)
    visitor = site.visitor()
    visitor.run(lambda session: (write(session), session.set_lifetime(50)))
    for use in (write, lambda session: session.rotate(), dict, write):
        visitor.run(use)
        site.clock.advance(49)
    assert lives(site, visitor)
    site.clock.advance(51)
    assert not lives(site, visitor)


def test_nothing_moves_the_absolute_timeout(make_site: SiteMaker) -> None:
    site = make_site(idle_timeout=100, absolute_timeout=500)
    for use in (dict, write, lambda session: session.rotate()):
        visitor = site.visitor()
        visitor.run(write)
        end = visitor.run(lambda session: session.created_at) + timedelta(seconds=500)
        for _ in range(9):
            site.clock.advance(55)
            visitor.run(use)
            assert visitor.run(lambda session: session.expires_at) <= end
        site.clock.advance(4.9)
        visitor.run(use)
        assert lives(site, visitor)
        site.clock.advance(0.2)
        assert not lives(site, visitor)
    visitor = site.visitor()
    visitor.run(lambda session: (write(session), session.set_lifetime(500)))
    site.clock.advance(499.9)
    assert lives(site, visitor)
    site.clock.advance(0.2)
    assert not lives(site, visitor)
