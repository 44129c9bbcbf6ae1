"""Settings: a wrong one stops the app at `init_app`, names the allowed values, hides secrets."""

from __future__ import annotations

import base64
import logging
import re
import secrets
import subprocess
import sys
import traceback
import warnings
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session
from marshmallow import Schema
from marshmallow.fields import Field
from pymongo import AsyncMongoClient, MongoClient
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from flask_gsession import Session, SettingError
from flask_gsession.config import CHECKS, SettingKeywords, Settings, read_settings
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.mongodb import MongoDBStore
from flask_gsession.stores.redis import RedisStore
from flask_gsession.stores.sqlite import SQLiteStore
from flask_gsession.tokens import TokenSigner, new_token
from flask_gsession.values.merge import POLICIES
from tests.harness.servers import mongo_server, redis_server

DAY = 86400.0
PASSWORD = "geheim-4711"


def an_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({"SECRET_KEY": "a key", "SESSION_STORE": "memory://", **config})
    return app


def settings_of(**config: Any) -> Settings:
    return read_settings(an_app(**config), {})


def merge_function(base: Any, theirs: Any, mine: Any) -> Any:
    return mine


# Allowed values ------------------------------------------------------------------------------

RIGHT: dict[str, list[tuple[Any, Any]]] = {
    "SESSION_STORE": [(None, None), ("memory://", "memory://")],
    "SESSION_COOKIE_NAME": [
        ("session", "session"),
        ("a.b-c_d~", "a.b-c_d~"),
        ("x" * 200, "x" * 200),
    ],
    "SESSION_KEY_PREFIX": [("", ""), ("shop:", "shop:"), ("a b", "a b"), ("x" * 200, "x" * 200)],
    "SESSION_ID_LENGTH": [(16, 16), (64, 64)],
    "SESSION_TOKEN_FACTORY": [(None, None), (new_token, new_token)],
    "SESSION_TOKEN_HEADER": [
        (None, None),
        *((name, name) for name in ("X-Session", "Session-Token", "X-Auth-Token", "Shop-Cookie")),
    ],
    "SESSION_IDLE_TIMEOUT": [(1, 1.0), (0.5 + 1, 1.5), (timedelta(hours=2), 7200.0)],
    "SESSION_ABSOLUTE_TIMEOUT": [(3600, 3600.0), (timedelta(days=366), 366 * DAY)],
    "PERMANENT_SESSION_LIFETIME": [(60, 60.0), (timedelta(days=1), DAY)],
    "SESSION_RENEW_INTERVAL": [(None, None), (0, 0.0), (DAY, DAY), (timedelta(minutes=1), 60.0)],
    "SESSION_ROTATION_GRACE": [(0, 0.0), (3600, 3600.0)],
    "SESSION_RENEW_CSRF": [(True, True), (False, False)],
    "SESSION_CONFIRM_VIEW": [(None, None), ("confirm", "confirm"), (".confirm", ".confirm")],
    "SESSION_STORE_TIMEOUT": [(0.01, 0.01), (60, 60.0), (timedelta(seconds=2), 2.0)],
    "SESSION_POOL_MAX": [(1, 1), (10_000, 10_000)],
    "SESSION_BREAKER_FAILURES": [(0, 0), (10_000, 10_000)],
    "SESSION_BREAKER_PAUSE": [(0.01, 0.01), (60, 60.0), (timedelta(seconds=2), 2.0)],
    "SESSION_NEAR_CACHE": [(0, 0.0), (timedelta(0), 0.0), (0.02, 0.02), (10, 10.0)],
    "SESSION_NEAR_CACHE_BYTES": [(65_536, 65_536), (2**36, 2**36)],
    "SESSION_LIVE_STREAMS": [(None, None), (0, 0), (100_000, 100_000)],
    "SESSION_LIVE_USER_STREAMS": [(1, 1), (10_000, 10_000)],
    "SESSION_LIVE_HEARTBEAT": [(1, 1.0), (60, 60.0)],
    "SESSION_LIVE_STREAM_LIFE": [(10, 10.0), (timedelta(hours=1), 3600.0)],
    "SESSION_LIVE_POLL": [(1, 1.0), (600, 600.0)],
    "SESSION_EDGE_SYNC": [(0.1, 0.1), (3600, 3600.0), (timedelta(minutes=1), 60.0)],
    "SESSION_JOURNAL": [(True, True), (False, False)],
    "SESSION_JOURNAL_EVENTS": [(1000, 1000), (1_000_000_000, 1_000_000_000)],
    "SESSION_LOGOUT_REPLICAS": [(0, 0), (100, 100)],
    "SESSION_ON_STORE_ERROR": [("fail", "fail"), ("keep-response", "keep-response")],
    "SESSION_MAX_BYTES": [(256, 256), (15 * 1024 * 1024, 15 * 1024 * 1024)],
    "SESSION_MAX_KEYS": [(1, 1), (1_000_000, 1_000_000)],
    "SESSION_MAX_DEPTH": [(1, 1), (200, 200)],
    "SESSION_SPILL_BYTES": [(None, None), (256, 256), (15 * 1024 * 1024, 15 * 1024 * 1024)],
    "SESSION_SPILL_STORE": [(None, None), ("s3://bucket", "s3://bucket")],
    "SESSION_LOCK_CLIENT_WAITERS": [(None, None), (0, 0), (10_000, 10_000)],
    "SESSION_NEWCOMERS_PER_MINUTE": [(None, None), (1, 1), (1_000_000, 1_000_000)],
    "SESSION_NEWCOMER_TIMEOUT": [(1, 1.0), (86_400, 86_400.0)],
    "SESSION_MAX_TOTAL_BYTES": [(None, None), (256, 256), (2**30, 2**30)],
    "SESSION_MAX_VALUE_BYTES": [(256, 256), (256 * 1024 * 1024, 256 * 1024 * 1024)],
    "SESSION_ENCRYPTION_KEYS": [(None, ()), ([], ()), ([b"k" * 32], (b"k" * 32,))],
    "SESSION_CONFLICT": [("last", POLICIES["last"]), ("reject", POLICIES["reject"])],
    "SESSION_MERGE_POLICIES": [
        ({}, {}),
        *(({"key": name}, {"key": policy}) for name, policy in POLICIES.items()),
        ({"key": merge_function}, {"key": merge_function}),
    ],
    "SESSION_LOCK_TIMEOUT": [(0.1, 0.1), (3600, 3600.0), (timedelta(seconds=5), 5.0)],
    "SESSION_LOCK_WAIT": [(0, 0.0), (3600, 3600.0), (timedelta(seconds=5), 5.0)],
    "SESSION_LOCK_WAITERS": [(0, 0), (10_000, 10_000)],
    "SESSION_LOCK_WARN": [(None, None), (0, 0.0), (3600, 3600.0)],
    "SESSION_MAX_PER_USER": [(None, None), (1, 1), (1000, 1000)],
    "SESSION_MAX_POLICY": [("oldest", "oldest"), ("refuse", "refuse")],
    "SESSION_USER_VALUES_LIFETIME": [(60, 60.0), (timedelta(days=365), 31_536_000.0)],
    "SESSION_SEEN_INTERVAL": [(1, 1.0), (timedelta(minutes=5), 300.0), (86_400, 86_400.0)],
    "SESSION_DEVICE_LABELS": [(True, True), (False, False)],
    "SESSION_SCHEMA": [(None, None), (Schema, Schema), ([], [])],
    "SESSION_PERMANENT": [(True, True), (False, False)],
    "SESSION_IMPORT": [(None, ()), ([], ()), ((), ())],
    "SESSION_IMPORT_UNTIL": [
        (None, None),
        (date(2027, 3, 31), 1806537600.0),
        ("2027-03-31", 1806537600.0),
        ("2027-03-31T22:00:00+02:00", 1806523200.0),
        (datetime(2027, 3, 31, 20), 1806523200.0),
        (1806523200, 1806523200.0),
    ],
    "SESSION_REMEMBER": [("cookie", "cookie"), ("session", "session")],
    "SESSION_REMEMBER_UNTIL": [(None, None)],
    "SESSION_IMPORT_WATCH": [(True, True), (False, False)],
    "SESSION_IMPORT_COOKIE_NAME": [(None, None), ("session", "session")],
    "SESSION_IMPORT_COOKIE_DOMAIN": [(None, None), ("example.com", "example.com")],
    "SESSION_IMPORT_COOKIE_PATH": [(None, None), ("/shop", "/shop")],
    "SESSION_DEBUG": [(True, True), (False, False), (None, False)],
    "SESSION_DEBUG_SHOW": [
        ((), frozenset()),
        (["cart"], frozenset({"cart"})),
        ({"a"}, frozenset({"a"})),
    ],
}

NO_DURATION = ["60", "", b"60", True, [60], {}, Decimal(60), float("nan"), float("inf"), -1]
NO_COUNT = ["10", 10.0, True, None, [10], -1, 0, 10**12, float("nan"), timedelta(1)]
NO_TEXT = [7, True, b"bytes", ["text"]]

WRONG: dict[str, list[Any]] = {
    "SESSION_STORE": [
        7,
        True,
        b"memory://",
        ["memory://"],
        {},
        Path("a"),
        object(),
        MemoryStore,
        "",
    ],
    "SESSION_COOKIE_NAME": [*NO_TEXT, None, "", "a b", "a=b", "a;b", "a\n", "ä", "x" * 201, "a,b"],
    "SESSION_KEY_PREFIX": [*NO_TEXT, None, "{a}", "a*", "a?", "[a]", "a\n", "a\0", "ä", "x" * 201],
    "SESSION_ID_LENGTH": [*NO_COUNT, 15, 65],
    "SESSION_TOKEN_FACTORY": ["uuid4", 7, True, []],
    "SESSION_TOKEN_HEADER": [
        *NO_TEXT,
        *("", "X Session", "X:", "X\r\nEvil", "ä", "x" * 101),
        *("Cookie", "Set-Cookie", "cookie", "Host", "HOST", "Authorization", "Content-Type"),
        *("Content-Length", "Connection", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection"),
        *("TE", "Trailer", "Transfer-Encoding", "Upgrade", "Accept", "Accept-Language", "Origin"),
        *("If-None-Match", "Range", "Referer", "User-Agent", "Vary", "Cache-Control", "Expires"),
        *("X-Forwarded-For", "Forwarded", "Via", "Sec-Fetch-Site", "Access-Control-Allow-Origin"),
    ],
    "SESSION_IDLE_TIMEOUT": [*NO_DURATION, None, 0, 0.9, 10**12, timedelta(0), timedelta(-1)],
    "SESSION_ABSOLUTE_TIMEOUT": [*NO_DURATION, None, 0, 10**12, timedelta.max],
    "PERMANENT_SESSION_LIFETIME": [*NO_DURATION, None, 0, 10**12, timedelta.max],
    "SESSION_RENEW_INTERVAL": [*NO_DURATION, DAY + 1],
    "SESSION_ROTATION_GRACE": [*NO_DURATION, None, 3601, timedelta(hours=2)],
    "SESSION_RENEW_CSRF": ["yes", "", 1, 0, None, []],
    "SESSION_CONFIRM_VIEW": ["", 1, True, "x" * 201, ["confirm"], len],
    "SESSION_STORE_TIMEOUT": [*NO_DURATION, None, 0, 0.001, 61],
    "SESSION_POOL_MAX": [*NO_COUNT, 10_001],
    "SESSION_BREAKER_FAILURES": [*(value for value in NO_COUNT if value != 0), 10_001],
    "SESSION_BREAKER_PAUSE": [*NO_DURATION, None, 0, 0.001, 61],
    "SESSION_NEAR_CACHE": [*NO_DURATION, None, -1, 0.001, 10.5],
    "SESSION_NEAR_CACHE_BYTES": [*NO_COUNT, None, 0, 65_535, 2**36 + 1],
    "SESSION_LIVE_STREAMS": [*(value for value in NO_COUNT if value not in (0, None)), 100_001],
    "SESSION_LIVE_USER_STREAMS": [*NO_COUNT, None, 0, 10_001],
    "SESSION_LIVE_HEARTBEAT": [*NO_DURATION, None, 0, 0.5, 61],
    "SESSION_LIVE_STREAM_LIFE": [*NO_DURATION, None, 9, 3601],
    "SESSION_LIVE_POLL": [*NO_DURATION, None, 0, 601],
    "SESSION_EDGE_SYNC": [*NO_DURATION, None, 0, 0.01, 3601],
    "SESSION_JOURNAL": [0, 1, "yes", None],
    "SESSION_JOURNAL_EVENTS": [*NO_COUNT, 999, 1_000_000_001],
    "SESSION_LOGOUT_REPLICAS": [*(value for value in NO_COUNT if value != 0), 101],
    "SESSION_ON_STORE_ERROR": ["ignore", "", None, True, 1, ["fail"], {}],
    "SESSION_MAX_BYTES": [*NO_COUNT, 255, 15 * 1024 * 1024 + 1],
    "SESSION_MAX_KEYS": [*NO_COUNT, 1_000_001],
    "SESSION_MAX_DEPTH": [*NO_COUNT, 201],
    "SESSION_SPILL_BYTES": [*(value for value in NO_COUNT if value is not None), 255],
    "SESSION_SPILL_STORE": [7, b"file:///large", {}, Path("a"), MemoryStore, "", "/large"],
    "SESSION_LOCK_CLIENT_WAITERS": ["5", 5.0, True, [5], -1, 10_001],
    "SESSION_NEWCOMERS_PER_MINUTE": [*(bad for bad in NO_COUNT if bad is not None), 0, 1_000_001],
    "SESSION_NEWCOMER_TIMEOUT": [*NO_DURATION, None, 0, 86_401],
    "SESSION_MAX_TOTAL_BYTES": [*(bad for bad in NO_COUNT if bad is not None), 255, 2**30 + 1],
    "SESSION_MAX_VALUE_BYTES": [*NO_COUNT, 255, 256 * 1024 * 1024 + 1],
    "SESSION_ENCRYPTION_KEYS": [
        "",
        "plain",
        ["plain"],
        ["plain", b"k" * 32],
        [b"k" * 31],
        [b"k" * 33],
        [b"k" * 32, None],
        [b"k" * 32, "plain", "plain"],
        ["k" * 32],
        ["*" * 43],
        ["ä" * 43],
        ["YWFh" * 10 + "****YWE"],
        ["YWFh" * 10 + "YW+/"],
        [secrets.token_hex(32)],
        [bytearray(32)],
        {"key": b"k" * 32},
        7,
        True,
    ],
    "SESSION_CONFLICT": ["merge", "", "LAST", None, True, 0, ["last"], merge_function],
    "SESSION_MERGE_POLICIES": [
        None,
        "counter",
        ["counter"],
        {"key": "sum"},
        {"key": None},
        {"key": ["counter"]},
        {7: "counter"},
        {b"key": "counter"},
    ],
    "SESSION_LOCK_TIMEOUT": [*NO_DURATION, None, 0, 0.05, 3601],
    "SESSION_LOCK_WAIT": [*NO_DURATION, None, 3601],
    "SESSION_LOCK_WAITERS": [*(wrong for wrong in NO_COUNT if wrong != 0), 10_001],
    "SESSION_LOCK_WARN": [*NO_DURATION, 3601],
    "SESSION_MAX_PER_USER": [0, 1001, 2.0, "3", True],
    "SESSION_MAX_POLICY": ["newest", None, 1],
    "SESSION_USER_VALUES_LIFETIME": [*NO_DURATION, 0, 59],
    "SESSION_SEEN_INTERVAL": [*NO_DURATION, 0, 0.5, 86_401],
    "SESSION_DEVICE_LABELS": ["yes", "", 1, 0, None, []],
    "SESSION_SCHEMA": [7, True, "schema", {}, dict, object(), ["preferences"], Field()],
    "SESSION_PERMANENT": ["yes", "", 1, 0, None, []],
    "SESSION_IMPORT": ["cookie", {"store": "redis://"}, 7, True, [""], ["cookie", None]],
    "SESSION_IMPORT_UNTIL": ["soon", "", "2027-13-01", "9999-12-31", True, -1, 10**15, [2027], {}],
    "SESSION_REMEMBER": [None, "", "Session", True, 1, ["session"]],
    "SESSION_REMEMBER_UNTIL": ["soon", "", "2027-13-01", True, -1, 10**15, [2027], {}],
    "SESSION_IMPORT_WATCH": ["yes", "", 1, 0, None, []],
    "SESSION_IMPORT_COOKIE_NAME": [*NO_TEXT, "", "a b", "a=b", "ä", "x" * 201],
    "SESSION_IMPORT_COOKIE_DOMAIN": [*NO_TEXT, "", "a b", "a;b", "a/b"],
    "SESSION_IMPORT_COOKIE_PATH": [*NO_TEXT, "", "shop"],
    "SESSION_DEBUG": ["yes", "", 1, 0, []],
    "SESSION_DEBUG_SHOW": ["cart", b"cart", None, True, 7, {"cart": 1}, [7], [b"cart"], [None]],
}

SECRET = ("SESSION_STORE", "SESSION_SPILL_STORE", "SESSION_ENCRYPTION_KEYS", "SESSION_IMPORT")
FIELDS = {key: name for name, (key, _) in CHECKS.items()}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    """One test case for each entry of a table."""
    return [
        pytest.param(key, entry, id=f"{key}-{number}")
        for key, entries in table.items()
        for number, entry in enumerate(entries)
    ]


def test_every_setting_is_in_these_tables() -> None:
    assert set(RIGHT) == set(WRONG) == set(FIELDS)


@pytest.mark.parametrize(("key", "entry"), cases(RIGHT))
def test_right_values_are_taken(key: str, entry: tuple[Any, Any]) -> None:
    value, expected = entry
    taken = getattr(settings_of(**{key: value}), FIELDS[key])
    assert taken == expected
    assert type(taken) is type(expected) or key == "SESSION_MERGE_POLICIES"
    if not (key == "SESSION_DEBUG" and value is None):  # None only in app.config
        assert getattr(read_settings(an_app(), {FIELDS[key]: value}), FIELDS[key]) == expected


@pytest.mark.parametrize(("key", "value"), cases(WRONG))
@pytest.mark.parametrize("by_keyword", [False, True], ids=["config", "keyword"])
def test_wrong_values_stop_the_app(key: str, value: Any, by_keyword: bool) -> None:
    app = an_app(**({} if by_keyword else {key: value}))
    before = app.session_interface
    with pytest.raises(SettingError) as error:
        Session(app, **({FIELDS[key]: value} if by_keyword else {}))
    message = str(error.value)
    assert message.startswith(f"{key} is ")
    assert "allowed" in message
    shown = repr(value)[:80]
    if key not in SECRET:
        assert message.startswith(f"{key} is {shown}; allowed: ")
    elif len(shown) > 6:
        assert shown not in message
    assert len(message) < 400
    assert app.session_interface is before
    assert not app.extensions.get("gsession")


@pytest.mark.usefixtures("shipped_defaults")
def test_the_defaults_are_as_documented() -> None:
    assert read_settings(Flask(__name__), {}) == Settings(
        store=None,
        cookie_name="session",
        key_prefix="gsession:",
        id_length=32,
        token_factory=None,
        token_header=None,
        idle_timeout=7200,
        absolute_timeout=31 * DAY,
        permanent_lifetime=31 * DAY,
        renew_interval=None,
        rotation_grace=10,
        renew_csrf=False,
        confirm_view=None,
        store_timeout=1,
        pool_max=100,
        breaker_failures=5,
        breaker_pause=1,
        near_cache=0,
        near_cache_bytes=64 * 1024 * 1024,
        edge_sync=30,
        logout_replicas=0,
        on_store_error="fail",
        max_bytes=1024 * 1024,
        max_keys=1000,
        max_depth=64,
        spill_bytes=16 * 1024,
        spill_store=None,
        max_value_bytes=32 * 1024 * 1024,
        max_total_bytes=None,
        newcomers_per_minute=600,
        newcomer_timeout=300.0,
        encryption_keys=(),
        read_plain=False,
        conflict=POLICIES["last"],
        merge_policies={},
        schema=None,
        debug=False,
    )


def test_the_renew_interval_follows_the_idle_timeout() -> None:
    default = settings_of()
    assert [default.renew_interval_for(idle) for idle in (10, 100, 1200, 7200)] == [0.5, 5, 60, 60]
    chosen = settings_of(SESSION_RENEW_INTERVAL=300)
    assert [chosen.renew_interval_for(idle) for idle in (10, 300, 7200)] == [10, 300, 300]


def test_settings_cannot_be_changed_afterwards() -> None:
    policies = {"hits": "counter"}
    settings = settings_of(SESSION_MERGE_POLICIES=policies)
    policies["other"] = "set"
    assert set(settings.merge_policies) == {"hits"}
    with pytest.raises(AttributeError):
        settings.idle_timeout = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.merge_policies["other"] = merge_function  # type: ignore[index]


def test_keywords_go_before_the_configuration() -> None:
    app = an_app(SESSION_IDLE_TIMEOUT=100, SESSION_MAX_KEYS=7)
    settings = read_settings(app, {"idle_timeout": 200})
    assert settings.idle_timeout == 200
    assert settings.max_keys == 7
    # The configuration is not even looked at: it may be meant for another Session.
    app.config["SESSION_IDLE_TIMEOUT"] = "wrong"
    assert read_settings(app, {"idle_timeout": 200}).idle_timeout == 200
    # None and False are values, not "unset".
    app = an_app(SESSION_TOKEN_HEADER="X-Session", SESSION_DEBUG=True, SESSION_ROTATION_GRACE=5)
    settings = read_settings(app, {"token_header": None, "debug": False, "rotation_grace": 0})
    assert settings.token_header is None
    assert settings.debug is False
    assert settings.rotation_grace == 0


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("idle_timout", "did you mean idle_timeout?"),
        ("stores", "did you mean store?"),
        ("SESSION_IDLE_TIMEOUT", "did you mean idle_timeout?"),
        ("SESSION_STORES", "did you mean store?"),
        ("PERMANENT_SESSION_LIFETIME", "did you mean permanent_lifetime?"),
        ("xyz", ""),
    ],
)
def test_an_unknown_keyword_is_refused(keyword: str, hint: str) -> None:
    with pytest.raises(SettingError, match=f"unknown setting '{keyword}'") as error:
        Session(an_app(), **{keyword: 1})
    assert str(error.value).endswith(hint or "'xyz'")


def test_debug_follows_the_application() -> None:
    for debug in (True, False):
        app = an_app()
        app.debug = debug
        assert read_settings(app, {}).debug is debug
        assert read_settings(app, {"debug": not debug}).debug is not debug
    app.config["SESSION_DEBUG"] = True
    assert read_settings(app, {}).debug is True


def test_all_settings_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    key = secrets.token_urlsafe(32)
    for name, value in {
        "STORE": "memory://",
        "COOKIE_NAME": "sid",
        "KEY_PREFIX": "shop:",
        "ID_LENGTH": "24",
        "TOKEN_HEADER": "X-Session",
        "IDLE_TIMEOUT": "600",
        "ABSOLUTE_TIMEOUT": "86400",
        "RENEW_INTERVAL": "null",
        "ROTATION_GRACE": "2.5",
        "STORE_TIMEOUT": "0.5",
        "POOL_MAX": "7",
        "BREAKER_FAILURES": "0",
        "BREAKER_PAUSE": "0.5",
        "EDGE_SYNC": "5",
        "LOGOUT_REPLICAS": "2",
        "ON_STORE_ERROR": "keep-response",
        "MAX_BYTES": "4096",
        "MAX_KEYS": "10",
        "MAX_DEPTH": "5",
        "ENCRYPTION_KEYS": f'["{key}", "plain"]',
        "CONFLICT": "reject",
        "MERGE_POLICIES__hits": "counter",
        "MERGE_POLICIES__tags": "set",
        "DEBUG": "true",
    }.items():
        monkeypatch.setenv(f"FLASK_SESSION_{name}", value)
    monkeypatch.setenv("FLASK_PERMANENT_SESSION_LIFETIME", "1200")
    app = Flask(__name__)
    app.config.from_prefixed_env()
    assert read_settings(app, {}) == Settings(
        store="memory://",
        cookie_name="sid",
        key_prefix="shop:",
        id_length=24,
        token_header="X-Session",
        idle_timeout=600,
        absolute_timeout=86400,
        permanent_lifetime=1200,
        renew_interval=None,
        rotation_grace=2.5,
        store_timeout=0.5,
        pool_max=7,
        breaker_failures=0,
        breaker_pause=0.5,
        edge_sync=5,
        logout_replicas=2,
        on_store_error="keep-response",
        max_bytes=4096,
        max_keys=10,
        max_depth=5,
        encryption_keys=(base64.urlsafe_b64decode(key + "="),),
        read_plain=True,
        conflict=POLICIES["reject"],
        merge_policies={"hits": POLICIES["counter"], "tags": POLICIES["set"]},
        debug=True,
    )


@pytest.mark.parametrize("url", ["memory://", "sqlite:///sessions.db", "mongodb://localhost/"])
def test_logout_replicas_without_a_redis_are_warned_about(url: str) -> None:
    app = an_app(SESSION_STORE=url, SESSION_LOGOUT_REPLICAS=1)
    with pytest.warns(UserWarning, match="SESSION_LOGOUT_REPLICAS has no effect") as warned:
        Session(app)
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize(
    "url", ["redis://h", "redis+sentinel://h/service", "redis+cluster://h", "rediss+cluster://h"]
)
def test_logout_replicas_of_a_redis(url: str) -> None:
    Session(an_app(SESSION_STORE=url, SESSION_LOGOUT_REPLICAS=1))


@pytest.mark.parametrize(
    "config",
    [
        {"SESSION_IDLE_TIMEOUT": 100, "SESSION_ABSOLUTE_TIMEOUT": 50},
        {"PERMANENT_SESSION_LIFETIME": 3600, "SESSION_ABSOLUTE_TIMEOUT": 60},
    ],
    ids=["idle", "permanent"],
)
def test_a_lifetime_that_cannot_be_reached_is_warned_about(config: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=f"^{next(iter(config))} is .* SESSION_ABSOLUTE_TIMEOUT"):
        Session(an_app(**config))


def test_a_short_absolute_timeout_alone_is_not_a_mistake() -> None:
    """The defaults beside it are nobody's wish."""
    Session(an_app(SESSION_ABSOLUTE_TIMEOUT=60))


@pytest.mark.parametrize("app", [5, "redis://localhost", Flask, object()])
def test_an_object_that_is_not_an_application_is_refused(app: Any) -> None:
    with pytest.raises(SettingError, match=f"not a value of type {type(app).__name__}"):
        Session(app)


# Encryption keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "keys", "read_plain"),
    [
        ([b"a" * 32, b"b" * 32], (b"a" * 32, b"b" * 32), False),
        ((b"a" * 32,), (b"a" * 32,), False),
        (b"a" * 32, (b"a" * 32,), False),
        ("YWFh" * 10 + "YWE", (b"a" * 32,), False),
        (["YWFh" * 10 + "YWE="], (b"a" * 32,), False),
        (["_-_-" * 10 + "_-8"], (base64.urlsafe_b64decode("_-_-" * 10 + "_-8="),), False),
        ([b"a" * 32, "plain"], (b"a" * 32,), True),
        ((b"a" * 32, b"b" * 32, "plain"), (b"a" * 32, b"b" * 32), True),
    ],
)
def test_encryption_keys_of_every_form(
    value: Any, keys: tuple[bytes, ...], read_plain: bool
) -> None:
    settings = settings_of(SESSION_ENCRYPTION_KEYS=value)
    assert settings.encryption_keys == keys
    assert settings.read_plain is read_plain


@pytest.mark.parametrize("wrap", [lambda key: key, lambda key: [key], lambda key: [b"k" * 32, key]])
@pytest.mark.parametrize("key", [PASSWORD, PASSWORD.encode(), f"{PASSWORD * 4}="])
def test_an_encryption_key_is_never_shown(wrap: Any, key: Any) -> None:
    with pytest.raises(SettingError) as error:
        Session(an_app(SESSION_ENCRYPTION_KEYS=wrap(key)))
    assert PASSWORD not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("keys", "given"),
    [
        ([b"k" * 33], "33 bytes"),
        (secrets.token_urlsafe(31), "31 bytes as base64url text"),
        ("ä" * 43, "43 characters that aren't base64url"),
        ([b"k" * 32, None], "NoneType"),
    ],
    ids=["bytes", "text", "other text", "none"],
)
def test_the_error_gives_the_length_of_a_wrong_encryption_key(keys: Any, given: str) -> None:
    with pytest.raises(SettingError, match=rf"given: {given}\)$"):
        Session(an_app(SESSION_ENCRYPTION_KEYS=keys))


def test_settings_show_no_secret() -> None:
    key, url = f"{PASSWORD:k<32}".encode(), f"redis://ada:{PASSWORD}@localhost/0"
    app = an_app(SESSION_ENCRYPTION_KEYS=[key], SESSION_STORE=url)
    ext = Session(app)
    settings = read_settings(app, {})
    assert settings.encryption_keys == (key,)
    for shown in (settings, ext, app.extensions, app.session_interface, ext.store(app)):
        assert PASSWORD not in f"{shown!r} {shown!s}"


# The store's URL -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("memory://", MemoryStore),
        ("memory:", MemoryStore),
        ("sqlite:///sessions.sqlite3", SQLiteStore),
        ("sqlite:////tmp/sessions.sqlite3", SQLiteStore),
        ("SQLite:///sessions.sqlite3", SQLiteStore),
        ("MEMORY://", MemoryStore),
        ("Redis://localhost:6379/0", RedisStore),
        ("UNIX:///run/redis.sock", RedisStore),
        ("MongoDB://localhost", MongoDBStore),
        ("redis://localhost:6379/0", RedisStore),
        ("redis://localhost", RedisStore),
        ("redis://", RedisStore),
        ("rediss://user:password@redis.example:6380/2", RedisStore),
        ("redis://localhost/?db=2&socket_keepalive=yes", RedisStore),
        ("unix:///run/redis.sock?db=1", RedisStore),
        ("unix://user:password@/run/redis.sock", RedisStore),
        ("mongodb://localhost", MongoDBStore),
        ("mongodb://user:p%40ss@a.example:27017,b.example/shop?replicaSet=x", MongoDBStore),
        ("mongodb+srv://user:password@cluster.example.net/shop", MongoDBStore),
    ],
)
def test_urls_of_every_kind_open_no_connection(url: str, kind: type) -> None:
    store, ours = open_store(url, StoreOptions())
    assert type(store) is kind
    assert ours
    assert "password" not in repr(store)
    store.close()


def test_a_relative_sqlite_path_is_in_the_instance_folder(tmp_path: Path) -> None:
    def path_of(url: str) -> Path:
        store, _ = open_store(url, StoreOptions(), str(tmp_path))
        assert isinstance(store, SQLiteStore)
        return store.path

    assert path_of("sqlite:///a/b.sqlite3") == tmp_path / "a" / "b.sqlite3"
    assert path_of("sqlite:////elsewhere/b.sqlite3") == Path("/elsewhere/b.sqlite3")
    assert path_of("sqlite:///with%20space.db") == tmp_path / "with space.db"


BAD_URLS = [
    "",
    " ",
    "redis",
    "localhost:6379",
    "localhost",
    "/run/redis.sock",
    "http://localhost",
    "postgresql://localhost",
    "redis:/localhost",
    "redis:localhost",
    " redis://localhost",
    "://localhost",
    "redis://localhost:port/0",
    "redis://localhost:99999/0",
    "redis://[::1/0",
    "redis://localhost/zero",
    "redis://localhost/0?db=zero",
    "redis://localhost/0?unknown_option=1",
    "redis://localhost/0?socket_timeout=soon",
    "unix://",
    "unix://?db=1",
    "unix:///run/redis.sock?unknown_option=1",
    "mongodb://",
    "mongodb:///shop",
    "mongodb://localhost:port",
    "mongodb://localhost:99999",
    "mongodb://[::1",
    "mongodb://localhost/?unknownOption=1",
    "mongodb://localhost/?timeoutMS=soon",
    "mongodb://localhost/sh op",
    "mongodb+srv://",
    "mongodb+srv://cluster.example.net:27017",
    "mongodb+srv://a.example.net,b.example.net",
    "sqlite:",
    "sqlite://",
    "sqlite:///",
    "sqlite:////",
    "sqlite:sessions.db",
    "sqlite:/sessions.db",
    "sqlite://host/sessions.db",
    "sqlite://[::1/sessions.db",
    "sqlite:///sessions.db?mode=ro",
    "sqlite:///sessions.db#a",
    "sqlite:///a%00b",
    "memory://somewhere",
    "memory:///",
]


def test_an_unknown_scheme_is_named() -> None:
    for scheme in ("http", "postgresql+psycopg", "foo"):
        with pytest.raises(SettingError, match=re.escape(f"the scheme '{scheme}'")):
            Session(an_app(SESSION_STORE=f"{scheme}://localhost"))
    with pytest.raises(SettingError, match="SESSION_STORE is no URL"):
        Session(an_app(SESSION_STORE="localhost:6379"))


@pytest.mark.parametrize(
    "url",
    [
        "redis://ada:love#lace@localhost",
        "mongodb://ada:love@lace@localhost",
    ],
)
def test_a_url_whose_password_is_not_encoded_gives_the_hint(url: str) -> None:
    with pytest.raises(SettingError, match="in a user or password are percent-encoded"):
        Session(an_app(SESSION_STORE=url))


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_bad_url_stops_the_app(url: str) -> None:
    app = an_app(SESSION_STORE=url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver's own, which not everybody turns into errors
        with pytest.raises(SettingError, match=r"^SESSION_STORE") as error:
            Session(app)
    assert len(url) < 12 or url not in str(error.value)
    assert "gsession" not in app.extensions or not app.extensions["gsession"]


@pytest.mark.parametrize(
    "url",
    [
        "redis://ada:{}@localhost:port/0",
        "redis://:{}@[::1/0",
        "redis://ada:{}@localhost/0?db=zero",
        "redis://ada:{}@host\u2100/0",  # urllib would show it in its complaint
        "sqlite://ada:{}@host\u2100/path",
        "redis://localhost/0?db=zero&password={}",
        "rediss://ada:{}@localhost:99999",
        "unix://ada:{}@?db=1",
        "mongodb://ada:{}@localhost:port",
        "mongodb://ada:{}@@localhost",
        "mongodb://ada:{}/x@localhost",
        "mongodb://ada:{}@localhost/?authMechanism=none",
        "mongodb+srv://ada:{}@cluster.example.net:27017",
        "sqlite://ada:{}@host/path",
        "memory://ada:{}@host",
        "postgresql://ada:{}@localhost",
        "ada:{}@localhost",
        "{}",
        "{}:secret",
        "//ada:{}@localhost",
    ],
)
def test_a_password_in_a_bad_url_is_never_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(SettingError) as error:
            Session(an_app(SESSION_STORE=url.format(PASSWORD)))
    assert PASSWORD not in "".join(traceback.format_exception(error.value))
    assert PASSWORD not in caplog.text
    assert not [warning for warning in warned if PASSWORD in str(warning.message)]


@pytest.mark.parametrize(
    "url",
    [
        f"redis://ada:{PASSWORD}@127.0.0.1:1/0",
        f"mongodb://ada:{PASSWORD}@127.0.0.1:1/shop",
        f"unix://ada:{PASSWORD}@/nowhere/redis.sock",
        "redis server that knows no such user",
        "mongodb server that knows no such user",
    ],
)
def test_a_password_is_never_shown_when_the_store_fails(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    if "server" in url:
        server = redis_server() if url.startswith("redis") else mongo_server()
        scheme, _, rest = server.url.partition("://")
        url = f"{scheme}://ada:{PASSWORD}@{rest.rpartition('@')[2]}"
    app = an_app()
    ext = Session(app, store=url, store_timeout=0.3)

    @app.get("/")
    def view() -> str:
        session["a"] = 1
        return "stored"

    response = app.test_client().get("/")
    assert response.status_code == 503
    assert PASSWORD not in response.get_data(as_text=True) + caplog.text
    assert "flask_gsession" in caplog.text
    assert PASSWORD not in repr(ext) + repr(app.extensions) + repr(ext.store(app))
    ext.close(app)


@pytest.mark.parametrize(
    "source",
    [7, b"redis://", Path("a"), object(), {"load": 1}, sys],
    ids=lambda source: getattr(source, "__name__", type(source).__name__),
)
def test_something_that_is_not_a_store_is_refused_by_its_type(source: Any) -> None:
    with pytest.raises(SettingError, match=f"SESSION_STORE is of type {type(source).__qualname__}"):
        Session(an_app(), store=source)


@pytest.mark.parametrize("source", [MemoryStore, Redis, MongoClient, type])
def test_a_class_is_not_a_store(source: Any) -> None:
    said = f"SESSION_STORE is the class {source.__qualname__}, not an object of it; allowed"
    with pytest.raises(SettingError, match=said):
        Session(an_app(), store=source)
    with pytest.raises(SettingError, match="SESSION_SPILL_STORE is the class"):
        Session(an_app(), store="memory://", spill_store=source)


@pytest.mark.parametrize("package", ["fakeredis._connection", "mongomock.mongo_client"])
def test_an_imitation_of_a_driver_is_refused(package: str) -> None:
    imitation: Any = type("FakeRedis", (Redis,), {"__module__": package})
    connection = type("FakeConnection", (), {"__module__": package})
    answers: Any = type("Any", (), {"__module__": package, "__getattr__": lambda *_: print})
    real = Redis()
    real.connection_pool.connection_class = connection  # type: ignore[assignment]
    for source in (imitation(), real, answers()):
        with pytest.raises(SettingError, match=r"is not supported: .* use memory://"):
            Session(an_app(), store=source)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///:memory:",
        "sqlite://:memory:",
        "sqlite:////:memory:",
        "sqlite:///file::memory:",
        "sqlite:///file::memory:?cache=shared",
        "sqlite:///x?mode=memory",
        "sqlite:///%3Amemory%3A",
        "SQLite:///:memory:",
        "sqlite://",
    ],
)
def test_sqlite_in_memory_is_refused(url: str, tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    with pytest.raises(SettingError, match="workers can't share: write memory://"):
        Session(app, store=url)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "url",
    ["file://large", "file://", "file://./large", "local://large", "dir::file://large", "file://~"],
)
def test_a_relative_place_of_large_values_is_refused(url: str) -> None:
    with pytest.raises(SettingError, match=r"relative path, .* absolute path, such as file:///var"):
        Session(an_app(), store="memory://", spill_store=url)


def test_other_objects_of_a_driver_are_not_stores() -> None:
    """PyMongo's objects have every attribute, so they seem to have the verbs of a store."""
    with MongoClient(connect=False) as client:
        for source in (client["shop"], client["shop"]["sessions"], AsyncRedis()):
            with pytest.raises(SettingError, match=f"of type {type(source).__name__}; allowed"):
                Session(an_app(), store=source)
    with pytest.raises(SettingError, match="of type AsyncMongoClient; allowed"):
        Session(an_app(), store=AsyncMongoClient(connect=False))


def test_an_object_with_all_verbs_but_one_is_not_a_store() -> None:
    store = MemoryStore()

    class NearlyAStore:
        create, load, save, renew, replace, close = (
            store.create,
            store.load,
            store.save,
            store.renew,
            store.replace,
            store.close,
        )

    with pytest.raises(SettingError, match="NearlyAStore"):
        Session(an_app(), store=NearlyAStore())
    NearlyAStore.delete = store.delete  # type: ignore[attr-defined]
    Session(an_app(), store=NearlyAStore())


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("redis", "pymongo", "bson", "cryptography"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())

from flask import Flask, session
from flask_gsession import Session, SettingError

def attempt(**settings):
    app = Flask("app", instance_path=sys.argv[1])
    app.secret_key = "a key for tests"
    Session(app, **settings)
    app.add_url_rule("/", view_func=lambda: session.setdefault("user", "ada"))
    return app.test_client().get("/").get_data(as_text=True)

for settings in (
    dict(store="redis://localhost"),
    dict(store="rediss://ada:geheim@localhost"),
    dict(store="unix:///run/redis.sock"),
    dict(store="mongodb://localhost"),
    dict(store="mongodb+srv://ada:geheim@cluster.example.net"),
    dict(store="memory://", encryption_keys=[b"k" * 32]),
    dict(store="memory://"),
    dict(),
):
    try:
        print(attempt(**settings))
    except SettingError as error:
        print(error)
"""


def test_a_missing_driver_is_named_with_its_extra(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, tmp_path],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = run.stdout.splitlines()
    for line, scheme in zip(lines[:3], ("redis", "rediss", "unix"), strict=True):
        assert line == (
            f"SESSION_STORE is a {scheme} URL, and its driver is not installed (redis): "
            "install the redis extra, flask-gsession[redis]"
        )
    for line in lines[3:5]:
        assert line.startswith("SESSION_STORE is a mongodb")
        assert line.endswith("install the mongodb extra, flask-gsession[mongodb]")
    assert lines[5].startswith("SESSION_ENCRYPTION_KEYS")
    assert lines[5].endswith("install the encryption extra, flask-gsession[encryption]")
    assert lines[6:] == ["ada", "ada"]
    assert "geheim" not in run.stdout + run.stderr


# Keys that are not ours, or nearly -----------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("SESSION_IDLE_TIMOUT", "did you mean SESSION_IDLE_TIMEOUT?"),
        ("SESSION_STORES", "did you mean SESSION_STORE?"),
        ("SESSION_TIMEOUT", "did you mean SESSION_IDLE_TIMEOUT or SESSION_LOCK_TIMEOUT?"),
        ("SESSION_ENCRYPTION_KEY", "did you mean SESSION_ENCRYPTION_KEYS?"),
        ("SESSION_COOKIE_SAMSITE", "did you mean SESSION_COOKIE_SAMESITE?"),
        ("PERMANENT_SESSION_LIFETIM", "did you mean PERMANENT_SESSION_LIFETIME?"),
        ("SESSION_REDIS", "Flask-Session setting, here use SESSION_STORE"),
        ("SESSION_MONGODB", "Flask-Session setting, here use SESSION_STORE"),
        ("SESSION_MONGODB_DB", "Flask-Session setting, here use the database in the URL"),
        ("SESSION_FILE_DIR", "Flask-Session setting, here use SESSION_STORE"),
        ("SESSION_USE_SIGNER", "Flask-Session setting, here use nothing"),
    ],
)
def test_an_unknown_key_that_looks_like_a_known_one_is_warned_about(key: str, hint: str) -> None:
    app = an_app(**{key: PASSWORD})
    with pytest.warns(UserWarning, match=f"^Unknown setting {key};") as warned:
        Session(app)
    assert len(warned) == 1
    message = str(warned[0].message)
    assert hint in message
    assert PASSWORD not in message
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    "key",
    [
        "SESSION_PROTECTION",  # Flask-Login
        *("SESSION_DB_PATH", "SESSION_SKIP_PATHS", "SESSION_DIGEST_METHOD"),  # pgAdmin
        "SESSION_EXPIRATION_TIME",
        *("SESSION_KEY_BITS", "SESSION_RANDOM_SOURCE", "SESSION_SET_TTL"),  # Flask-KVSession
        "SESSION_SERVER_SIDE",  # Superset
        *("SESSION_ENGINE", "SESSION_SECRET", "SESSION_LIFETIME"),
    ],
)
def test_a_setting_of_another_extension_is_not_reported_as_misspelt(key: str) -> None:
    Session(an_app(**{key: "strong"}))


PLACES = {
    "SESSION_REDIS": object(),
    "SESSION_MONGODB": object(),
    "SESSION_MEMCACHED": object(),
    "SESSION_SQLALCHEMY": object(),
    "SESSION_DYNAMODB": object(),
    "SESSION_CACHELIB": object(),
    "SESSION_FILE_DIR": "/srv/my-sessions",
}


@pytest.mark.parametrize("key", PLACES)
def test_a_store_of_flask_session_is_not_exchanged_for_a_file(key: str, tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update({"SECRET_KEY": "a key", key: PLACES[key]})
    for settings in ({}, {"store": None}):
        with pytest.raises(SettingError, match=f"^{key} is .* Set SESSION_STORE to ") as error:
            Session(app, **settings)
        assert str(PLACES[key]) not in str(error.value).removeprefix(key)[:100]
    assert not app.extensions.get("gsession")
    with pytest.warns(UserWarning, match=f"^Unknown setting {key};"):
        Session(app, store="memory://")


def test_a_store_of_flask_session_that_is_none_is_not_set(tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(dict.fromkeys(PLACES), SECRET_KEY="a key")
    with pytest.warns(UserWarning, match="^Unknown setting SESSION_"):
        Session(app)


def test_every_warning_is_in_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    """A running server shows its log, and not always the warnings of Python."""
    config: dict[str, Any] = {
        "SESSION_IDLE_TIMOUT": 1,
        "SESSION_COOKIE_SAMESITE": "None",
        "PERMANENT_SESSION_LIFETIME": 3600,
        "SESSION_ABSOLUTE_TIMEOUT": 60,
        "SESSION_LOGOUT_REPLICAS": 1,
    }
    with pytest.warns(UserWarning, match="SESSION_") as warned:
        Session(an_app(**config))
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 4
    records = [each for each in caplog.records if each.name == "flask_gsession"]
    assert [(each.levelname, each.message) for each in records] == [
        ("WARNING", message) for message in messages
    ]
    assert {warning.filename for warning in warned} == {__file__}


def test_a_warning_without_a_log_is_printed_once() -> None:
    """As in a command: Python itself prints messages without a handler."""
    code = (
        "from flask import Flask; from flask_gsession import Session; app = Flask('a'); "
        "app.secret_key = 'a'; app.config['REMEMBER_COOKIE_DURATION'] = 10**9; "
        "Session(app, store='memory://')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr.count("REMEMBER_COOKIE_DURATION is") == 1, said.stderr


@pytest.mark.parametrize("key", [None, "", b""])
def test_a_missing_secret_key_is_in_the_log(key: Any, caplog: pytest.LogCaptureFixture) -> None:
    app = an_app(SECRET_KEY=key)
    Session(app)
    Session(app, cookie_name="second")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flask_gsession", "WARNING")
    assert "has no SECRET_KEY" in record.message
    caplog.clear()

    app.add_url_rule("/", view_func=lambda: "hello")
    for _ in range(3):
        assert app.test_client().get("/").text == "hello"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "has no SECRET_KEY" in record.message


def test_type_checkers_know_every_keyword() -> None:
    assert set(SettingKeywords.__annotations__) == set(CHECKS)


def test_a_message_mentions_that_none_is_allowed() -> None:
    with pytest.raises(SettingError, match=r"0 to 3600 seconds, or None$"):
        Session(an_app(SESSION_LOCK_WARN="x"))


def test_other_keys_are_nobodys_business() -> None:
    Session(an_app(SESSION_OF_PARLIAMENT=1, SESSIONS=2, STORE=3, SESSION=4))


def test_flasks_own_keys_are_known() -> None:
    Session(
        an_app(
            SESSION_COOKIE_DOMAIN="example.com",
            SESSION_COOKIE_PATH="/shop",
            SESSION_COOKIE_HTTPONLY=True,
            SESSION_COOKIE_SECURE=True,
            SESSION_COOKIE_PARTITIONED=True,
            SESSION_COOKIE_SAMESITE="None",
            SESSION_REFRESH_EACH_REQUEST=False,
        )
    )


# Cookies -------------------------------------------------------------------------------------


NO_FLAG = ["no", "", 1, 0, None, []]
WRONG_ATTRIBUTES: dict[str, list[Any]] = {
    "SESSION_COOKIE_SECURE": NO_FLAG,
    "SESSION_COOKIE_HTTPONLY": NO_FLAG,
    "SESSION_COOKIE_PARTITIONED": NO_FLAG,
    "SESSION_COOKIE_DOMAIN": [7, True, b"a.example", ["a.example"], "a;b", "a\r\nX: y", "a b", "/"],
    "SESSION_COOKIE_PATH": [7, True, b"/shop", ["/shop"], "shop"],
}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"SESSION_COOKIE_NAME": "__Host-session"}, "SESSION_COOKIE_SECURE"),
        ({"SESSION_COOKIE_NAME": "__Secure-session"}, "SESSION_COOKIE_SECURE"),
        ({"SESSION_COOKIE_NAME": "__host-session"}, "SESSION_COOKIE_SECURE"),
        ({"SESSION_COOKIE_NAME": "__Http-session"}, "SESSION_COOKIE_SECURE"),
        ({"SESSION_COOKIE_NAME": "__Host-Http-session"}, "SESSION_COOKIE_SECURE"),
        *(
            (
                {
                    "SESSION_COOKIE_NAME": name,
                    "SESSION_COOKIE_SECURE": True,
                    "SESSION_COOKIE_HTTPONLY": False,
                },
                "SESSION_COOKIE_HTTPONLY",
            )
            for name in ("__Http-session", "__Host-Http-session", "__host-HTTP-session")
        ),
        (
            {
                "SESSION_COOKIE_NAME": "__Host-Http-session",
                "SESSION_COOKIE_SECURE": True,
                "SESSION_COOKIE_PATH": "/shop",
            },
            "path",
        ),
        (
            {
                "SESSION_COOKIE_NAME": "__Host-session",
                "SESSION_COOKIE_SECURE": True,
                "SESSION_COOKIE_DOMAIN": "example.com",
            },
            "SESSION_COOKIE_DOMAIN",
        ),
        (
            {
                "SESSION_COOKIE_NAME": "__Host-session",
                "SESSION_COOKIE_SECURE": True,
                "SESSION_COOKIE_PATH": "/shop",
            },
            "path",
        ),
        (
            {
                "SESSION_COOKIE_NAME": "__Host-session",
                "SESSION_COOKIE_SECURE": True,
                "APPLICATION_ROOT": "/shop",
            },
            "path",
        ),
        ({"SESSION_COOKIE_SAMESITE": "strickt"}, "SESSION_COOKIE_SAMESITE is 'strickt'; allowed"),
        ({"SESSION_COOKIE_SAMESITE": ""}, "SESSION_COOKIE_SAMESITE is ''; allowed"),
        ({"SESSION_COOKIE_SAMESITE": True}, "SESSION_COOKIE_SAMESITE is True; allowed"),
        ({"SESSION_COOKIE_SAMESITE": False}, "SESSION_COOKIE_SAMESITE is False; allowed"),
        ({"SESSION_COOKIE_SAMESITE": 1}, "SESSION_COOKIE_SAMESITE is 1; allowed"),
        *(
            ({key: value}, f"{key} is {re.escape(repr(value))}; allowed")
            for key, values in WRONG_ATTRIBUTES.items()
            for value in values
        ),
    ],
)
def test_cookie_attributes_that_no_browser_takes_are_refused(
    config: dict[str, Any], named: str
) -> None:
    with pytest.raises(SettingError, match=named):
        Session(an_app(**config))


@pytest.mark.parametrize(
    "config",
    [
        {"SESSION_COOKIE_NAME": "__Host-session", "SESSION_COOKIE_SECURE": True},
        {
            "SESSION_COOKIE_NAME": "__Host-session",
            "SESSION_COOKIE_SECURE": True,
            "SESSION_COOKIE_PATH": "/",
            "APPLICATION_ROOT": "/shop",
        },
        {
            "SESSION_COOKIE_NAME": "__Secure-session",
            "SESSION_COOKIE_SECURE": True,
            "SESSION_COOKIE_DOMAIN": "example.com",
            "SESSION_COOKIE_PATH": "/shop",
        },
        {
            "SESSION_COOKIE_NAME": "__Http-session",
            "SESSION_COOKIE_SECURE": True,
            "SESSION_COOKIE_DOMAIN": "example.com",
            "SESSION_COOKIE_PATH": "/shop",
        },
        {"SESSION_COOKIE_NAME": "__Host-Http-session", "SESSION_COOKIE_SECURE": True},
        {
            "SESSION_COOKIE_NAME": "__Host-session",
            "SESSION_COOKIE_SECURE": True,
            "SESSION_COOKIE_HTTPONLY": False,
        },
        {"SESSION_COOKIE_DOMAIN": None, "SESSION_COOKIE_PATH": None},
        {"SESSION_COOKIE_DOMAIN": "", "SESSION_COOKIE_PATH": ""},
        {"SESSION_COOKIE_DOMAIN": False},
        {"SESSION_COOKIE_DOMAIN": ".example.com", "SESSION_COOKIE_PATH": "/"},
        {"SESSION_COOKIE_DOMAIN": "m\u00fcller.example"},
        {"SESSION_COOKIE_DOMAIN": "localhost:5000"},
        {"SESSION_COOKIE_HTTPONLY": False},
        {"SESSION_COOKIE_SAMESITE": None},
        {"SESSION_COOKIE_SAMESITE": "Strict"},
        {"SESSION_COOKIE_SAMESITE": "lax"},
        {"SESSION_COOKIE_SAMESITE": "None", "SESSION_COOKIE_SECURE": True},
        {"SESSION_COOKIE_PARTITIONED": True, "SESSION_COOKIE_SECURE": True},
    ],
)
def test_cookie_attributes_that_go_together_are_taken(config: dict[str, Any]) -> None:
    app = an_app(**config)
    Session(app)
    app.add_url_rule("/", view_func=lambda: session.setdefault("user", "ada"))
    assert "session=" in app.test_client().get("/").headers["Set-Cookie"]


@pytest.mark.parametrize(
    "config", [{"SESSION_COOKIE_SAMESITE": "None"}, {"SESSION_COOKIE_PARTITIONED": True}]
)
def test_cookies_that_browsers_drop_without_https_are_warned_about(config: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="SESSION_COOKIE_SECURE = True") as warned:
        Session(an_app(**config))
    assert len(warned) == 1
    assert warned[0].filename == __file__


# SECRET_KEY and SECRET_KEY_FALLBACKS ---------------------------------------------------------

WRONG_KEYS = [4711, True, ["geheim"], {"geheim": 1}, 47.11, "geheim\udcff"]


@pytest.mark.parametrize("key", WRONG_KEYS, ids=lambda key: type(key).__name__)
def test_keys_that_cannot_sign_stop_the_app(key: Any) -> None:
    for config, named in (
        ({"SECRET_KEY": key}, "^SECRET_KEY "),
        ({"SECRET_KEY_FALLBACKS": ["older", key]}, "of SECRET_KEY_FALLBACKS "),
    ):
        with pytest.raises(SettingError, match=named) as error:
            Session(an_app(**config))
        assert not any(part in str(error.value) for part in ("geheim", "47", "older"))


@pytest.mark.parametrize("key", [None, "", b""])
def test_a_key_may_come_later(key: Any) -> None:
    Session(an_app(SECRET_KEY=key))


def test_empty_fallback_keys_are_ignored() -> None:
    """As `[os.environ.get("OLD_KEY")]` gives them where there was never an old key."""
    app = an_app(SECRET_KEY_FALLBACKS=[None, "", b""])
    ext = Session(app)

    @app.get("/")
    def view() -> dict[str, Any]:
        return dict(session)

    ext.store(app).load = None  # type: ignore[assignment]  # a look into the store would fail
    client = app.test_client()
    for key in ("", b""):
        client.set_cookie("session", TokenSigner([key], "session").sign(new_token()))
        assert client.get("/").get_json() == {}


@pytest.mark.parametrize("fallbacks", ["older", b"older", 7])
def test_fallback_keys_are_a_list(fallbacks: Any) -> None:
    """A text would be taken apart into keys of one character, which anybody can guess."""
    with pytest.raises(SettingError, match="SECRET_KEY_FALLBACKS") as error:
        Session(an_app(SECRET_KEY_FALLBACKS=fallbacks))
    assert "older" not in str(error.value)
