"""G4: a session that was logged out, revoked, rotated away or expired never comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from flask_gsession.events import SessionRotated, WriteDropped
from flask_gsession.stores.base import milliseconds, unexpired
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import FakeClock
from tests.harness.apps import InsideMongoDB, InsideRedis, InsideSQLite, Site, SiteMaker, Visitor
from tests.harness.servers import MongoServer, with_database

IDLE = 100.0
GRACE = 10.0


@pytest.fixture
def site(make_site: SiteMaker) -> Site:
    return make_site(idle_timeout=IDLE, renew_interval=5, absolute_timeout=1000)


def visitor_with(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return visitor


def set_key(key: str, value: object) -> Callable[[Any], object]:
    return lambda session: session.update({key: value})


def live_and_pointers(site: Site) -> tuple[int, int]:
    """How many records live, and how many point to one."""
    keys = [key.removeprefix(site.prefix).strip("{}") for key in site.stored()]
    now = milliseconds(site.clock)
    found = [unexpired(site.store.store, key, now) for key in keys]
    records = [record for record in found if record is not None]
    pointers = [record for record in records if record.successor is not None]
    return len(records) - len(pointers), len(pointers)


# An end beside a request that is under way ---------------------------------------------------

REQUESTS: dict[str, Callable[[Any], object]] = {
    "write": set_key("a", 1),
    "nested change": lambda session: session["items"].append(1),
    "merged write": lambda session: session.update(hits=session["hits"] + 1),
    "renewal": dict,
    "forced save": lambda session: setattr(session, "modified", True),
    "lifetime": lambda session: session.set_lifetime(500),
    "permanent": lambda session: setattr(session, "permanent", True),
    "atomic update": lambda session: session.update_atomic("hits", lambda hits: hits + 1),
    "rotation": lambda session: session.rotate(),
    "rotation without grace": lambda session: session.rotate(grace=0),
    "rotation and write": lambda session: (session.rotate(), session.update(a=1)),
    "removal of all": lambda session: session.clear(),
}

ENDS: dict[str, Callable[[Site, Visitor], object]] = {
    "logout": lambda site, tab: tab.run(lambda session: session.destroy()),
    "revocation": lambda site, tab: site.ext.store(site.app).delete(
        tab.run(lambda session: session.handle)
    ),
    "rotation": lambda site, tab: tab.run(lambda session: session.rotate(grace=0)),
    "idle expiry": lambda site, tab: site.clock.advance(IDLE + 6),
    "absolute expiry": lambda site, tab: site.clock.advance(1001),
}


def at_the_start(site: Site, visitor: Visitor, tab: Visitor, end: Callable[[], object]) -> Any:
    """Between the load and the view's change."""
    return lambda session: (dict(session), end())


def at_the_write(site: Site, visitor: Visitor, tab: Visitor, end: Callable[[], object]) -> Any:
    """Between the view and the write."""
    site.store.before("renew", end)
    site.before_a_write(end)
    return lambda session: None


def before_the_reload(site: Site, visitor: Visitor, tab: Visitor, end: Callable[[], object]) -> Any:
    """After a lost race, before the request sees the winner's write."""
    site.before_a_write(
        lambda: (tab.run(set_key("other", 2)), site.store.before("load", end)),
    )
    return lambda session: None


def after_the_reload(site: Site, visitor: Visitor, tab: Visitor, end: Callable[[], object]) -> Any:
    """After a lost race, before the merged changes are written."""
    site.before_a_write(lambda: (tab.run(set_key("other", 2)), site.before_a_write(end)))
    return lambda session: None


CASES = [
    (what, point)
    for what in REQUESTS
    for point in (at_the_start, at_the_write, before_the_reload, after_the_reload)
    # Every write loses its race in the same place; a renewal that loses it is not tried again.
    if point in (at_the_start, at_the_write)
    or what in ("write", "atomic update", "rotation and write", "removal of all")
]


@pytest.mark.parametrize("how", ENDS)
def test_an_end_beside_any_request_is_final(make_site: SiteMaker, how: str) -> None:
    site = make_site(
        idle_timeout=IDLE,
        renew_interval=5,
        absolute_timeout=1000,
        merge_policies={"hits": "counter"},
        config={"PERMANENT_SESSION_LIFETIME": timedelta(seconds=500)},
    )
    for what, point in CASES:
        where = f"{how} beside a {what}, {point.__name__}"
        visitor = visitor_with(site, a=0, items=[], hits=0)
        tab = visitor.another_tab()
        cookie = visitor.cookie
        site.clock.advance(10)  # a renewal is due
        ended: list[object] = []

        def end(ended: list[object] = ended, tab: Visitor = tab) -> None:
            if not ended:
                ended.append(True)
                ENDS[how](site, tab)

        first, request = point(site, visitor, tab, end), REQUESTS[what]
        response = visitor.ask(
            lambda session, first=first, request=request: (first(session), request(session))
        )
        site.store._hooks.clear()
        assert ended, where
        assert response.status_code == (409 if what == "atomic update" else 200), where

        assert site.visitor(cookie).run(dict) == {}, where
        assert visitor.run(dict) == {}, where
        if how == "rotation":
            assert tab.run(dict)["a"] == 0, where
            assert live_and_pointers(site) == (1, 0), where
            tab.run(lambda session: session.destroy())
        assert live_and_pointers(site) == (0, 0), where
        if "expiry" not in how:
            assert not site.stored(), where


def test_the_end_is_logged_and_the_browser_gets_no_cookie(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()
    handle = visitor.run(lambda session: session.handle)
    site.before_each("save", lambda: tab.run(lambda session: session.destroy()))
    response = visitor.ask(set_key("a", 1))
    assert response.status_code == 200
    assert "Set-Cookie" not in response.headers
    (dropped,) = site.happened(WriteDropped)
    assert dropped.handle == handle


def test_an_ended_session_takes_no_more_writes_in_its_request(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()

    def view(session: Any) -> None:
        assert session["a"] == 0
        tab.run(lambda session: session.destroy())
        session.reload()
        assert dict(session) == {}
        assert session.handle is None
        session["a"] = 1

    assert "Set-Cookie" not in visitor.ask(view).headers
    assert not site.stored()


def test_two_logouts_at_once(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()
    site.before_each("delete", lambda: tab.run(lambda session: session.destroy()))
    visitor.run(lambda session: session.destroy())
    assert not site.stored()
    assert visitor.cookie is None
    assert tab.cookie is None


def test_the_token_of_the_dead_is_never_used_again(site: Site) -> None:
    for how, end in ENDS.items():
        visitor = visitor_with(site, a=0)
        cookie, tab = visitor.cookie, visitor.another_tab()
        end(site, tab)
        visitor.run(set_key("a", 1))
        assert visitor.cookie not in (None, cookie), how
        assert visitor.run(dict) == {"a": 1}, how
        assert site.visitor(cookie).run(dict) == {}, how


# Rotation ------------------------------------------------------------------------------------


def test_rotation_moves_everything_to_a_new_token(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    old, handle = visitor.token, visitor.run(lambda session: session.handle)
    created = visitor.run(lambda session: session.created_at)
    response = visitor.ask(lambda session: (session.rotate(), session.update(b=1)))
    assert response.headers.getlist("Set-Cookie")
    assert visitor.token != old
    assert visitor.run(dict) == {"a": 0, "b": 1}
    assert visitor.run(lambda session: session.handle) != handle
    assert visitor.run(lambda session: session.created_at) == created
    (rotated,) = site.happened(SessionRotated)
    assert (rotated.previous, rotated.handle) == (handle, visitor.run(lambda s: s.handle))


def test_the_old_token_serves_for_the_grace_and_no_longer(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate())
    site.clock.advance(GRACE - 0.01)
    for request in (dict, set_key("b", 1), lambda session: session.setdefault("c", []).append(1)):
        response = tab.ask(request)
        assert response.status_code == 200
        assert "Set-Cookie" not in response.headers
    expected = {"a": 0, "b": 1, "c": [1]}
    assert visitor.run(dict) == tab.run(dict) == expected
    site.clock.advance(0.02)
    assert tab.run(dict) == {}
    assert tab.run(lambda session: session.new)
    assert visitor.run(dict) == expected


def test_a_pointer_lends_no_cookie_to_a_permanent_session(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    visitor.run(lambda session: setattr(session, "permanent", True))
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(60))
    site.clock.advance(50)  # due for renewal, which would send a permanent session's cookie again
    for request in (dict, set_key("a", 1), lambda session: session.set_lifetime(50)):
        assert "Set-Cookie" not in tab.ask(request).headers
    assert visitor.run(dict)["a"] == 1


def test_rotation_without_grace_ends_the_old_token_at_once(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate(grace=0))
    assert tab.run(dict) == {}
    assert visitor.run(dict) == {"a": 0}
    assert live_and_pointers(site) == (1, 0)


def test_the_smaller_grace_of_two_holds(site: Site) -> None:
    for graces in ((0, 10), (10, 0), (0, None)):
        visitor = visitor_with(site, a=0)
        tab = visitor.another_tab()
        visitor.run(lambda session, graces=graces: [session.rotate(grace) for grace in graces])
        assert tab.run(dict) == {}
        assert visitor.run(dict) == {"a": 0}


def test_a_clock_that_is_set_back_ends_nobody(site: Site) -> None:
    visitor = visitor_with(site, a=1)
    site.clock.advance(-3 * 3600)
    for step in (lambda session: session.rotate(), lambda session: session.set_lifetime(60)):
        visitor.run(step)
        assert visitor.run(dict) == {"a": 1}
    site.clock.advance(120)
    assert visitor.run(dict) == {}


def test_rotation_beside_a_write(site: Site) -> None:
    """Both orders: the write is in the one successor, and only the rotating request gets it."""
    rotate = lambda session: session.rotate()  # noqa: E731
    for first, second in ((rotate, set_key("b", 1)), (set_key("b", 1), rotate)):
        visitor = visitor_with(site, a=0)
        tab = visitor.another_tab()
        start = visitor.cookie
        site.before_a_write(lambda tab=tab, first=first: tab.run(first))
        visitor.run(second)
        rotated, other = (tab, visitor) if first is rotate else (visitor, tab)
        assert rotated.cookie != start
        assert other.cookie == start
        assert rotated.run(dict) == other.run(dict) == {"a": 0, "b": 1}
        assert live_and_pointers(site) == (1, 1)
        site.clock.advance(GRACE + 0.01)
        assert other.run(dict) == {}
        assert rotated.run(dict) == {"a": 0, "b": 1}
        rotated.run(lambda session: session.destroy())


def test_rotation_beside_rotation_has_one_successor(site: Site) -> None:
    def rotate_and_set(key: str) -> Callable[[Any], object]:
        return lambda session: (session.rotate(), session.update({key: 1}))

    for point in (at_the_start, at_the_write):
        visitor = visitor_with(site, a=0)
        winner = visitor.another_tab()
        start = visitor.cookie
        first = point(site, visitor, winner, lambda tab=winner: tab.run(rotate_and_set("b")))
        loser = rotate_and_set("c")
        visitor.run(lambda session, first=first, loser=loser: (first(session), loser(session)))
        site.store._hooks.clear()

        everything = {"a": 0, "b": 1, "c": 1}
        assert winner.cookie != start
        assert winner.run(dict) == visitor.run(dict) == everything
        # The loser is given no token. So the browser, whose tabs share one cookie, ends up with
        # the one that lives, whichever response comes last.
        assert visitor.cookie == start
        assert live_and_pointers(site) == (1, 1)
        site.clock.advance(GRACE + 0.01)
        assert visitor.run(dict) == {}
        assert winner.run(dict) == everything
        winner.run(lambda session: session.destroy())


def test_a_sign_in_that_lost_a_race_to_a_rotation_has_a_session_of_its_own(site: Site) -> None:
    """Its token is an old one by then, and never leads to a token of that session."""
    visitor = visitor_with(site, a=0)
    other = visitor.another_tab()
    site.before_a_write(lambda: other.run(lambda session: session.rotate()))
    visitor.run(lambda session: (session.rotate(grace=0), session.update(user=1)))
    assert visitor.run(dict) == {"user": 1}
    assert other.run(dict) == {"a": 0}
    assert live_and_pointers(site)[0] == 2


def test_a_chain_of_rotations_within_the_grace(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    tabs = []
    for _ in range(3):
        tabs.append(visitor.another_tab())
        visitor.run(lambda session: session.rotate())
    for number, tab in enumerate(tabs):
        tab.run(set_key(f"from {number}", number))
    everything = {"a": 0, "from 0": 0, "from 1": 1, "from 2": 2}
    assert visitor.run(dict) == everything
    assert [tab.run(dict) for tab in tabs] == [everything] * 3


def test_logout_with_an_old_token_ends_the_successor(site: Site) -> None:
    for rotations in (1, 2, 3):
        for look in (True, False):
            visitor = visitor_with(site, a=0)
            tab = visitor.another_tab()
            for _ in range(rotations):
                visitor.run(lambda session: session.rotate())
            tab.run(lambda session, look=look: (look and dict(session), session.destroy()))
            assert visitor.run(dict) == {}
            assert tab.cookie is None
            assert live_and_pointers(site)[0] == 0


def test_logout_right_after_the_rotation_of_another_tab(site: Site) -> None:
    """The new token is in the response already when the session ends."""
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()
    site.store.after("replace", lambda: tab.run(lambda session: session.destroy()))
    visitor.run(lambda session: session.rotate())
    assert visitor.run(dict) == {}
    assert live_and_pointers(site)[0] == 0


def test_a_sign_in_through_an_old_token_has_a_session_of_its_own(site: Site) -> None:
    """As at a login in a tab that was slower than a rotation in another one."""
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()
    visitor.run(lambda session: session.rotate())
    tab.run(lambda session: (session.rotate(grace=0), session.update(user=1)))
    assert tab.run(dict) == {"user": 1}
    assert visitor.run(dict) == {"a": 0}
    assert live_and_pointers(site)[0] == 2


def test_a_write_after_destroy_starts_a_new_session(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    old = visitor.another_tab()
    visitor.run(lambda session: (session.destroy(), session.update(b=1)))
    assert visitor.run(dict) == {"b": 1}
    assert visitor.token != old.token
    assert old.run(dict) == {}
    assert len(site.stored()) == 1


# Expiry --------------------------------------------------------------------------------------


def expiries_in_ms(site: Site) -> dict[str, float]:
    """The milliseconds after which the store itself removes each of its keys."""
    now = int(site.clock() * 1000)
    inside = site.inside
    if isinstance(inside, InsideRedis):
        keys = list(inside.client.scan_iter(f"{site.prefix}*"))
        return {key.decode(): inside.client.pttl(key) for key in keys}
    if isinstance(inside, InsideMongoDB):
        documents = list(inside.database["gsession"].find())
        assert all(type(document["idle_expires_at"]) is datetime for document in documents)
        ends = {document["_id"]: document["idle_expires_at"].timestamp() for document in documents}
        offset = datetime.now().astimezone().utcoffset() or timedelta()  # they are naive UTC
        return {key: int((end + offset.total_seconds()) * 1000) - now for key, end in ends.items()}
    if isinstance(inside, InsideSQLite):
        return {key: idle - now for key, idle in inside.rows("key, idle_expires_at")}
    store = site.store.store
    assert isinstance(store, MemoryStore)
    return {key: record.idle_expires_at - now for key, record in store._records.items()}


def test_no_key_is_ever_without_an_expiry(site: Site) -> None:
    visitor = visitor_with(site, a=0, items=[])
    tab = visitor.another_tab()
    longest = (IDLE + 5) * 1000

    def check(what: str, count: int) -> None:
        expiries = expiries_in_ms(site)
        assert len(expiries) == count, what
        assert all(0 < left <= longest for left in expiries.values()), (what, expiries)

    check("create", 1)
    for what, request in REQUESTS.items():
        if "rotation" not in what and what not in ("removal of all", "merged write", "lifetime"):
            if what == "atomic update":
                request = set_key("hits", 0)
            site.clock.advance(10)
            visitor.run(request)
            if what == "permanent":
                visitor.run(lambda session: session.pop("_permanent"))
            check(what, 1)
    site.before_each("save", lambda: tab.run(set_key("b", 1)))
    visitor.run(set_key("a", 2))
    check("lost race", 1)
    visitor.run(lambda session: session.rotate(grace=5))
    check("rotation", 2)
    assert min(expiries_in_ms(site).values()) <= 5000
    tab.run(set_key("c", 1))
    check("write through a pointer", 2)
    visitor.run(lambda session: session.rotate(grace=0))
    # On MongoDB the old key keeps a mark for ten seconds, by which a repeat knows the end.
    check("rotation without grace", 3 if isinstance(site.inside, InsideMongoDB) else 2)
    site.clock.advance(IDLE + 6)
    visitor.run(set_key("a", 3))
    site.store.before("save", lambda: site.clock.advance(IDLE + 6))
    visitor.run(set_key("a", 4))
    if isinstance(site.inside, InsideRedis):
        assert all(left > 0 for left in expiries_in_ms(site).values())


def test_mongodb_has_the_ttl_index(mongodb_url: str, store_prefix: str, clock: FakeClock) -> None:
    with SiteMaker(mongodb_url, store_prefix, clock) as make:
        site = make()
        visitor_with(site, a=0)
        assert isinstance(site.inside, InsideMongoDB)
        indexes = site.inside.database["gsession"].index_information()
        assert indexes["gsession_expiry"]["key"] == [("idle_expires_at", 1)]
        assert indexes["gsession_expiry"]["expireAfterSeconds"] == 0
        assert "partialFilterExpression" not in indexes["gsession_expiry"]
        assert "sparse" not in indexes["gsession_expiry"]


def test_redis_lets_go_in_real_time(redis_url: str, store_prefix: str) -> None:
    with SiteMaker(redis_url, store_prefix, time.time) as make:
        site = make(idle_timeout=1, renew_interval=0)
        expires_in_real_time(site)
        assert not site.stored()


def test_mongodb_lets_go_in_real_time(store_prefix: str) -> None:
    with MongoServer("--setParameter", "ttlMonitorSleepSecs=1") as server:
        url = with_database(server.url, "expiry")
        with SiteMaker(url, store_prefix, time.time) as make:
            site = make(idle_timeout=1, renew_interval=0)
            expires_in_real_time(site)
            deadline = time.monotonic() + 30
            while site.stored() and time.monotonic() < deadline:
                time.sleep(0.1)  # for the next sweep of the server
            assert not site.stored()


def expires_in_real_time(site: Site) -> None:
    end = None
    while end is None:  # on a busy machine it may be over before it was looked at
        visitor = visitor_with(site, a=0)
        tab = visitor.another_tab()
        began = time.monotonic()
        visitor.run(lambda session: session.rotate(grace=0.5))
        found = visitor.run(dict)
        if time.monotonic() - began < 0.9:
            assert found == {"a": 0}
            end = visitor.run(lambda session: session.expires_at)
    time.sleep(max(0, end.timestamp() - time.time()) + 0.05)
    assert visitor.run(dict) == {}
    assert tab.run(dict) == {}
