"""The storages of rate limits: each strategy on each, with servers in all conditions."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request, session
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage, RedisStorage, Storage
from pymongo import MongoClient
from redis import Redis
from redis.exceptions import RedisClusterException

from flask_gsession import Session, SettingError, StoreUnavailable
from flask_gsession.contrib.metrics import SessionMetrics
from flask_gsession.contrib.ratelimit import SessionLimits, session_limit
from flask_gsession.contrib.ratelimit_storages import Backend, storage_of
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.wrappers import Wrapper
from tests.harness.servers import free_port
from tests.harness.topologies import MongoAuthTLS, RedisACL, RedisCluster, until

pytest_plugins = ["tests.harness.topologies"]

STRATEGIES = ("moving-window", "fixed-window", "sliding-window-counter")
HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
REDIS_PAGE = (HOW_TO / "redis.md").read_text(encoding="utf-8")
MONGODB_PAGE = (HOW_TO / "mongodb.md").read_text(encoding="utf-8")
HOUR = 3600
Maker = Callable[..., Flask]


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> str:
    """Each strategy in turn."""
    return str(request.param)


@pytest.fixture(params=["memory", "redis", "mongodb"])
def backend(request: pytest.FixtureRequest, strategy: str, store_prefix: str) -> Iterator[Backend]:
    """Each strategy on the server of each store."""
    if request.param == "memory":
        yield Backend(MemoryStorage(), strategy)
        return
    url = request.getfixturevalue(f"{request.param}_url")
    store, _ = open_store(url, StoreOptions(prefix=store_prefix, timeout=10))
    yield Backend(storage_of(store, store_prefix), strategy)
    store.close()


def ten() -> RateLimitItem:
    """Ten in an hour."""
    return parse("10/hour")


def left(backend: Backend) -> int:
    """The rest of the limit for `ada`."""
    return backend.look(ten(), "ada")[1]


def test_a_hit_can_be_undone(backend: Backend) -> None:
    assert backend.can_undo()
    for cost in (1, 3):
        assert backend.hit(ten(), "ada", 4)
        assert backend.hit(ten(), "ada", cost)
        backend.undo(ten(), "ada", cost)
        assert left(backend) == 6
        backend.undo(ten(), "ada", 4)
        assert left(backend) == 10
        wait, _ = backend.look(ten(), "ada")
        assert 0 <= wait <= HOUR
    backend.undo(ten(), "ada", 1)  # there is nothing any more: and no more than ten are left
    backend.undo(ten(), "nobody", 1)
    assert [backend.hit(ten(), "ada", 5) for _ in range(3)] == [True, True, False]
    assert backend.hit(ten(), "nobody", 10)


def test_refused_hits_are_not_counted(backend: Backend) -> None:
    assert backend.hit(ten(), "ada", 8)
    for _ in range(3):
        assert not backend.hit(ten(), "ada", 5)
    assert left(backend) == 2
    assert backend.hit(ten(), "ada", 2)
    assert not backend.hit(ten(), "ada", 11)


def test_first_requests_at_the_same_time(backend: Backend) -> None:
    for number in range(10):
        together = threading.Barrier(6)

        def hit(_: int, name: str = f"client{number}", gate: Any = together) -> bool:
            gate.wait()
            return backend.hit(ten(), name, 1)

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(hit, range(6))) == [True] * 6


# -- applications


@pytest.fixture
def make_app(store_prefix: str) -> Iterator[Maker]:
    """Makes applications with a limit of three, `/`, of which `/failures` counts failures only."""
    made: list[tuple[Session, Flask]] = []

    def make(store: object = "memory://", limit: str = "3/hour", **options: Any) -> Flask:
        app = Flask(__name__)
        app.secret_key = "a key for tests"
        app.config["SESSION_BREAKER_FAILURES"] = options.pop("breaker", 0)
        app.config["SESSION_BREAKER_PAUSE"] = 0.02
        app.config["SESSION_JOURNAL"] = options.pop("journal", False)
        ext = Session(app, store=store, key_prefix=store_prefix)
        made.append((ext, app))
        SessionLimits(app, **{"proxies": 0, "creation": None, **options})

        @app.get("/")
        @session_limit(limit)
        def page() -> str:
            return ""

        @app.get("/failures")
        @session_limit(limit, deduct_when=lambda response: "fail" in request.args)
        def failures() -> str:
            return ""

        @app.get("/visit")
        def visit() -> str:
            session["visits"] = session.get("visits", 0) + 1
            return ""

        return app

    yield make
    for ext, app in made:
        ext.close(app)


def statuses(app: Flask, path: str = "/", times: int = 5) -> list[int]:
    """The statuses of so many requests."""
    return [app.test_client().get(path).status_code for _ in range(times)]


def counts(app: Flask) -> None:
    """Check that limits work, and that only failures count where it is said so."""
    assert statuses(app) == [200, 200, 200, 429, 429]
    assert statuses(app, "/failures") == [200] * 5
    assert statuses(app, "/failures?fail") == [200, 200, 200, 429, 429]


class Silent(MemoryStorage):
    """Counts, but doesn't return the counts."""

    base_exceptions = OSError

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        raise OSError("connection reset")


def test_a_store_with_a_journal_or_a_wrapper_counts(
    make_app: Maker, store_url: str, store_prefix: str
) -> None:
    inner, _ = open_store(store_url, StoreOptions(prefix=store_prefix))
    alone = (
        pytest.warns(UserWarning, match="in each process")
        if store_url.startswith("sqlite")
        else nullcontext()
    )
    with alone:
        app = make_app(Wrapper(inner), journal=True)
    counts(app)
    if store_url.startswith(("redis", "mongodb")):  # the counts are on the server
        assert statuses(make_app(store_url)) == [429] * 5
    inner.close()


@pytest.mark.parametrize("reset", [float("inf"), float("nan"), 1e300, -1e300])
def test_a_storage_that_does_not_know_when(
    make_app: Maker, monkeypatch: pytest.MonkeyPatch, reset: float
) -> None:
    app = make_app(storage=Silent())
    assert statuses(app) == [200, 200, 200, 429, 429]
    answer = app.test_client().get("/")
    assert int(answer.headers["Retry-After"]) == HOUR  # at the latest
    monkeypatch.setattr(Silent, "get_moving_window", lambda *_: (reset, 3))
    answer = app.test_client().get("/")
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["Retry-After"]) <= HOUR


class Foreign(Storage):
    """A storage of somebody else's, which knows fixed windows only."""

    STORAGE_SCHEME = None
    base_exceptions = OSError

    def __init__(self) -> None:
        super().__init__()
        self._counts = MemoryStorage()

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        return self._counts.incr(key, expiry, amount)

    def get(self, key: str) -> int:
        return self._counts.get(key)

    def get_expiry(self, key: str) -> float:
        return self._counts.get_expiry(key)

    def check(self) -> bool:
        return True

    def reset(self) -> None:
        self._counts.reset()

    def clear(self, key: str) -> None:
        self._counts.clear(key)


def test_a_third_party_storage(make_app: Maker, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SettingError, match="A Foreign doesn't support 'moving-window'"):
        make_app(storage=Foreign())
    app = make_app(storage=Foreign(), strategy="fixed-window")
    assert statuses(app) == [200, 200, 200, 429, 429]
    assert statuses(app, "/failures", 1) == [500]
    assert "deduct_when needs a storage that can undo a count" in caplog.text


# -- MongoDB


def options_of(url: str, options: str) -> str:
    """The URL with further options."""
    return f"{url}{'&' if '?' in url else '?'}{options}"


@pytest.mark.parametrize(
    "options", ["w=0", "w=3", "readPreference=secondaryPreferred&readConcernLevel=majority"]
)
def test_the_limits_leave_the_clients_settings_alone(
    make_app: Maker,
    mongodb_url: str,
    mongo_client: MongoClient[dict[str, Any]],
    strategy: str,
    options: str,
) -> None:
    url = options_of(mongodb_url, options)
    counts(make_app(url, strategy=strategy))
    mongo_client.drop_database(mongodb_url.partition("?")[0].rpartition("/")[2])
    with MongoClient[dict[str, Any]](url, tz_aware=True, timeoutMS=10_000) as client:
        counts(make_app(client, strategy=strategy))


def test_a_mongodb_of_the_limits_own(make_app: Maker, mongodb_url: str, strategy: str) -> None:
    counts(make_app(storage=options_of(mongodb_url, "w=0"), strategy=strategy))


@pytest.mark.parametrize("index", [{}, {"expireAfterSeconds": 5}, {"expireAfterSeconds": 0}])
def test_an_index_that_is_there(
    make_app: Maker,
    mongodb_url: str,
    mongo_client: MongoClient[dict[str, Any]],
    strategy: str,
    index: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = mongo_client[mongodb_url.partition("?")[0].rpartition("/")[2]]
    used = {"fixed-window": "gsession_limit_counters"}.get(strategy, "gsession_limits")
    database[used].create_index("expireAt", name="by hand", **index)
    counts(make_app(mongodb_url, strategy=strategy))
    warned = [text for text in caplog.messages if "TTL index of the rate limits" in text]
    assert len(warned) == (not index)
    if warned:  # the advice works
        drop, create = warned[0].partition("run: ")[2].split("; ")
        assert drop == f"db.{used}.dropIndex('by hand')"
        assert create == f"db.{used}.createIndex({{expireAt: 1}}, {{expireAfterSeconds: 0}})"
        database[used].drop_index("by hand")
        database[used].create_index("expireAt", expireAfterSeconds=0)
        caplog.clear()
        make_app(mongodb_url, strategy=strategy).test_client().get("/")
        assert "TTL index" not in caplog.text


def test_a_window_that_has_expired(
    make_app: Maker, mongodb_url: str, mongo_client: MongoClient[dict[str, Any]]
) -> None:
    """It lies there until MongoDB removes it, which takes a minute or so."""
    app = make_app(mongodb_url)
    assert statuses(app, times=3) == [200] * 3
    database = mongo_client[mongodb_url.partition("?")[0].rpartition("/")[2]]
    for window in database["gsession_limits"].find():
        old = [entry - 2 * HOUR for entry in window["entries"]]
        database["gsession_limits"].update_one({"_id": window["_id"]}, {"$set": {"entries": old}})
    limits = app.extensions["gsession-limits"]
    names = [each["_id"].split("/") for each in database["gsession_limits"].find()]
    for _, kind, key, *_ in names:
        assert limits.backend.look(parse("3/hour"), f"{kind}/{key}")[1] == 3
    assert statuses(app) == [200, 200, 200, 429, 429]


# -- users of the least rights


def test_the_published_rights_on_redis(
    make_app: Maker, redis_acl: RedisACL, store_prefix: str, strategy: str
) -> None:
    sessions = re.search(r"^ACL SETUSER shop on >password (.+)$", REDIS_PAGE, re.MULTILINE)
    further = re.search(rf"`{strategy}`: `(\+[^`]+)`", REDIS_PAGE)
    assert sessions is not None
    assert further is not None
    rights = f"{sessions[1]} {further[1]}".replace("~gsession:*", f"~{store_prefix}*")
    redis_acl.allow(rights)
    with Redis.from_url(redis_acl.admin_url) as admin:
        admin.script_flush()
    redis_acl.denied()
    app = make_app(redis_acl.url, strategy=strategy)
    counts(app)
    assert app.test_client().get("/visit").status_code == 200
    if strategy == "sliding-window-counter":
        limits, short = app.extensions["gsession-limits"], parse("2/second")
        until(lambda: not limits.backend.hit(short, "ada", 1), "a full window")
        until(lambda: limits.backend.hit(short, "ada", 1), "the next window")
    assert set(redis_acl.denied()) <= {"command: client|setinfo", "command: client"}


@pytest.mark.parametrize("word", ["+script|load", "+lindex", "+lpush", "+ltrim", "+expire"])
def test_each_published_right_is_needed(
    make_app: Maker, redis_acl: RedisACL, store_prefix: str, word: str
) -> None:
    words = "+evalsha +eval +script|load +lindex +lpush +ltrim +expire".replace(word, "")
    redis_acl.allow(f"~{store_prefix}* {words}")
    with Redis.from_url(redis_acl.admin_url) as admin:
        admin.script_flush()
    app = make_app(redis_acl.url, strategy="moving-window")
    assert 503 in statuses(app)


def test_the_published_rights_on_mongodb(
    make_app: Maker,
    mongo_auth_tls: MongoAuthTLS,
    strategy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    actions = re.search(r"actions: \[(.+?)\]", MONGODB_PAGE)
    collections = re.search(r"privileges: \[(.+?)\]", MONGODB_PAGE, re.DOTALL)
    assert actions is not None
    assert collections is not None
    named = re.findall(r'"(\w+)"', collections[1])
    url = mongo_auth_tls.url_of_rights(re.findall(r'"(\w+)"', actions[1]), *named)
    app = make_app(url, strategy=strategy)
    counts(app)
    assert app.test_client().get("/visit").status_code == 200
    assert "refused to create" not in caplog.text


def test_limits_count_without_the_right_to_make_an_index(
    make_app: Maker, mongo_auth_tls: MongoAuthTLS, caplog: pytest.LogCaptureFixture
) -> None:
    rights = ["find", "insert", "update", "remove"]
    named = ("gsession", "gsession_limits")
    counts(make_app(mongo_auth_tls.url_of_rights(rights, *named)))
    assert "(code 13), so old counts are not removed. Have an administrator run: db." in caplog.text


# -- a Redis Cluster


def test_a_cluster(make_app: Maker, redis_cluster: RedisCluster, strategy: str) -> None:
    counts(make_app(storage=redis_cluster.url, strategy=strategy))


def test_a_cluster_that_is_down(make_app: Maker) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()}"
    app = make_app(storage=url)
    answer = app.test_client().get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert statuses(app, "/failures", 1) == [503]
    counts(make_app(storage=url, on_storage_error="local"))


def test_a_cluster_that_loses_its_nodes(make_app: Maker, redis_url: str) -> None:
    """The driver raises an error then that doesn't derive from its base class."""
    storage = RedisStorage(redis_url)

    def fail(*_: object) -> None:
        raise RedisClusterException("no node can be reached")

    storage.lua_acquire_moving_window = fail  # type: ignore[assignment]
    assert statuses(make_app(storage=storage), times=1) == [503]
    local = make_app(storage=storage, on_storage_error="local")
    assert statuses(local) == [200, 200, 200, 429, 429]
    storage = RedisStorage(f"redis://127.0.0.1:{free_port()}", wrap_exceptions=True)
    assert statuses(make_app(storage=storage), times=1) == [503]


# -- metrics


def test_the_circuit_of_the_limits_closes_without_a_request(
    make_app: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.contrib.metrics_watch._INTERVAL", 0.02)

    class Slow(MemoryStorage):
        base_exceptions = OSError
        fails = True

        def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
            self.fail()
            return super().acquire_entry(key, limit, expiry, amount)

        def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
            self.fail()
            return super().get_moving_window(key, limit, expiry)

        def fail(self) -> None:
            if self.fails:
                threading.Event().wait(0.06)
                raise OSError("frozen")

    storage = Slow()
    app = make_app(storage=storage, breaker=1)
    SessionMetrics(app)

    def is_open() -> bool:
        page = app.test_client().get("/metrics").text
        return 'gsession_circuits_open{operations="rate limits"} 1.0' in page

    assert statuses(app, times=1) == [503]
    assert is_open()
    storage.fails = False
    until(lambda: not is_open(), "the recovery")
    assert statuses(app) == [200, 200, 200, 429, 429]


def test_an_outage_is_an_outage(make_app: Maker) -> None:
    backend = Backend(Silent(), "moving-window")
    with pytest.raises(StoreUnavailable, match="rate limits: OSError: connection reset"):
        backend.look(ten(), "ada")
