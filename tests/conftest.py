"""Fixtures shared by every test: servers, a store of the test's own, a clock to move by hand."""

import gc
import secrets
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from pymongo import MongoClient
from pymongo.database import Database
from redis import Redis

from flask_gsession.config import Settings
from flask_gsession.stores import StoreOptions
from flask_gsession.testing import FakeClock
from tests.harness.apps import PATIENCE, Site, SiteMaker
from tests.harness.servers import (
    MongoServer,
    OldestRedisServer,
    RedisServer,
    mongo_server,
    redis_server,
    with_database,
)

# Deadlines in milliseconds mean nothing while a real server answers, and neither does the time that
# a busy machine takes to draw an example.
settings.register_profile(
    "gsession", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gsession")

# Collecting thousands of tests fills the memory, but creates no garbage.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Versions 5 of redis-py, as in `make oldest`, don't close a socket that can't connect."""
    if int(redis.__version__.partition(".")[0]) < 6:
        config.addinivalue_line("filterwarnings", "ignore:Exception ignored in. <socket.socket")


def pytest_collection_finish() -> None:
    """Take the collected tests out of the garbage collector's sight."""
    gc.freeze()
    gc.enable()


PATIENT_WAITER = 50_000  # milliseconds
COLLECTIONS = ("gsession", "gsession_blobs")  # of a store in MongoDB
USED_DATABASES = 4  # the tests between two uses of one, so that a late write does no harm
SHIPPED = {kind: kind.__init__.__defaults__ for kind in (Settings, StoreOptions)}


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """A store call may take long, unless a test says how long: a busy machine is no outage."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((Settings, "store_timeout"), (StoreOptions, "timeout")):
            values: list[Any] = list(SHIPPED[kind] or ())
            values[[field.name for field in fields(kind)].index(name)] = PATIENCE
            patch.setattr(kind.__init__, "__defaults__", tuple(values))
        yield


@pytest.fixture
def shipped_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the defaults of the package."""
    for kind, values in SHIPPED.items():
        monkeypatch.setattr(kind.__init__, "__defaults__", values)


@pytest.fixture
def patient_waiters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep waiters in the queue of a lock on a slow machine: Redis uses its own clock."""
    for module in ("lease", "redis.leases", "mongodb.leases"):
        monkeypatch.setattr(f"flask_gsession.stores.{module}.WAITER_LIFE", PATIENT_WAITER)


@pytest.fixture
def chromium(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Any:
    """A headless Chromium of this machine. Without one the test is skipped, loudly."""
    from tests.harness.browser import MISSING, PROGRAM

    if PROGRAM is None:
        with capfd.disabled():
            print(f"\nWARNING: {MISSING}", file=sys.stderr)
        pytest.skip(MISSING)
    return request.getfixturevalue("one_chromium")


@pytest.fixture(scope="module")
def one_chromium() -> Iterator[Any]:
    from tests.harness.browser import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def clock() -> FakeClock:
    """A clock that only moves when the test calls `advance(seconds)`."""
    return FakeClock()


@pytest.fixture
def store_prefix() -> str:
    """A key prefix that no other test uses."""
    return f"test-{secrets.token_hex(6)}:"


@pytest.fixture(params=["memory", "sqlite", "redis", "mongodb"])
def store_url(request: pytest.FixtureRequest) -> str:
    """A `SESSION_STORE` URL of each kind in turn; on Redis to be used with `store_prefix`."""
    if request.param == "memory":
        return "memory://"
    kind = {"mongodb": "emptied_mongodb"}.get(request.param, request.param)
    url: str = request.getfixturevalue(f"{kind}_url")
    return url


@pytest.fixture
def make_site(store_url: str, store_prefix: str, clock: FakeClock) -> Iterator[SiteMaker]:
    """Makes applications with sessions on each store in turn; `make_site(**settings)`."""
    with SiteMaker(store_url, store_prefix, clock) as make:
        yield make


@pytest.fixture
def site(make_site: SiteMaker) -> Site:
    """An application with sessions on each store in turn."""
    return make_site()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path}/sessions.sqlite3"


@pytest.fixture
def redis_url(redis_client: Redis, store_prefix: str) -> Iterator[str]:
    """The Redis server; keys under `store_prefix` are deleted afterwards."""
    yield redis_server().url
    for key in redis_client.scan_iter(f"{store_prefix}*", count=1000):
        redis_client.unlink(key)


@pytest.fixture
def mongodb_url(mongo_client: "MongoClient[dict[str, Any]]") -> Iterator[str]:
    """A MongoDB database of the test's own, dropped afterwards."""
    database = f"test_{secrets.token_hex(6)}"
    yield with_database(mongo_server().url, database)
    mongo_client.drop_database(database)


@pytest.fixture
def emptied_mongodb_url(
    mongo_client: "MongoClient[dict[str, Any]]", used_databases: deque[str]
) -> Iterator[str]:
    """A MongoDB database for this test alone: empty, except for collections that a store created.

    Making and dropping a database takes more time than most tests do.
    """
    if len(used_databases) < USED_DATABASES:
        name = f"test_{secrets.token_hex(6)}"
    else:
        name = used_databases.popleft()
        for collection in COLLECTIONS:
            mongo_client[name][collection].delete_many({})
    yield with_database(mongo_server().url, name)
    if as_a_store_makes_it(mongo_client[name]):
        used_databases.append(name)
    else:
        mongo_client.drop_database(name)


def as_a_store_makes_it(database: Database[dict[str, Any]]) -> bool:
    """Whether it holds the collections of a store with their indexes, and nothing else."""
    return all(
        name in COLLECTIONS
        and database[name].index_information().keys() == {"_id_", "gsession_expiry"}
        for name in database.list_collection_names()
    )


@pytest.fixture(scope="session")
def used_databases(mongo_client: "MongoClient[dict[str, Any]]") -> Iterator[deque[str]]:
    """Databases for `emptied_mongodb_url`, the least recently used first."""
    names: deque[str] = deque()
    yield names
    for name in names:
        mongo_client.drop_database(name)


@pytest.fixture(scope="session")
def redis_client() -> Iterator[Redis]:
    """A client of the shared Redis server, to inspect the effects of a store."""
    with Redis.from_url(redis_server().url, socket_timeout=10) as client:
        yield client


@pytest.fixture(scope="session")
def mongo_client() -> "Iterator[MongoClient[dict[str, Any]]]":
    """A client of the shared MongoDB server, to inspect the effects of a store."""
    server = mongo_server()
    with MongoClient(server.url, timeoutMS=10_000) as client:
        if isinstance(server, MongoServer):
            # Making an index and dropping a database wait for the next flush of the journal, which
            # is up to 100 ms away. A write that asks for the journal is still flushed at once.
            client.admin.command("setParameter", 1, journalCommitInterval=50)
        yield client


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    """A Redis server of the test module's own, to pause and kill. Leave it running."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def oldest_redis() -> Iterator[OldestRedisServer]:
    """As `own_redis`, in the oldest supported version."""
    with OldestRedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def own_mongo() -> Iterator[MongoServer]:
    """A MongoDB server beside the shared one, to pause and kill. Leave it running and as it was."""
    with MongoServer() as server:
        yield server
