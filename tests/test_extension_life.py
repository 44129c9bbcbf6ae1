"""An extension's life from `init_app` to the last reference: it leaks nothing, mixes up nothing."""

from __future__ import annotations

import gc
import os
import re
import secrets
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask, Response, request
from pymongo import MongoClient
from redis import Redis

from flask_gsession import Session, session
from flask_gsession.events import SessionCreated, logger
from flask_gsession.stores import StoreOptions, open_store
from tests.harness.apps import PATIENCE, until

DEADLINE = 60  # seconds

on_linux = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="needs /proc to see open files"
)


def with_views(app: Flask) -> Flask:
    """An application's views: log in, count, look."""
    app.secret_key = app.secret_key or "extension life"

    @app.post("/login/<user>")
    def login(user: str) -> dict[str, Any]:
        session["user"] = user
        return {}

    @app.post("/count")
    def count() -> dict[str, Any]:
        return {"count": session.update_atomic("count", lambda count: count + 1, 0)}

    @app.get("/all")
    def everything() -> dict[str, Any]:
        return session.copy()

    return app


def make_app(ext: Session, **config: Any) -> Flask:
    """An application with these settings, served by `ext`."""
    app = with_views(Flask(__name__))
    app.config.update(config)
    ext.init_app(app)
    return app


def log_in(app: Flask, user: str) -> str:
    """The cookie of a new session."""
    client = app.test_client()
    assert client.post(f"/login/{user}").status_code == 200
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def look(app: Flask, cookie: str) -> dict[str, Any]:
    """The session that an application finds for a cookie."""
    client = app.test_client()
    client.set_cookie("session", cookie)
    response = client.get("/all")
    assert response.status_code == 200
    found: dict[str, Any] = response.json
    return found


# Garbage ------------------------------------------------------------------------------------------


def dropped(*things: Any) -> Callable[[], list[Any]]:
    """Watch things without holding them; call the result to see which are still there."""
    watched = [weakref.ref(thing) for thing in things]

    def left() -> list[Any]:
        gc.collect()
        return [ref() for ref in watched if ref() is not None]

    return left


def test_nothing_keeps_an_application(store_url: str, store_prefix: str) -> None:
    """Not the extension either, which a module holds for ever."""
    ext = Session()
    app = make_app(ext, SESSION_STORE=store_url, SESSION_KEY_PREFIX=store_prefix)
    cookie = log_in(app, "alice")
    assert look(app, cookie) == {"user": "alice"}
    ext.close(app)
    left = dropped(app, ext.store(app))
    del app
    until(lambda: not left())


def test_an_application_that_was_never_closed(store_url: str, store_prefix: str) -> None:
    """Tests make applications by the hundred, and forget them."""
    ext = Session()
    app = make_app(ext, SESSION_STORE=store_url, SESSION_KEY_PREFIX=store_prefix)
    log_in(app, "alice")
    left = dropped(app, ext.store(app))
    del app
    until(lambda: not left())


def test_a_failed_request_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error holds its frames; they must not live on in the extension."""
    monkeypatch.setattr(logger, "disabled", True)  # pytest keeps log records, with the error
    ext = Session()
    app = make_app(ext, SESSION_STORE=f"sqlite:///{tmp_path}", PROPAGATE_EXCEPTIONS=False)
    assert app.test_client().post("/login/alice").status_code == 503
    left = dropped(app)
    del app
    until(lambda: not left())


def test_a_dropped_extension_serves_on() -> None:
    """`Session(app)` is often the only mention of it."""
    app = with_views(Flask(__name__))
    Session(app, store="memory://")
    gc.collect()
    assert look(app, log_in(app, "alice")) == {"user": "alice"}
    left = dropped(app)
    del app
    assert left() == []


def test_no_request_is_kept() -> None:
    """Not its session, and not the values in it."""

    class Witness(dict[str, Any]):
        pass

    ext = Session()
    app = make_app(ext, SESSION_STORE="memory://")
    kept: list[Callable[[], list[Any]]] = []

    @app.get("/witness")
    def witness() -> str:
        session["list"] = values = Witness(a=1)
        kept.append(dropped(values, session._get_current_object()))  # type: ignore[attr-defined]
        del session["list"]
        session["list"] = {"a": 1}
        return ""

    assert app.test_client().get("/witness").status_code == 200
    assert kept[0]() == []


# Connections --------------------------------------------------------------------------------------


class Connections:
    """A store's URL, and the connections that were opened through it."""

    def __init__(self, url: str, names: Callable[[], set[str]]) -> None:
        self.url = url
        self.names = names

    def count(self) -> int:
        """How many there are."""
        return len(self.names())


@contextmanager
def redis_connections(url: str) -> Iterator[Connections]:
    name = f"life-{secrets.token_hex(4)}"
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, f"client_name={name}"]))
    with Redis.from_url(url, socket_timeout=PATIENCE) as watcher:

        def names() -> set[str]:
            return {each["id"] for each in watcher.client_list() if each["name"] == name}

        yield Connections(parts._replace(query=query).geturl(), names)


@contextmanager
def mongodb_connections(url: str) -> Iterator[Connections]:
    name = f"life-{secrets.token_hex(4)}"
    with MongoClient(url, timeoutMS=PATIENCE * 1000) as watcher:

        def names() -> set[str]:
            pipeline = [
                {"$currentOp": {"allUsers": True, "idleConnections": True}},
                {"$match": {"appName": name}},
            ]
            return {str(each["connectionId"]) for each in watcher.admin.aggregate(pipeline)}

        yield Connections(f"{url}&appName={name}", names)


@contextmanager
def sqlite_connections(url: str) -> Iterator[Connections]:
    path = url.removeprefix("sqlite:///")

    def names() -> set[str]:
        descriptors = set()
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one that lists the directory
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith(path):
                    descriptors.add(descriptor)
        return descriptors

    yield Connections(url, names)


WATCHES = {
    "sqlite": sqlite_connections,
    "redis": redis_connections,
    "mongodb": mongodb_connections,
}


@pytest.fixture(params=[pytest.param("sqlite", marks=on_linux), "redis", "mongodb"])
def connections(request: pytest.FixtureRequest) -> Iterator[Connections]:
    """A store of each kind that has connections."""
    url = request.getfixturevalue(f"{request.param}_url")
    with WATCHES[request.param](url) as watched:
        yield watched


def drivers_of(store: object) -> Counter[str]:
    """The clients, pools and connections that a store refers to."""
    found: dict[int, object] = {}
    waiting = [store]
    while waiting:
        each = waiting.pop()
        kind = type(each)  # isinstance would ask a weak proxy for its object
        if id(each) not in found and not issubclass(kind, type | ModuleType | FunctionType):
            found[id(each)] = each
            waiting.extend(gc.get_referents(each))
    names = (type(each).__name__ for each in found.values())
    return Counter(
        name for name in names if re.search(r"(Client|Pool|Connection|Collection)$", name)
    )


def test_nothing_connects_before_it_must(connections: Connections, store_prefix: str) -> None:
    ext = Session()
    app = make_app(ext, SESSION_STORE=connections.url, SESSION_KEY_PREFIX=store_prefix)
    assert app.test_client().get("/no-such-page").status_code == 404
    assert connections.count() == 0
    ext.close(app)


def test_close_releases_the_connections(connections: Connections, store_prefix: str) -> None:
    ext = Session()
    app = make_app(ext, SESSION_STORE=connections.url, SESSION_KEY_PREFIX=store_prefix)
    with ThreadPoolExecutor(5) as pool:
        cookies = list(pool.map(lambda user: log_in(app, user), "abcde"))
    assert connections.count() > 0
    ext.close(app)
    until(lambda: connections.count() == 0)
    ext.close(app)  # twice does no harm

    # A later call works: a server that is shutting down may still serve a late request.
    kept = []
    for _ in range(3):
        assert look(app, cookies[0]) == {"user": "a"}
        with app.app_context():
            ext.close()  # the current application's
        until(lambda: connections.count() == 0)
        kept.append(drivers_of(app.extensions["gsession"][ext].store))
    assert kept[1:] == kept[:-1]


def test_a_dropped_application_releases_its_connections(
    connections: Connections, store_prefix: str
) -> None:
    ext = Session()
    app = make_app(ext, SESSION_STORE=connections.url, SESSION_KEY_PREFIX=store_prefix)
    log_in(app, "alice")
    assert connections.count() > 0
    del app
    gc.collect()
    until(lambda: connections.count() == 0)


def test_close_leaves_a_store_object_alone(connections: Connections, store_prefix: str) -> None:
    """The application may use it elsewhere."""
    store, _ = open_store(connections.url, StoreOptions(prefix=store_prefix, timeout=PATIENCE))
    ext = Session()
    app = make_app(ext, SESSION_STORE=store)
    cookie = log_in(app, "alice")
    before = connections.names()
    assert before
    ext.close(app)
    assert look(app, cookie) == {"user": "alice"}
    assert before <= connections.names()
    store.close()


@pytest.mark.parametrize("driver", ["redis", "mongodb"])
def test_close_leaves_a_client_alone(
    driver: str, request: pytest.FixtureRequest, store_prefix: str
) -> None:
    url = request.getfixturevalue(f"{driver}_url")
    client: Any = Redis.from_url(url) if driver == "redis" else MongoClient(url)
    with client:
        ext = Session()
        app = make_app(ext, SESSION_STORE=client, SESSION_KEY_PREFIX=store_prefix)
        log_in(app, "alice")
        ext.close(app)
        # A closed MongoClient would refuse, a closed Redis client would have to reconnect.
        if driver == "redis":
            connected = [c for c in client.connection_pool._available_connections if c._sock]
            assert connected
        else:
            client.admin.command("ping")
        left = dropped(app)
        del app
        until(lambda: not left())
        assert client.ping() if driver == "redis" else client.admin.command("ping")


# The memory store ---------------------------------------------------------------------------------


def test_the_memory_store_lives_and_dies_with_its_application() -> None:
    ext = Session(store="memory://")
    first, second = make_app(ext), make_app(ext)
    cookie = log_in(first, "alice")
    assert look(first, cookie) == {"user": "alice"}
    # The same extension, settings and secret key; yet nothing is shared.
    assert look(second, cookie) == {}
    ext.close(first)
    assert look(first, cookie) == {"user": "alice"}, "there is nothing to release"
    store = ext.store(first)
    left = dropped(store)
    del first, store
    assert left() == []
    third = make_app(ext)
    assert look(third, cookie) == {}


def test_one_memory_store_for_two_applications() -> None:
    """As an object, it is shared on purpose."""
    store, _ = open_store("memory://", StoreOptions())
    ext = Session(store=store)
    first, second = make_app(ext), make_app(ext)
    cookie = log_in(first, "alice")
    assert look(second, cookie) == {"user": "alice"}


# Several applications, one extension --------------------------------------------------------------


def test_each_application_has_its_own_settings(tmp_path: Path) -> None:
    ext = Session(idle_timeout=600)
    shop = make_app(ext, SESSION_STORE=f"sqlite:///{tmp_path}/shop", SESSION_COOKIE_NAME="shop")
    office = make_app(ext, SESSION_STORE="memory://", SESSION_TOKEN_HEADER="X-Session")
    assert shop.test_client().post("/login/a").headers["Set-Cookie"].startswith("shop=")
    assert office.test_client().post("/login/a").headers["Set-Cookie"].startswith("session=")
    assert ext.store(shop) is not ext.store(office)
    with shop.app_context():
        assert ext.store() is ext.store(shop)
    ext.close(shop)
    ext.close(office)


def test_a_token_of_one_application_means_nothing_in_another(
    store_url: str, store_prefix: str
) -> None:
    """Whether it has another secret key, or another store."""
    ext = Session()
    config = {"SESSION_STORE": store_url, "SESSION_KEY_PREFIX": f"{store_prefix}a:"}
    shop = make_app(ext, **config)
    other_secret = make_app(ext, **config)
    other_secret.secret_key = "another"
    other_prefix = make_app(ext, **{**config, "SESSION_KEY_PREFIX": f"{store_prefix}b:"})
    cookie = log_in(shop, "alice")
    assert look(shop, cookie) == {"user": "alice"}
    assert look(other_secret, cookie) == {}
    assert look(other_prefix, cookie) == {}
    for app in (shop, other_secret, other_prefix):
        ext.close(app)


def test_workers_of_one_application_share_its_sessions(
    connections: Connections, store_prefix: str
) -> None:
    """The same factory called twice, as two processes would."""
    ext = Session()
    config = {"SESSION_STORE": connections.url, "SESSION_KEY_PREFIX": store_prefix}
    first, second = make_app(ext, **config), make_app(ext, **config)
    cookie = log_in(first, "alice")
    assert look(second, cookie) == {"user": "alice"}
    ext.close(first)
    assert look(second, cookie) == {"user": "alice"}
    assert look(first, cookie) == {"user": "alice"}
    ext.close(first)
    ext.close(second)


def test_receivers_get_the_events_of_every_application() -> None:
    created: list[SessionCreated] = []
    ext = Session(store="memory://")
    ext.on(SessionCreated, created.append)
    for app in (make_app(ext), make_app(ext)):
        log_in(app, "alice")
    assert len(created) == 2
    assert created[0].handle != created[1].handle


def test_a_request_within_a_request_of_another_application() -> None:
    """As applications do that call each other in one process."""
    ext = Session(store="memory://")
    inner, outer = make_app(ext), make_app(ext)
    cookie = log_in(inner, "inner")

    @outer.get("/both")
    def both() -> dict[str, Any]:
        session["user"] = "outer"
        seen = look(inner, cookie)
        return {"inner": seen["user"], "outer": session["user"]}

    client = outer.test_client()
    assert client.get("/both").json == {"inner": "inner", "outer": "outer"}
    assert client.get("/all").json == {"user": "outer"}
    assert look(inner, cookie) == {"user": "inner"}


def test_a_request_that_hands_its_environment_on() -> None:
    """Applications of two sessions each, in the same cookies."""
    inner, outer = make_app(Session(store="memory://")), make_app(Session(store="memory://"))
    first, second = (
        Session(app, store="memory://", cookie_name="second") for app in (inner, outer)
    )

    @inner.get("/both")
    def write() -> str:
        first.session["user"] = "inner"
        return ""

    @outer.get("/both")
    def both() -> Response:
        second.session["step"] = 1
        answer = Response.from_app(inner, request.environ)
        second.session["step"] += 1
        return answer

    @outer.get("/second")
    def look_at_second() -> dict[str, Any]:
        return dict(second.session)

    client = outer.test_client()
    assert client.get("/both").status_code == 200
    assert client.get("/second").json == {"step": 2}


def test_requests_in_parallel_in_several_applications(store_url: str, store_prefix: str) -> None:
    """One extension, three applications, each with its own session, each counted exactly."""
    ext = Session(store_timeout=PATIENCE)
    config = {"SESSION_STORE": store_url}
    apps = [
        make_app(ext, **config, SESSION_KEY_PREFIX=f"{store_prefix}{number}:")
        for number in range(3)
    ]
    cookies = [log_in(app, f"user{number}") for number, app in enumerate(apps)]
    start = threading.Barrier(6)

    def work(thread: int) -> None:
        start.wait(DEADLINE)
        for number in range(30):
            which = (thread + number) % 3
            client = apps[which].test_client()
            client.set_cookie("session", cookies[which])
            assert client.post("/count").status_code == 200

    with ThreadPoolExecutor(6) as pool:
        for running in [pool.submit(work, thread) for thread in range(6)]:
            running.result()
    for number, app in enumerate(apps):
        assert look(app, cookies[number]) == {"user": f"user{number}", "count": 60}
        ext.close(app)
