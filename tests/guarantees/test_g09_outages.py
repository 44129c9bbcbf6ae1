"""G9: an outage is an outage: 503 in time, nobody is logged out, and recovery by itself."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import resource
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Request, Response, flash, render_template_string, session
from pymongo import MongoClient
from redis import Redis
from redis.exceptions import ResponseError
from werkzeug.test import EnvironBuilder, TestResponse

from flask_gsession import Session
from flask_gsession.errors import GSessionError, StoreUnavailable, UnsupportedType
from flask_gsession.events import WriteDropped
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.sqlite import SQLiteStore
from flask_gsession.stores.sqlite import file as sqlite
from flask_gsession.testing import FakeClock, HookedStore, a_record
from tests.harness.apps import STUCK, Site, SiteMaker, Visitor, until, within
from tests.harness.servers import MongoServer, RedisServer, with_database

BUDGET = 0.3  # seconds for a store call
BOUND = 5 * BUDGET  # for a request with one such call, on a busy machine

READ = dict
WRITE: Callable[[Any], object] = lambda session: session.update(a=1)  # noqa: E731


def visitor_with(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(values))
    return visitor


def assert_unavailable(response: TestResponse, what: str = "") -> None:
    assert response.status_code == 503, what
    assert int(response.headers["Retry-After"]) >= 1, what
    assert "Set-Cookie" not in response.headers, what


def fail() -> None:
    raise StoreUnavailable("drill: the store is down")


# Each operation ------------------------------------------------------------------------------

FAILURES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "read": ("load", READ),
    "write": ("save", WRITE),
    "nested change": ("save", lambda session: session["items"].append(1)),
    "removal": ("save", lambda session: session.pop("a")),
    "clear": ("delete", lambda session: session.clear()),
    "rotation": ("replace", lambda session: session.rotate()),
    "logout": ("delete", lambda session: session.destroy()),
    "logout after a read": ("delete", lambda session: (dict(session), session.destroy())),
    "atomic update": ("save", lambda session: session.update_atomic("a", lambda a: a + 1)),
    "reload": ("load", lambda session: session.reload()),
    "flash": ("save", lambda session: flash("hello")),
    "lifetime": ("save", lambda session: session.set_lifetime(60)),
}


def test_a_failure_of_any_operation_is_503_and_logs_nobody_out(site: Site) -> None:
    for what, (operation, request) in FAILURES.items():
        visitor = visitor_with(site, a=0, items=[])
        cookie = visitor.cookie
        site.store.before(operation, fail)
        response = visitor.ask(request)
        assert_unavailable(response, what)
        assert "drill" not in response.text, what
        assert visitor.cookie == cookie, what
        assert visitor.run(dict) == {"a": 0, "items": []}, what
        if what not in ("read", "reload"):
            visitor.run(request)
            assert visitor.run(dict) != {"a": 0, "items": []} or what in ("rotation", "lifetime")
            if what == "rotation":
                assert visitor.cookie != cookie


def test_a_new_session_that_cannot_be_stored_is_503(site: Site) -> None:
    visitor = site.visitor()
    site.store.before("create", fail)
    assert_unavailable(visitor.ask(WRITE))
    assert visitor.cookie is None
    visitor.run(WRITE)
    assert visitor.run(dict) == {"a": 1}


def test_a_write_whose_answer_got_lost_is_503_too(site: Site) -> None:
    """It may have been applied: the client may try again, and nothing is torn."""
    for operation, request in (("save", WRITE), ("create", WRITE)):
        visitor = visitor_with(site, a=0) if operation == "save" else site.visitor()
        site.store.after(operation, fail)
        assert_unavailable(visitor.ask(request))
        visitor.run(request)
        assert visitor.run(dict) == {"a": 1}


def test_a_write_in_doubt_is_not_done_twice(make_site: SiteMaker) -> None:
    site = make_site(merge_policies={"hits": "counter"})
    visitor = visitor_with(site, hits=0)

    def view(session: Any) -> None:
        session["hits"] += 1
        with pytest.raises(StoreUnavailable):
            session.update_atomic("hits", lambda hits: hits)  # stores the pending change first

    site.store.after("save", fail)
    assert_unavailable(visitor.ask(view))
    assert visitor.run(dict) == {"hits": 1}


def test_a_renewal_that_fails_does_no_harm(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    site.clock.advance(300)
    site.store.before("renew", fail)
    assert visitor.run(dict) == {"a": 0}
    before = site.store.calls.count("renew")
    assert visitor.run(dict) == {"a": 0}
    assert site.store.calls.count("renew") == before + 1  # made up for by the next request


def test_an_outage_during_a_lost_race_is_503(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    tab = visitor.another_tab()
    site.before_a_write(
        lambda: (tab.run(lambda session: session.update(b=1)), site.store.before("load", fail))
    )
    assert_unavailable(visitor.ask(WRITE))
    assert visitor.run(dict) == {"a": 0, "b": 1}


def test_requests_that_leave_the_session_alone_are_served(site: Site) -> None:
    visitor = visitor_with(site, a=0)
    for operation in ("load", "create", "save", "renew", "replace", "delete"):
        site.store.before(operation, fail)
    assert visitor.get("/untouched").status_code == 200
    assert visitor.get("/nowhere").status_code == 404
    assert visitor.options("/untouched").status_code == 200
    assert site.visitor().run(dict) == {}  # without a cookie there is nothing to ask for


def test_a_request_asks_a_dead_store_once(site: Site) -> None:
    visitor = visitor_with(site, a=0)

    def view(session: Any) -> str:
        for look in (lambda: session["a"], lambda: dict(session), lambda: session.update(a=1)):
            with pytest.raises(StoreUnavailable):
                look()
        return "without the session"

    site.store.before("load", fail)
    with site.counted() as count:
        visitor.run(view)
    assert count.calls == ["load"]
    assert visitor.run(dict) == {"a": 0}


def test_a_view_may_wait_and_reload(site: Site) -> None:
    visitor = visitor_with(site, a=0)

    def view(session: Any) -> object:
        with pytest.raises(StoreUnavailable):
            session.get("a")
        session.reload()
        session["b"] = 1
        return session["a"]

    site.store.before("load", fail)
    assert visitor.run(view) == 0
    assert visitor.run(dict) == {"a": 0, "b": 1}


@pytest.mark.parametrize("where", ["url_value_preprocessor", "before_request", "template"])
def test_an_outage_is_503_wherever_the_session_is_touched(make_site: SiteMaker, where: str) -> None:
    site = make_site()
    armed: list[bool] = []

    def touch(*_: object) -> None:
        if armed:
            assert session.get("a") == 0

    if where != "template":
        getattr(site.app, where)(touch)
    visitor = visitor_with(site, a=0)
    page = lambda session: Response(  # noqa: E731
        render_template_string("{{ session.a }}") if where == "template" else "view"
    )
    armed.append(True)
    site.store.before("load", fail)
    assert_unavailable(visitor.ask(page))
    assert visitor.ask(page).status_code == 200


def test_an_outage_first_met_after_the_view_is_503_too(make_site: SiteMaker) -> None:
    """There, an error would break the answer: the session reads as empty, and the answer goes."""
    site = make_site()

    @site.app.after_request
    def count(response: Response) -> Response:
        session["hits"] = session.get("hits", 0) + 1
        return response

    visitor = visitor_with(site, a=0)
    site.store.before("load", fail)
    response = visitor.get("/untouched")
    assert_unavailable(response)
    assert "without the session" not in response.text
    assert visitor.get("/untouched").status_code == 200
    assert visitor.run(dict) == {"a": 0, "hits": 2}


# The application's own pages -----------------------------------------------------------------


@pytest.mark.parametrize("registered", [503, StoreUnavailable, GSessionError])
def test_the_page_of_the_app_answers(make_site: SiteMaker, registered: Any) -> None:
    site = make_site()

    @site.app.errorhandler(registered)
    def page(error: StoreUnavailable) -> Response:
        response = Response("back in a minute", 503, {"Retry-After": "60"})
        response.set_cookie("page", "ours")
        return response

    visitor = visitor_with(site, a=0)
    for operation, request in (("load", READ), ("save", WRITE), ("delete", READ)):
        site.store.before(operation, fail)
        response = visitor.ask(request if operation != "delete" else lambda s: s.destroy())
        assert (response.status_code, response.text) == (503, "back in a minute")
        assert response.headers["Retry-After"] == "60"
        assert [cookie.partition("=")[0] for cookie in response.headers.getlist("Set-Cookie")] == [
            "page"
        ]
    assert visitor.run(dict) == {"a": 0}


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.get("user"),
        lambda session: render_template_string("{{ session.user }}"),
        lambda session: session.update(seen=True),
        lambda session: flash("we are sorry"),
        lambda session: session.rotate(),
    ],
)
def test_a_page_that_needs_the_session_itself_is_503_all_the_same(
    make_site: SiteMaker, use: Any
) -> None:
    site = make_site()

    @site.app.errorhandler(503)
    def page(error: StoreUnavailable) -> tuple[str, int]:
        use(session)
        return "back in a minute", 503

    visitor = visitor_with(site, a=0)
    for operation, request in (("load", READ), ("save", WRITE)):
        for name in (operation, "delete", "replace", "create"):
            site.store.before(name, fail)
        response = visitor.ask(request)
        assert response.status_code == 503
        assert "Retry-After" in response.headers or response.text == "back in a minute"
        assert "Set-Cookie" not in response.headers
        site.store._hooks.clear()
        assert visitor.run(dict) == {"a": 0}


@pytest.mark.parametrize(
    ("registered", "path"),
    [(Exception, "/looks"), (Exception, "/missing"), (404, "/missing"), (500, "/broken")],
)
def test_a_page_for_all_errors_that_needs_the_session_is_503_too(
    make_site: SiteMaker, registered: Any, path: str
) -> None:
    """Flask has nobody left to ask when such a page fails: the server would answer."""
    site = make_site()
    site.app.add_url_rule("/looks", "looks", lambda: str(session.get("user")))
    site.app.add_url_rule("/broken", "broken", lambda: str(1 / 0))

    @site.app.errorhandler(registered)
    @site.app.errorhandler(500)
    def page(error: Exception) -> tuple[str, int]:
        return render_template_string("{{ session.user }} sorry"), getattr(error, "code", 500)

    visitor = visitor_with(site, a=0)
    site.store.before("load", fail)
    response = visitor.get(path)
    assert response.status_code == 503
    assert "Set-Cookie" not in response.headers
    assert visitor.run(dict) == {"a": 0}


def test_the_view_s_cookies_and_body_do_not_survive_a_failed_save(site: Site) -> None:
    closed: list[bool] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            yield b"done"

        def close(self) -> None:
            closed.append(True)

    def view(session: Any) -> Response:
        session["a"] = 1
        response = Response(Body(), headers={"Content-Type": "text/csv", "ETag": '"1"'})
        response.set_cookie("view", "1")
        return response

    visitor = visitor_with(site, a=0)
    site.store.before("save", fail)
    response = visitor.ask(view)
    assert_unavailable(response)
    assert response.content_type == "text/html; charset=utf-8"
    assert "ETag" not in response.headers
    assert "done" not in response.text
    assert closed


# Keeping the response ------------------------------------------------------------------------


def test_the_response_may_be_kept(make_site: SiteMaker, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site(on_store_error="keep-response")
    visitor = visitor_with(site, a=0)
    handle = visitor.run(lambda session: session.handle)

    def view(session: Any) -> Response:
        session["a"] = 1
        return Response("ordered")

    for operation, who in (("save", visitor), ("create", site.visitor())):
        caplog.clear()
        cookie = who.cookie
        site.store.before(operation, fail)
        response = who.ask(view)
        assert (response.status_code, response.text) == (200, "ordered")
        assert "Set-Cookie" not in response.headers
        assert who.cookie == cookie
        assert "drill" in caplog.text
    assert [event.handle for event in site.happened(WriteDropped)] == [handle, None]
    assert visitor.run(dict) == {"a": 0}


def test_a_read_and_a_logout_fail_even_where_the_response_may_be_kept(
    make_site: SiteMaker,
) -> None:
    """An outage makes nobody appear logged out, to the application or to the browser."""
    site = make_site(on_store_error="keep-response")
    visitor = visitor_with(site, a=0)
    for operation, request in (("load", READ), ("delete", lambda session: session.destroy())):
        site.store.before(operation, fail)
        assert_unavailable(visitor.ask(request))
    assert visitor.run(dict) == {"a": 0}


@pytest.mark.parametrize("policy", ["fail", "keep-response"])
def test_a_session_transaction_of_the_test_client_raises(make_site: SiteMaker, policy: str) -> None:
    """There is no response that could say it."""
    site = make_site(on_store_error=policy)
    visitor = visitor_with(site, a=0)
    site.store.before("save", fail)
    with pytest.raises(StoreUnavailable, match="drill"), visitor.session_transaction() as session:
        session["a"] = 1
    assert len(site.happened(WriteDropped)) == 1
    assert visitor.run(dict) == {"a": 0}


def test_a_session_that_is_opened_without_a_request_raises(site: Site) -> None:
    """As when another WSGI layer serves web sockets. Changes are stored as far as possible."""
    visitor = visitor_with(site, a=0)
    interface = site.app.session_interface
    environ = EnvironBuilder(headers={"Cookie": f"session={visitor.cookie}"}).get_environ()
    for value, error in ((1, StoreUnavailable), (object(), UnsupportedType)):
        opened = interface.open_session(site.app, Request(environ))
        assert opened is not None
        opened["a"] = value
        site.store.before("save", fail)
        with pytest.raises(error):
            interface.save_session(site.app, opened, Response())
    Session(site.app, store="memory://", cookie_name="further")
    opened = interface.open_session(site.app, Request(environ))
    assert opened is not None
    opened["a"] = 1
    site.store._hooks.clear()
    interface.save_session(site.app, opened, Response())
    assert visitor.run(dict) == {"a": 1}


# Real servers --------------------------------------------------------------------------------


@pytest.fixture(params=["redis", "mongodb"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("own_redis" if request.param == "redis" else "own_mongo")


@contextmanager
def site_on(server: RedisServer | MongoServer, **settings: Any) -> Iterator[Site]:
    url = server.url
    if isinstance(server, MongoServer):
        url = with_database(url, "outages")
    with SiteMaker(url, "outages:", FakeClock()) as make:
        yield make(timeout=BUDGET, **settings)


def ask_in_time(visitor: Visitor, request: Callable[[Any], object]) -> TestResponse:
    return within(BOUND, lambda: visitor.ask(request))


def served(visitor: Visitor, request: Callable[[Any], object]) -> Any:
    """The result of a request, which is repeated until it succeeds after a recovery.

    An earlier try may have been applied after all, so the request must do no harm when repeated.
    """
    end = time.monotonic() + STUCK
    while True:
        response, visit = visitor._ask(request, {})
        if response.status_code != 503 or time.monotonic() > end:
            assert response.status_code == 200
            return visit.result
        time.sleep(0.05)


def served_with(site: Site, **values: Any) -> Visitor:
    visitor = site.visitor()
    served(visitor, lambda session: session.update(values))
    return visitor


def assert_outage(site: Site, visitor: Visitor) -> None:
    cookie = visitor.cookie
    for request in (READ, WRITE, lambda session: session.destroy()):
        assert_unavailable(ask_in_time(visitor, request))
    assert_unavailable(ask_in_time(site.visitor(), WRITE))
    assert within(BUDGET, lambda: visitor.get("/untouched")).status_code == 200
    assert visitor.cookie == cookie


def test_a_frozen_server(server: RedisServer | MongoServer) -> None:
    with site_on(server) as site:
        visitor = served_with(site, a=0)
        with server.paused():
            assert_outage(site, visitor)
        # A frozen server may execute the commands that it got when it wakes up.
        assert served(visitor, dict) in ({"a": 0}, {"a": 1}, {})
        until(lambda: (served(visitor, WRITE), served(visitor, dict)) == (None, {"a": 1}))


def test_a_process_that_ends_does_not_wait_for_a_frozen_server(own_mongo: MongoServer) -> None:
    url = f"{with_database(own_mongo.url, 'outages')}&heartbeatFrequencyMS=30000"
    store, _ = open_store(url, StoreOptions(timeout=BUDGET))

    def answers() -> bool:
        with suppress(StoreUnavailable):
            return store.load("a" * 43) is None
        return False

    until(answers)
    with own_mongo.paused():
        within(STUCK, store.close)


def test_a_server_that_freezes_between_load_and_save(server: RedisServer | MongoServer) -> None:
    with site_on(server) as site:
        visitor = served_with(site, a=0)
        site.store.before("save", server.pause)
        try:
            assert_unavailable(ask_in_time(visitor, WRITE))
        finally:
            server.resume()
        assert served(visitor, dict)["a"] in (0, 1)


def test_a_frozen_server_behind_a_client_of_the_application(
    server: RedisServer | MongoServer,
) -> None:
    """Its own settings would have it wait for ages."""
    client: Any = (
        Redis.from_url(server.url) if isinstance(server, RedisServer) else MongoClient(server.url)
    )
    options = StoreOptions(prefix="outages:", timeout=BUDGET)
    with client, site_on(server, store=HookedStore(open_store(client, options)[0])) as site:
        visitor = served_with(site, a=0)
        with server.paused():
            assert_unavailable(ask_in_time(visitor, READ))
        assert served(visitor, dict) == {"a": 0}


def test_a_killed_server(server: RedisServer | MongoServer) -> None:
    """Also for an application that starts while the server is away."""
    with site_on(server) as site, site_on(server) as late:
        visitor = served_with(site, a=0)
        server.kill()
        try:
            assert_outage(site, visitor)
            assert_unavailable(ask_in_time(late.visitor(), WRITE))
        finally:
            server.start()
        # This Redis keeps nothing on disk; the other stores still have their data.
        assert served(visitor, dict) == ({"a": 0} if isinstance(server, MongoServer) else {})
        served(visitor, WRITE)
        assert served(visitor, dict) == {"a": 1}
        late_visitor = late.visitor(visitor.cookie)
        assert served(late_visitor, dict) == {"a": 1}


@pytest.fixture
def redis_admin(own_redis: RedisServer) -> Iterator[Any]:
    with Redis.from_url(own_redis.url, socket_timeout=10) as client:
        yield client


def test_a_redis_that_became_a_replica(own_redis: RedisServer, redis_admin: Any) -> None:
    with site_on(own_redis) as site:
        visitor = served_with(site, a=0)
        redis_admin.replicaof("127.0.0.1", 1)  # of nobody: reads go on, writes are refused
        try:
            assert served(visitor, dict) == {"a": 0}
            assert_unavailable(ask_in_time(visitor, WRITE))
            assert_unavailable(ask_in_time(visitor, lambda session: session.rotate()))
            assert_unavailable(ask_in_time(visitor, lambda session: session.destroy()))
            assert_unavailable(ask_in_time(site.visitor(), WRITE))
        finally:
            redis_admin.replicaof("NO", "ONE")
        served(visitor, WRITE)
        assert served(visitor, dict) == {"a": 1}


def test_a_redis_without_enough_replicas(own_redis: RedisServer, redis_admin: Any) -> None:
    with site_on(own_redis) as site:
        visitor = served_with(site, a=0)
        redis_admin.config_set("min-replicas-to-write", 1)
        try:
            assert served(visitor, dict) == {"a": 0}
            if int(redis_admin.info("server")["redis_version"].partition(".")[0]) >= 7:
                assert_unavailable(ask_in_time(visitor, WRITE))  # before, scripts went unasked
            assert_unavailable(ask_in_time(site.visitor(), WRITE))
        finally:
            redis_admin.config_set("min-replicas-to-write", 0)
        served(visitor, WRITE)


def test_a_full_redis(own_redis: RedisServer, redis_admin: Any) -> None:
    with site_on(own_redis) as site:
        visitor = served_with(site, a=0)
        redis_admin.config_set("maxmemory-policy", "noeviction")
        redis_admin.config_set("maxmemory", "100kb")
        try:
            assert served(visitor, dict) == {"a": 0}
            assert_unavailable(ask_in_time(visitor, WRITE))
            assert_unavailable(ask_in_time(site.visitor(), WRITE))
            assert served(visitor, dict) == {"a": 0}
            assert visitor.ask(lambda session: session.destroy()).status_code == 200
        finally:
            redis_admin.config_set("maxmemory", 0)
        served(visitor, WRITE)


def test_a_large_value_in_a_full_redis(own_redis: RedisServer, redis_admin: Any) -> None:
    with site_on(own_redis) as site:
        visitor = served_with(site, a=0, photo=b"old" * 10_000)
        redis_admin.config_set("maxmemory-policy", "noeviction")
        redis_admin.config_set("maxmemory", "100kb")
        try:
            assert_unavailable(
                ask_in_time(visitor, lambda s: s.attach("photo", io.BytesIO(b"new" * 200_000)))
            )
            assert_unavailable(ask_in_time(visitor, lambda s: s.update(photo=b"new" * 200_000)))
            assert served(visitor, dict) == {"a": 0, "photo": b"old" * 10_000}
        finally:
            redis_admin.config_set("maxmemory", 0)
        served(visitor, WRITE)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 200 KB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_large_value_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with sqlite_site(path) as site:
        visitor = served_with(site, a=0, photo=b"old" * 10_000)
        with full_disk():
            assert_unavailable(
                ask_in_time(visitor, lambda s: s.attach("photo", io.BytesIO(b"new" * 200_000)))
            )
            assert_unavailable(ask_in_time(visitor, lambda s: s.update(photo=b"new" * 200_000)))
        assert served(visitor, dict) == {"a": 0, "photo": b"old" * 10_000}
        served(visitor, WRITE)


def test_a_large_value_in_a_full_mongodb() -> None:
    with (
        MongoServer("--setParameter", "enableTestCommands=1") as server,
        site_on(server) as site,
        closing(MongoClient[dict[str, Any]](server.url)) as client,
    ):
        visitor = served_with(site, a=0, photo=b"old" * 10_000)
        fault: dict[str, Any] = {"configureFailPoint": "failCommand"}
        data = {"failCommands": ["update"], "errorCode": 14031}  # OutOfDiskSpace
        client.admin.command({**fault, "mode": "alwaysOn", "data": data})
        assert_unavailable(
            ask_in_time(visitor, lambda s: s.attach("photo", io.BytesIO(b"new" * 200_000)))
        )
        assert_unavailable(ask_in_time(visitor, lambda s: s.update(photo=b"new" * 200_000)))
        client.admin.command({**fault, "mode": "off"})
        assert served(visitor, dict) == {"a": 0, "photo": b"old" * 10_000}
        served(visitor, WRITE)


def test_a_redis_busy_with_a_script(own_redis: RedisServer, redis_admin: Any) -> None:
    with site_on(own_redis) as site:
        visitor = served_with(site, a=0)
        redis_admin.config_set("lua-time-limit", 50)
        endless = threading.Thread(
            target=suppress_errors, args=(lambda: redis_admin.eval("while true do end", 0),)
        )
        endless.start()
        with Redis.from_url(own_redis.url, socket_timeout=10) as other:
            try:
                until(lambda: is_busy(other))
                assert_unavailable(ask_in_time(visitor, READ))
            finally:
                until(lambda: is_busy(other) and other.script_kill())
                endless.join()
        assert served(visitor, dict) == {"a": 0}


def is_busy(client: Any) -> bool:
    try:
        client.ping()
    except ResponseError as error:
        return "busy running a script" in str(error)
    return False


def suppress_errors(function: Callable[[], object]) -> None:
    with suppress(Exception):
        function()


def test_a_redis_that_forgot_its_scripts(own_redis: RedisServer, redis_admin: Any) -> None:
    """As after a restart or a failover."""
    with site_on(own_redis) as site:
        visitor = served_with(site, a=0)
        served(visitor, WRITE)
        redis_admin.script_flush()
        served(visitor, lambda session: session.update(a=2))
        assert served(visitor, dict) == {"a": 2}


def test_a_redis_that_answers_byte_by_byte(own_redis: RedisServer) -> None:
    """The budget is for the whole call, not for each byte."""
    with site_on(own_redis) as site, slow_proxy(own_redis.port) as (port, slow):
        visitor = served_with(site, a=0)
        url = f"redis://127.0.0.1:{port}/0"
        with SiteMaker(url, "outages:", site.clock) as make:
            behind = make(timeout=BUDGET)
            same = behind.visitor(visitor.cookie)
            assert served(same, dict) == {"a": 0}
            slow.set()
            assert_unavailable(ask_in_time(same, READ))
            assert_unavailable(ask_in_time(same, WRITE))
            slow.clear()
            assert served(same, dict) == {"a": 0}


@contextmanager
def slow_proxy(port: int) -> Iterator[tuple[int, threading.Event]]:
    """A port that passes on to `port`; while the event is set, answers come by the byte."""
    slow, ended = threading.Event(), threading.Event()
    sockets: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                for byte in data if answers and slow.is_set() else ():
                    target.sendall(bytes((byte,)))
                    ended.wait(0.1)
                if not (answers and slow.is_set()):
                    target.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", port))
                sockets.extend((client, server))
                for arguments in ((client, server, False), (server, client, True)):
                    threading.Thread(target=pump, args=arguments, daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    sockets.append(listener)
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], slow
    finally:
        ended.set()
        for each in list(sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        thread.join()


def test_a_wrong_password_is_an_outage_and_is_never_shown(
    own_redis: RedisServer,
    own_mongo: MongoServer,
    redis_admin: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "hunter2-canary"
    mongo = with_database(own_mongo.url, "admin").replace("//", f"//user:{secret}@")
    redis_admin.config_set("requirepass", "another one")
    try:
        for url in (own_redis.url.replace("//", f"//:{secret}@"), mongo):
            with SiteMaker(url, "outages:", FakeClock()) as make:
                site = make()
                errors: list[Any] = []
                site.app.register_error_handler(
                    StoreUnavailable, lambda error, errors=errors: (errors.append(error), error)[1]
                )
                response = site.visitor().ask(WRITE)
                assert_unavailable(response)
                assert errors
                if url.startswith("redis"):
                    assert "is the user or the password in SESSION_STORE" in str(errors[0])
                shown = [response.text, str(errors), repr(errors[0].__dict__), str(errors[0])]
                cause = errors[0].__cause__
                shown += [caplog.text, repr(site.events), repr(cause), str(cause)]
                assert not any(secret in text for text in shown)
    finally:
        redis_admin.config_set("requirepass", "")


# SQLite --------------------------------------------------------------------------------------


@contextmanager
def sqlite_site(path: Path, timeout: float = BUDGET) -> Iterator[Site]:
    with SiteMaker(f"sqlite:///{path}", "", FakeClock()) as make:
        yield make(timeout=timeout)


def test_a_locked_database(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with sqlite_site(path) as site:
        visitor = visitor_with(site, a=0)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert visitor.run(dict) == {"a": 0}  # readers do not wait for a writer
            assert_unavailable(ask_in_time(visitor, WRITE))
            assert_unavailable(ask_in_time(visitor, lambda session: session.destroy()))
            assert_unavailable(ask_in_time(site.visitor(), WRITE))
            other.execute("ROLLBACK")
        visitor.run(WRITE)
        assert visitor.run(dict) == {"a": 1}


def test_a_short_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with sqlite_site(path, timeout=10) as site:
        visitor = visitor_with(site, a=0)
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.1, lambda: other.execute("ROLLBACK"))
        timer.start()
        visitor.run(WRITE)
        timer.join()
        other.close()
        assert visitor.run(dict) == {"a": 1}


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.write_text("in the way")
    with sqlite_site(folder / "sessions.sqlite3") as site:
        assert_unavailable(ask_in_time(site.visitor(), WRITE))
        folder.unlink()
        visitor = visitor_with(site, a=0)
        assert visitor.run(dict) == {"a": 0}


def test_a_database_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that turned read-only; tests may run as root, which may still write."""

    class ReadOnly(sqlite._Connection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.execute("PRAGMA query_only=ON")

    path = tmp_path / "sessions.sqlite3"
    with sqlite_site(path, timeout=10) as site, sqlite_site(path, timeout=10) as later:
        visitor = visitor_with(site, a=0)
        with monkeypatch.context() as patch:
            patch.setattr(sqlite, "_Connection", ReadOnly)
            there = later.visitor(visitor.cookie)
            assert there.run(dict) == {"a": 0}
            for change in (
                WRITE,
                lambda session: session.rotate(),
                lambda session: session.destroy(),
            ):
                assert_unavailable(there.ask(change))
            assert_unavailable(later.visitor().ask(WRITE))
        later.store.close()
        there.run(WRITE)
        assert visitor.run(dict) == {"a": 1}


@contextmanager
def in_use(store: SQLiteStore) -> Iterator[None]:
    """One of its connections is, as in the middle of a call."""
    pool = store.file._pool
    db = pool.pop() if pool else store.file._open()
    try:
        yield
    finally:
        store.file._give_back(db, pool)


def test_connections_that_were_opened_for_reading_only(tmp_path: Path, clock: FakeClock) -> None:
    """All that were opened while it could not be written go with the first that shows it."""
    store = SQLiteStore(tmp_path / "sessions.sqlite3", StoreOptions(clock=clock))
    record = a_record(clock)
    store.create(record)

    class ReadOnly(sqlite._Connection):
        def __init__(self, file: Any, place: str, **options: Any) -> None:
            super().__init__(file, place.replace("mode=rw", "mode=ro"), **options)

    with in_use(store), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite, "_Connection", ReadOnly)
        with in_use(store), in_use(store), in_use(store):
            pass
    store.file._pool.pop().close()  # it may write
    assert len(store.file._pool) == 3
    assert store.load(record.key) == record
    with pytest.raises(StoreUnavailable, match="readonly"):
        store.delete(record.key)
    assert store.delete(record.key)
    store.close()


def test_an_interrupt_as_a_transaction_begins(tmp_path: Path, clock: FakeClock) -> None:
    """A worker that is to shut down does so, and this doesn't appear as an outage."""
    path = tmp_path / "sessions.sqlite3"
    store, other = (SQLiteStore(path, StoreOptions(clock=clock)) for _ in range(2))
    record = a_record(clock)
    other.create(record)

    class Struck(sqlite._Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            done = super().execute(sql, *arguments)
            if sql == "BEGIN IMMEDIATE":
                raise SystemExit  # as the handler of a signal
            return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite, "_Connection", Struck)
        with pytest.raises(SystemExit):
            store.delete(record.key)
    assert other.delete(record.key)
    other.close()


def keep_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """As within a request; outside, a connection is closed after use."""
    monkeypatch.setattr(sqlite, "is_at_work", lambda: True)


def test_a_link_to_a_file_that_is_not_there(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is created at the link's target, without leftovers of a deleted one."""
    keep_connections(monkeypatch)
    monkeypatch.setattr(sqlite, "_LOOK_AGAIN", 0.0)
    link, path = tmp_path / "sessions.sqlite3", tmp_path / "volume" / "file"
    link.symlink_to(path)
    store = SQLiteStore(link, StoreOptions(clock=clock))
    before, after = a_record(clock), a_record(clock)
    store.create(before)
    with open(f"{path}-shm", "rb") as shared:
        path.unlink()
        store.create(after)
        assert not os.path.samestat(os.fstat(shared.fileno()), os.stat(f"{path}-shm"))
    assert (store.load(before.key), store.load(after.key)) == (None, after)
    store.close()


def test_a_folder_that_another_process_locks(tmp_path: Path, clock: FakeClock) -> None:
    options = StoreOptions(clock=clock, timeout=0.05)
    store = SQLiteStore(tmp_path / "sessions.sqlite3", options)
    record = a_record(clock)
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        release = threading.Timer(STUCK, fcntl.flock, [lock, fcntl.LOCK_UN])
        release.start()  # should it wait for that
        try:
            with pytest.raises(StoreUnavailable, match="has locked its folder"):
                store.create(record)
        finally:
            release.cancel()
            release.join()
    finally:
        os.close(lock)
    store.create(record)
    assert store.load(record.key) == record
    store.close()


@pytest.mark.parametrize("left", [(), ("-wal", "-shm")], ids=["nothing", "wal and shm"])
def test_a_file_that_was_deleted(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]
) -> None:
    """Processes that had it open leave it, and don't share the files that stay beside it."""
    keep_connections(monkeypatch)
    monkeypatch.setattr(sqlite, "_LOOK_AGAIN", 0.0)
    path = tmp_path / "sessions.sqlite3"
    store, other = (SQLiteStore(path, StoreOptions(clock=clock)) for _ in range(2))
    before, after = a_record(clock), a_record(clock)
    store.create(before)
    assert other.load(before.key) == before
    (idle,) = other.file._pool
    with open(f"{path}-shm", "rb") as shared, in_use(store):  # one is in use during that
        for end in {"", "-wal", "-shm"} - {*left}:
            Path(f"{path}{end}").unlink()
        assert store.load(before.key) is None
        store.create(after)
        assert not os.path.samestat(os.fstat(shared.fileno()), os.stat(f"{path}-shm"))
    for each in (store, other):
        assert (each.load(before.key), each.load(after.key)) == (None, after)
        with in_use(each), in_use(each):
            assert (each.load(before.key), each.load(after.key)) == (None, after)
        assert each.checks.check()[0].severity == "ok"
        each.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        idle.execute("SELECT 1")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_was_deleted_as_it_was_opened(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first connection of a process does not stay with it either."""
    path = tmp_path / "sessions.sqlite3"
    store, other = (SQLiteStore(path, StoreOptions(clock=clock)) for _ in range(2))
    record = a_record(clock)
    prepare = store.file._prepare

    def prepare_meanwhile(db: sqlite3.Connection) -> None:
        prepare(db)
        monkeypatch.undo()
        for end in ("", "-wal", "-shm"):
            Path(f"{path}{end}").unlink()
        other.create(record)

    monkeypatch.setattr(store.file, "_prepare", prepare_meanwhile)
    store.load(record.key)
    assert store.load(record.key) == record
    store.close()
    other.close()


def test_a_file_system_on_which_folders_cannot_be_locked(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EBADF, "as NFS does")

    monkeypatch.setattr("fcntl.flock", refuse)
    store = SQLiteStore(tmp_path / "new" / "sessions.sqlite3", StoreOptions(clock=clock))
    record = a_record(clock)
    store.create(record)
    assert store.load(record.key) == record
    store.close()


def test_the_log_of_a_large_removal_does_not_keep_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_connections(monkeypatch)
    monkeypatch.setattr(sqlite, "_LOG_BYTES", 2**20)
    path, log = tmp_path / "sessions.sqlite3", tmp_path / "sessions.sqlite3-wal"
    with closing(SQLiteStore(path)) as store:
        end = int(time.time() * 1000) + 60_000
        for number in range(8):
            store.blobs.write_frame("large", number * 2**20, bytes(2**20), end)
        store.blobs.discard_blobs(["large"], 0)
        assert log.stat().st_size > 6 * 2**20
        store.blobs.write_frame("small", 0, b"1", end)
        assert log.stat().st_size <= 2 * 2**20


def test_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    path.write_bytes(b"this is a text file, and not a short one" * 100)
    with sqlite_site(path) as site:
        assert_unavailable(ask_in_time(site.visitor(), WRITE))
        path.unlink()
        assert visitor_with(site, a=0).run(dict) == {"a": 0}
