"""How long one request waits for its store, and how often it asks, under each fault."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.errors import StoreUnavailable
from flask_gsession.events import SessionSaved
from flask_gsession.testing import FakeClock
from tests.harness.apps import PATIENCE, Site, SiteMaker, Visitor, until, within
from tests.harness.servers import MongoServer, RedisServer, with_database
from tests.harness.topologies import TCPProxy

BUDGET = 0.15  # seconds for a store call
BOUND = 6 * BUDGET  # for a request of one failing call, on a busy machine


def write(session: Any) -> None:
    session["a"] = 1


def count(session: Any) -> object:
    return session.update_atomic("hits", lambda hits: hits + 1)


def count_in_transaction(session: Any) -> object:
    return session.transaction().run(lambda session: session.update(hits=session["hits"] + 1))


def count_with_the_response(session: Any) -> None:
    session["hits"] += 1


REQUESTS: dict[str, Callable[[Any], object]] = {
    "read": lambda session: None,
    "write": count_with_the_response,
    "atomic update": count,
    "write, then atomic update": lambda session: (write(session), count(session)),
    "transaction": count_in_transaction,
    "logout": lambda session: session.destroy(),
    "write, then logout": lambda session: (write(session), session.destroy()),
    "clear": lambda session: session.clear(),
    "rotation": lambda session: session.rotate(),
}


def stubborn(request: Callable[[Any], object]) -> Callable[[Any], None]:
    """A view that tries again when the store is down, and then goes on without."""

    def view(session: Any) -> None:
        for _ in range(3):
            with suppress(StoreUnavailable):
                request(session)

    return view


def visitor_of(site: Site) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(hits=0))
    site.clock.advance(120)  # a renewal is due
    return visitor


# How often it asks ---------------------------------------------------------------------------


def all_fail(site: Site) -> None:
    def fail() -> None:
        raise StoreUnavailable("drill")

    for operation in (
        *("load", "create", "save", "renew", "replace", "delete"),
        "acquire",
        "release",
    ):
        for _ in range(20):
            site.store.before(operation, fail)


@pytest.mark.parametrize("insist", [False, True], ids=["once", "stubborn"])
def test_an_outage_is_met_once(insist: bool, site: Site) -> None:
    """Only an application that ends or reloads the session asks the store again."""
    for what, request in REQUESTS.items():
        visitor = visitor_of(site)

        def view(session: Any, request: Callable[[Any], object] = request) -> None:
            session.get("hits")
            all_fail(site)
            (stubborn(request) if insist else request)(session)

        with site.counted() as counted:
            response = visitor.ask(view)
        site.store._hooks.clear()
        logouts = 2 if insist and "logout" in what else 0
        assert len(counted.calls) == 2 + logouts, (what, counted.calls)
        assert response.status_code == 503 or insist or what == "read", what
        assert visitor.run(dict) == {"hits": 0}, what


def test_a_lock_is_asked_for_once_and_released(site: Site) -> None:
    """The store may have granted the lock: then it is released, or expires soon."""

    def lock(session: Any) -> None:
        with session.lock():
            raise AssertionError("it is not held")

    def view(session: Any) -> None:
        session.get("hits")
        all_fail(site)
        stubborn(lock)(session)
        stubborn(count)(session)

    visitor = visitor_of(site)
    with site.counted() as counted:
        visitor.run(view)
    assert [call for call in counted.calls if call != "release"] == ["load", "acquire"]
    until(lambda: "release" in site.store.calls)  # somebody else does it, at leisure
    assert site.store.calls.count("release") == 1


def test_a_new_session_that_could_not_be_stored_is_not_stored_later(site: Site) -> None:
    all_fail(site)
    view = stubborn(lambda session: (session.update(a=1), session.transaction().run(dict)))
    with site.counted() as counted:
        assert site.visitor().ask(view).status_code == 503
    assert counted.calls == ["create"]


def test_an_error_that_the_view_handles_does_not_fail_the_response(site: Site) -> None:
    for request in (count, count_in_transaction):
        visitor = visitor_of(site)
        site.store.before("save", drill)
        visitor.run(stubborn(request))
        assert visitor.run(dict) == {"hits": 0}
        site.store.before("save", drill)
        response = visitor.ask(lambda session, r=request: (stubborn(r)(session), write(session)))
        assert response.status_code == 503  # its other changes are not stored
        assert visitor.run(dict) == {"hits": 0}


def drill() -> None:
    raise StoreUnavailable("drill")


def test_a_logout_that_failed_leaves_the_later_hooks_a_session(site: Site) -> None:
    """As Flask-Login has one, that looks at the session after every view."""

    @site.app.after_request
    def look(response: Any) -> Any:
        from flask import session

        session.get("user")
        return response

    visitor = visitor_of(site)
    site.store.before("delete", drill)
    with site.counted() as counted:
        response = visitor.ask(lambda session: session.destroy())
    assert response.status_code == 503
    assert counted.calls == ["delete"]
    assert visitor.run(dict) == {"hits": 0}


def change(session: Any) -> None:
    session["a"] = time.monotonic()


def test_races_are_lost_for_so_long_only(make_site: Callable[..., Site]) -> None:
    site = make_site(store_timeout=0.01)
    for request in (count, count_in_transaction, count_with_the_response):
        visitor = visitor_of(site)
        tab = visitor.another_tab()
        faster = [lambda tab=tab: tab.run(change)] * 25
        site.before_each("save", *faster)
        before = len(site.happened(SessionSaved))
        assert visitor.ask(request).status_code == 409
        site.store._hooks.clear()
        assert 2 <= len(site.happened(SessionSaved)) - before < 25
        assert visitor.run(lambda session: session["hits"]) == 0


# How long it waits ---------------------------------------------------------------------------


@pytest.fixture(params=["redis", "mongodb"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("own_redis" if request.param == "redis" else "own_mongo")


@contextmanager
def sites_on(
    server: RedisServer | MongoServer, proxy: TCPProxy, budget: float = BUDGET
) -> Iterator[tuple[Site, Site]]:
    """A patient site, and one behind the proxy, on the same records."""
    url = server.url
    if isinstance(server, MongoServer):
        url = with_database(url, "budgets")
    clock = FakeClock()
    with (
        SiteMaker(url, "budgets:", clock) as make,
        SiteMaker(proxy.through(url), "budgets:", clock) as make_behind,
    ):
        yield (
            make(merge_policies={"hits": "counter"}),
            make_behind(timeout=budget, breaker_failures=0, merge_policies={"hits": "counter"}),
        )


FAULTS = ("frozen", "black hole", "drip", "lost replies")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_waits_for_one_call(fault: str, server: RedisServer | MongoServer) -> None:
    with TCPProxy(server.port) as proxy, sites_on(server, proxy) as (patient, hasty):
        faults: dict[str, Callable[[], AbstractContextManager[object]]] = {
            "frozen": server.paused,
            "black hole": proxy.blackhole,
            "drip": lambda: proxy.drip(1, 0.05),
            "lost replies": lambda: proxy.lose_reply(b"budgets:"),
        }
        for what in ("read", "write", "atomic update", "transaction", "logout"):
            request = REQUESTS[what]
            visitor = visitor_of(patient)
            behind = hasty.visitor(visitor.cookie)

            def ask(behind: Visitor = behind, request: Callable[[Any], object] = request) -> Any:
                with ExitStack() as broken:

                    def view(session: Any) -> None:
                        session.get("hits")
                        broken.enter_context(faults[fault]())
                        request(session)

                    return behind.ask(view)

            # Wait until the effects of the previous fault are over.
            until(lambda behind=behind: behind.ask(dict).status_code == 200)  # type: ignore[misc]
            patient.clock.advance(120)
            response = within(BOUND, ask)
            assert response.status_code == 503 or what == "read", what


def test_a_locked_database_is_waited_for_once(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "sessions.sqlite3"
    with SiteMaker(f"sqlite:///{path}", "", clock) as make:
        patient, hasty = make(), make(timeout=BUDGET)
        for what, request in REQUESTS.items():
            visitor = visitor_of(patient)
            behind = hasty.visitor(visitor.cookie)

            def ask(behind: Visitor = behind, request: Callable[[Any], object] = request) -> Any:
                with hasty.counted() as counted:
                    response = behind.ask(lambda session: (dict(session), request(session)))
                assert len([call for call in counted.calls if call != "load"]) == 1, counted.calls
                return response

            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                response = within(BOUND, ask)
                other.execute("ROLLBACK")
            assert response.status_code == 503 or what == "read", what
            assert visitor.run(dict) == {"hits": 0}, what


# Writes are applied once -----------------------------------------------------------------------


@pytest.mark.parametrize("always", [False, True], ids=["one lost reply", "all replies lost"])
def test_a_write_whose_reply_is_lost_is_applied_once(
    always: bool, server: RedisServer | MongoServer
) -> None:
    match = b"EVALSHA" if isinstance(server, RedisServer) else b"update\0"
    budget = BUDGET if always else PATIENCE
    with TCPProxy(server.port) as proxy, sites_on(server, proxy, budget) as (patient, site):
        for request in (count, count_in_transaction, count_with_the_response):
            visitor = visitor_of(patient)
            behind = site.visitor(visitor.cookie)
            # The server knows the script by now.
            until(lambda behind=behind: behind.ask(count).status_code == 200)  # type: ignore[misc]
            cuts = proxy.cuts
            while proxy.cuts == cuts:  # on a busy machine the write may not get that far
                before = visitor.run(lambda session: session["hits"])
                with proxy.lose_reply(match, None if always else 1):
                    response = behind.ask(request)
            assert response.status_code == (503 if always else 200)
            assert visitor.run(dict) == {"hits": before + 1}


@pytest.mark.parametrize(
    ("what", "on_mongodb"),
    [
        ("creation", "insert"),
        ("rotation", "insert"),
        ("rotation", "update"),
        ("login", "insert"),
        ("login", "update"),
        ("logout", "findAndModify"),
        ("clear", "delete"),
    ],
)
def test_a_lost_reply_is_made_up_for(
    what: str, on_mongodb: str, server: RedisServer | MongoServer
) -> None:
    requests: dict[str, Callable[[Any], object]] = {
        "creation": write,
        "rotation": lambda session: session.rotate(),
        "login": lambda session: session.rotate(grace=0),
        "logout": lambda session: session.destroy(),
        "clear": lambda session: session.clear(),
    }
    match = on_mongodb.encode() + b"\0"
    if isinstance(server, RedisServer):
        match = b"NX" if what == "creation" else b"EVALSHA"
    with TCPProxy(server.port) as proxy, sites_on(server, proxy, PATIENCE) as (patient, site):
        behind = site.visitor(None if what == "creation" else visitor_of(patient).cookie)
        for warm_up in requests.values():  # the server knows the scripts by now
            site.visitor(visitor_of(patient).cookie).run(warm_up)
        before = behind.cookie
        with proxy.lose_reply(match, times=1):
            assert behind.ask(requests[what]).status_code == 200
            assert proxy.cuts == 1
        if what in ("logout", "clear"):
            assert behind.cookie is None
        else:
            assert behind.cookie != before
            assert behind.run(dict) == ({"a": 1} if what == "creation" else {"hits": 0})
        if before is not None:
            left = {"hits": 0} if what == "rotation" else {}
            assert patient.visitor(before).run(dict) == left
