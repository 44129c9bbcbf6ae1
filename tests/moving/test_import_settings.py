"""The effect of the import's settings, and the ones that stop the application."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cachelib import NullCache, RedisCache, SimpleCache
from flask import Flask, session
from pymongo import MongoClient
from redis import Redis
from werkzeug.local import LocalProxy

from flask_gsession import Session, SettingError
from flask_gsession.cli import gsession
from flask_gsession.config import read_settings
from flask_gsession.stores.mongodb import MongoDBStore
from flask_gsession.stores.redis import RedisStore
from tests.harness.servers import mongo_server, redis_server

from .old import KEY, UNTIL, OldFiles


def an_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({"SECRET_KEY": KEY, "SESSION_STORE": "memory://", **config})
    return app


class FlaskRedis:
    """As flask-redis has it."""

    def __init__(self, client: Redis | None) -> None:
        self._redis_client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis_client, name)


# Enabled imports -------------------------------------------------------------------------------


def test_nothing_is_imported_by_default() -> None:
    app = an_app()
    ext = Session(app)
    assert app.extensions["gsession"][ext].repository.imports is None


@pytest.mark.filterwarnings("ignore:SESSION_TYPE is set, so old sessions")
def test_a_type_switches_the_import_on() -> None:
    settings = read_settings(an_app(SESSION_TYPE="filesystem"), {})
    assert settings.imports == ("flask-session",)
    assert settings.cookie_name == "session_gs"
    assert settings.import_cookie_name == "session"
    assert settings.permanent is True
    assert settings.idle_timeout == timedelta(days=31).total_seconds()


@pytest.mark.filterwarnings("ignore:SESSION_TYPE is set, so old sessions")
def test_explicit_settings_win() -> None:
    config = {
        "SESSION_TYPE": "filesystem",
        "SESSION_PERMANENT": False,
        "SESSION_IDLE_TIMEOUT": 60,
        "PERMANENT_SESSION_LIFETIME": 120,
        "SESSION_COOKIE_NAME": "shop",
    }
    settings = read_settings(an_app(**config), {})
    assert (settings.permanent, settings.idle_timeout) == (False, 60)
    assert (settings.cookie_name, settings.import_cookie_name) == ("shop_gs", "shop")


@pytest.mark.filterwarnings("ignore:Unknown setting SESSION_TYPE")
@pytest.mark.parametrize("value", [None, "null"])
def test_without_session_type_there_is_no_import(value: str | None) -> None:
    assert read_settings(an_app(SESSION_TYPE=value), {}).imports == ()


def test_an_empty_list_switches_it_off() -> None:
    settings = read_settings(an_app(SESSION_TYPE="filesystem", SESSION_IMPORT=[]), {})
    assert settings.imports == ()
    assert settings.cookie_name == "session"
    assert settings.permanent is True


@pytest.mark.parametrize("kind", ["memcached", "dynamodb", "something"])
def test_a_type_that_cannot_be_read(kind: str) -> None:
    with pytest.warns(UserWarning, match="can't be taken over, so users have to log in again"):
        assert read_settings(an_app(SESSION_TYPE=kind), {}).imports == ()
    app = an_app(SESSION_TYPE=kind, SESSION_IMPORT=["flask-session"], SESSION_IMPORT_UNTIL=UNTIL)
    with pytest.raises(SettingError, match="name a store whose sessions can be"):
        Session(app)
    with pytest.raises(SettingError, match="Set SESSION_STORE to the URL"):
        Session(an_app(SESSION_TYPE=kind, SESSION_STORE=None))


# The end --------------------------------------------------------------------------------------


def test_an_import_by_hand_needs_an_end() -> None:
    with pytest.raises(SettingError, match="SESSION_IMPORT is set without SESSION_IMPORT_UNTIL"):
        Session(an_app(SESSION_IMPORT=["cookie"]))


def test_an_automatic_import_without_an_end_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="with no end date: set SESSION_IMPORT_UNTIL") as warned:
        Session(an_app(SESSION_TYPE="filesystem"))
    assert len(warned) == 1


def test_an_import_that_has_ended_warns() -> None:
    app = an_app(SESSION_IMPORT=["cookie"], SESSION_IMPORT_UNTIL="2020-01-01")
    with pytest.warns(UserWarning, match="UNTIL has passed.*SESSION_COOKIE_NAME to 'session_gs'"):
        Session(app)


def test_after_an_import_ended_the_old_store_is_not_asked(tmp_path: Path, clock: Any) -> None:
    old = OldFiles(tmp_path)
    sids = [old.add(a=1), old.add(b=2)]
    app = an_app(**{**old.config, "SESSION_IMPORT_UNTIL": clock() + 100})
    Session(app, clock=clock)
    app.add_url_rule("/", view_func=lambda: dict(session))
    clients = [app.test_client() for _ in sids]
    for client, sid in zip(clients, sids, strict=True):
        client.set_cookie("session", sid)
    assert clients[0].get("/").json == {"a": 1}
    clock.advance(100)
    assert clients[1].get("/").json == {}
    assert clients[0].get("/").json == {"a": 1}


# Two cookies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "keywords", "names"),
    [
        ({}, {}, ("session_gs", "session")),
        ({}, {"cookie_name": "shop"}, ("shop", "session")),
        ({"SESSION_IMPORT_COOKIE_NAME": "old"}, {}, ("session", "old")),
        ({"SESSION_IMPORT_COOKIE_NAME": "old"}, {"cookie_name": "shop"}, ("shop", "old")),
    ],
)
def test_cookie_names(config: dict[str, Any], keywords: Any, names: tuple[str, str]) -> None:
    app = an_app(SESSION_IMPORT=["cookie"], SESSION_IMPORT_UNTIL=UNTIL, **config)
    settings = read_settings(app, keywords)
    assert (settings.cookie_name, settings.import_cookie_name) == names


@pytest.mark.parametrize(
    ("config", "keywords"),
    [
        ({}, {"cookie_name": "session"}),
        ({"SESSION_IMPORT_COOKIE_NAME": "session"}, {}),
        ({"SESSION_IMPORT_COOKIE_NAME": "shop"}, {"cookie_name": "shop"}),
    ],
)
def test_one_name_for_both_is_refused(config: dict[str, Any], keywords: Any) -> None:
    app = an_app(SESSION_IMPORT=["cookie"], SESSION_IMPORT_UNTIL=UNTIL, **config)
    with pytest.raises(SettingError, match="need different names"):
        Session(app, **keywords)


def test_the_suffix_follows_a_name_that_is_set_later() -> None:
    app = an_app(SESSION_IMPORT=["cookie"], SESSION_IMPORT_UNTIL=UNTIL)
    ext = Session(app)
    app.config["SESSION_COOKIE_NAME"] = "later"
    assert app.extensions["gsession"][ext].get_cookie_name(app) == "later_gs"


# Values that Flask-Session takes, and we don't --------------------------------------------------


@pytest.mark.parametrize("prefix", ["{shop}:", "s[1-9]^\\?*-:", "l\u00e4den:", "x" * 300])
def test_a_prefix_that_we_refuse_is_read_from(prefix: str) -> None:
    """Our own keys have the default prefix then."""
    url = redis_server().url
    app = Flask(__name__)
    app.config.update(SECRET_KEY=KEY, SESSION_TYPE="redis", SESSION_REDIS=url)
    app.config.update(SESSION_KEY_PREFIX=prefix, SESSION_ID_LENGTH=8, SESSION_IMPORT_UNTIL=UNTIL)
    ext = Session(app, store="memory://")
    assert read_settings(app, {}).key_prefix == "gsession:"
    assert read_settings(app, {}).id_length == 32
    app.add_url_rule("/", view_func=lambda: dict(session))
    with Redis.from_url(url) as client:
        names = [f"{prefix}{'s' * 11}", f"{prefix}{'t' * 43}", f"{prefix[:-1]}1{'u' * 43}"]
        for name in names:
            client.set(name, b"\x81\xa1a\x01", ex=60)
        browser = app.test_client()
        browser.set_cookie("session", "s" * 11)
        assert browser.get("/").json == {"a": 1}
        words = ["migrate", "--from", "flask-session", "--yes"]
        result = app.test_cli_runner().invoke(gsession, words)
        assert "1 taken over, 1 already\n" in result.output
        client.delete(*names)
    ext.close(app)


@pytest.mark.parametrize(("key", "value"), [("SESSION_KEY_PREFIX", 7), ("SESSION_ID_LENGTH", 4)])
def test_a_prefix_or_length_that_nobody_takes(key: str, value: object) -> None:
    app = an_app(SESSION_TYPE="redis", SESSION_REDIS="redis://127.0.0.1:1/0", **{key: value})
    with pytest.raises(SettingError, match=key):
        Session(app)


# Where old sessions are -----------------------------------------------------------------------


def test_redis_by_every_kind_of_client() -> None:
    url = redis_server().url
    clients: list[Any] = [url]
    with Redis.from_url(url) as client, Redis.from_url(url, decode_responses=True) as decoding:
        clients += [client, decoding, LocalProxy(lambda: client), FlaskRedis(client)]
        clients += [LocalProxy(lambda: FlaskRedis(client))]
        for number, given in enumerate(clients):
            app = Flask(__name__)
            app.config.update(
                SECRET_KEY=KEY,
                SESSION_TYPE="redis",
                SESSION_REDIS=given,
                SESSION_KEY_PREFIX=f"test-settings-{number}:",
                SESSION_IMPORT_UNTIL=UNTIL,
            )
            ext = Session(app)
            store = ext.store(app)
            assert isinstance(store, RedisStore)
            client.set(f"test-settings-{number}:{'a' * 43}", b"\x81\xa1a\x01", ex=60)
            app.add_url_rule("/", view_func=lambda: dict(session))
            browser = app.test_client()
            browser.set_cookie("session", "a" * 43)
            assert browser.get("/").json == {"a": 1}
            for name in client.scan_iter(f"test-settings-{number}:*"):
                client.delete(name)
            ext.close(app)


def test_our_own_timeouts() -> None:
    """A client of redis-py waits for 5 seconds, and tries 10 times."""
    app = Flask(__name__)
    client = Redis(host="127.0.0.1", port=1, socket_timeout=50, socket_connect_timeout=50)
    app.config.update(SECRET_KEY=KEY, SESSION_TYPE="redis", SESSION_REDIS=client)
    app.config.update(SESSION_IMPORT_UNTIL=UNTIL)
    ext = Session(app, store_timeout=0.4)
    store: Any = ext.store(app)
    connection = store.commands.pool.make()
    assert connection.socket_timeout == connection.socket_connect_timeout == 0.1
    ext.close(app)
    client.close()


def test_mongodb_in_its_database() -> None:
    with MongoClient(mongo_server().url) as client:
        app = Flask(__name__)
        app.config.update(SECRET_KEY=KEY, SESSION_TYPE="mongodb", SESSION_MONGODB=client)
        app.config.update(SESSION_MONGODB_DB="test_settings", SESSION_IMPORT_UNTIL=UNTIL)
        ext = Session(app)
        store = ext.store(app)
        assert isinstance(store, MongoDBStore)
        app.add_url_rule("/", view_func=lambda: session.update(a=1) or "")
        app.test_client().get("/")
        assert client["test_settings"]["gsession"].count_documents({}) == 1
        client.drop_database("test_settings")
        ext.close(app)


@pytest.mark.parametrize(("kind", "key"), [("redis", "REDIS"), ("mongodb", "MONGODB")])
def test_a_type_alone_names_no_server(kind: str, key: str) -> None:
    app = Flask(__name__)
    app.config.update(SECRET_KEY=KEY, SESSION_TYPE=kind, SESSION_IMPORT_UNTIL=UNTIL)
    with pytest.raises(SettingError, match=f"neither SESSION_STORE nor SESSION_{key} is set"):
        Session(app)
    Session(app, store="memory://")


@pytest.mark.parametrize(
    ("kind", "key", "place"),
    [
        ("redis", "SESSION_REDIS", "mongodb://127.0.0.1:1/x"),
        ("mongodb", "SESSION_MONGODB", "redis://127.0.0.1:1/0"),
        ("redis", "SESSION_REDIS", "memory://"),
    ],
)
def test_a_server_of_another_kind(kind: str, key: str, place: str) -> None:
    with pytest.raises(SettingError, match=f"SESSION_TYPE is '{kind}', but {key} leads to a"):
        Session(an_app(SESSION_TYPE=kind, SESSION_IMPORT_UNTIL=UNTIL, **{key: place}))


def test_a_proxy_or_extension_without_a_client() -> None:
    def nothing() -> Any:
        raise RuntimeError("no context")

    for given, message in (
        (LocalProxy(nothing), "SESSION_REDIS is a LocalProxy that is unbound"),
        (FlaskRedis(None), "SESSION_REDIS is a FlaskRedis that has no client yet"),
    ):
        with pytest.raises(SettingError, match=message):
            Session(an_app(SESSION_TYPE="redis", SESSION_REDIS=given))


def test_a_redis_cache_of_cachelib() -> None:
    with Redis.from_url(redis_server().url) as client:
        cache = RedisCache(client, key_prefix="test-cachelib-")
        cache.set(f"session:{'b' * 43}", {"a": (1, 2)}, timeout=60)
        config = {"SESSION_TYPE": "cachelib", "SESSION_CACHELIB": cache}
        app = an_app(**config, SESSION_IMPORT_UNTIL=UNTIL)
        Session(app)
        app.add_url_rule("/", view_func=lambda: dict(session))
        browser = app.test_client()
        browser.set_cookie("session", "b" * 43)
        assert browser.get("/").json == {"a": [1, 2]}
        browser.delete_cookie("session")
        client.delete(f"test-cachelib-session:{'b' * 43}")


@pytest.mark.parametrize("cache", [SimpleCache(), NullCache()])
@pytest.mark.filterwarnings("ignore:SESSION_TYPE is set, so old sessions")
def test_another_cache_is_refused(cache: Any) -> None:
    with pytest.raises(SettingError, match=f"SESSION_CACHELIB is a {type(cache).__name__}"):
        Session(an_app(SESSION_TYPE="cachelib", SESSION_CACHELIB=cache))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("flask_session", "'flask_session', which isn't .*; did you mean flask-session"),
        ("Cookies", "'Cookies', which isn't a source of old sessions; did you mean cookie"),
        ("redis:/x:geheim", "An item of SESSION_IMPORT: a redis URL is written as"),
        ("elsewhere", "An item of SESSION_IMPORT is no URL"),
        ({"url": "redis://geheim"}, "SESSION_IMPORT has a dict with"),
        ({"store": 7}, "An item of SESSION_IMPORT is of type int"),
        (object(), "An item of SESSION_IMPORT is of type object"),
    ],
)
def test_a_source_that_does_not_exist(source: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        Session(an_app(SESSION_IMPORT=[source], SESSION_IMPORT_UNTIL=UNTIL))
    assert "geheim" not in str(error.value)


def test_a_further_session_imports_nothing_by_itself(tmp_path: Path) -> None:
    """Otherwise both would take over the same sessions."""
    old = OldFiles(tmp_path)
    app = an_app(**old.config)
    first, second = Session(app), Session(app, cookie_name="second")
    third = Session(app, cookie_name="third", imports=["cookie"], import_until=UNTIL)
    interfaces = app.extensions["gsession"]
    assert interfaces[first].repository.imports is not None
    assert interfaces[second].repository.imports is None
    assert interfaces[third].repository.imports is not None
    app.add_url_rule("/", view_func=lambda: [dict(session), dict(second.session)])
    client = app.test_client()
    client.set_cookie("session", old.add(a=1))
    assert client.get("/").json == [{"a": 1}, {}]


# SESSION_PERMANENT ----------------------------------------------------------------------------


def test_new_sessions_are_permanent() -> None:
    app = an_app(SESSION_PERMANENT=True)
    Session(app)
    seen: list[bool] = []

    @app.get("/")
    def look() -> str:
        seen.append(session.permanent)
        return ""

    @app.get("/write")
    def write() -> str:
        session["a"] = 1
        return str(session.permanent)

    @app.get("/off")
    def off() -> str:
        session.permanent = False
        session["a"] = 1
        return ""

    client = app.test_client()
    client.get("/")
    assert seen == [True]
    assert client.get_cookie("session") is None  # it is stored only when it is written to
    assert client.get("/write").text == "True"
    cookie = client.get_cookie("session")
    assert cookie is not None
    assert cookie.expires is not None
    client.get("/")
    assert seen == [True, True]
    other = app.test_client()
    other.get("/off")
    cookie = other.get_cookie("session")
    assert cookie is not None
    assert cookie.expires is None
    other.get("/")
    assert seen[-1] is False
