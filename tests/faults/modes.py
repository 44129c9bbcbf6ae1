"""The stores that sessions are kept in, each on servers of the harness's own."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from redis import Redis

from tests.harness.servers import MongoServer, RedisServer, with_database
from tests.harness.topologies import (
    MongoMember,
    MongoReplicaSet,
    RedisCluster,
    RedisSentinels,
    TCPProxy,
)

YEAR = 365 * 86400


class Mode:
    """One way to keep sessions. Started at its first use, and stopped by `stop`."""

    name: str
    promise: str  # in words, for the report
    hosts = 1  # that a worker may have connections to
    logout_replicas = 0  # SESSION_LOGOUT_REPLICAS
    pooled = True  # whether SESSION_POOL_MAX bounds the connections

    def start(self) -> None:
        """Start servers that are down, and wait until all are healthy."""

    def stop(self) -> None:
        """End the servers and delete their files."""

    def versions(self) -> dict[str, str]:
        """The versions of the servers, while they run."""
        return {}

    def url(self, place: str) -> str:
        """`SESSION_STORE`, for a key prefix or database of that name."""
        raise NotImplementedError

    def forever(self, place: str) -> int:
        """How many of the stored keys have no expiry."""
        raise NotImplementedError


class Memory(Mode):
    """In the one worker."""

    name = "memory"
    promise = "nothing survives the process"

    def url(self, place: str) -> str:
        return "memory://"

    def forever(self, place: str) -> int:
        return 0


class SQLite(Mode):
    """A file for all workers."""

    name = "sqlite"
    pooled = False  # SQLite keeps the files of closed connections until the last one is closed
    promise = "all that was acknowledged, on one machine"

    def __init__(self) -> None:
        self._directory: Path | None = None

    @property
    def directory(self) -> Path:
        """The folder of the files."""
        assert self._directory is not None
        return self._directory

    def start(self) -> None:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="gsession-faults-"))

    def stop(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def path(self, place: str) -> Path:
        """The file, whose folder may be made a small disk of its own."""
        folder = self.directory / place
        folder.mkdir(exist_ok=True)
        return folder / "sessions.sqlite3"

    def url(self, place: str) -> str:
        return f"sqlite:///{self.path(place)}"

    def forever(self, place: str) -> int:
        return count_forever(self.path(place))


def count_forever(path: Path) -> int:
    """The rows of a file whose expiry is not set, or not within a year."""
    with closing(sqlite3.connect(path, timeout=10)) as db:
        (count,) = db.execute(
            "SELECT count(*) FROM gsession WHERE coalesce(idle_expires_at > ?, TRUE)",
            ((time.time() + YEAR) * 1000,),
        ).fetchone()
    return int(count)


class OneRedis(Mode):
    """One Redis that writes its append-only file."""

    def __init__(self, fsync: str) -> None:
        options = ("--appendonly", "yes", "--appendfsync", fsync)
        self.name = f"redis-{fsync}"
        self.promise = (
            "all that was acknowledged"
            if fsync == "always"
            else "a crash may lose the last second and undo the last logouts"
        )
        self.server = RedisServer(*options)

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def versions(self) -> dict[str, str]:
        with Redis.from_url(self.server.url, socket_timeout=10) as client:
            return {"Redis": client.info("server")["redis_version"]}

    def url(self, place: str) -> str:
        return self.server.url

    def forever(self, place: str) -> int:
        with Redis.from_url(self.server.url, socket_timeout=10) as client:
            return _without_expiry(client, place)


def _without_expiry(client: Any, place: str) -> int:
    return sum(client.ttl(key) == -1 for key in client.scan_iter(f"{place}*", count=1000))


class Several(Mode):
    """Servers that work as one."""

    servers: Any  # a Topology of its kind

    def start(self) -> None:
        self.servers.start()

    def stop(self) -> None:
        self.servers.stop()

    def url(self, place: str) -> str:
        return str(self.servers.url)


class Sentinels(Several):
    """A primary, two replicas, three sentinels."""

    name = "redis-sentinel"
    hosts = 6
    promise = "a failover may lose the last writes and undo the last logouts"

    def __init__(self) -> None:
        self.servers = RedisSentinels()

    def forever(self, place: str) -> int:
        with Redis.from_url(self.servers.primary().url, socket_timeout=10) as client:
            return _without_expiry(client, place)


class ConfirmedLogouts(Sentinels):
    """The same, and a logout is called done when both replicas have it."""

    name = "redis-confirmed"
    promise = "a failover undoes no acknowledged logout; it may lose the last writes"
    logout_replicas = 2


class Cluster(Several):
    """Three primaries, each with a replica."""

    name = "redis-cluster"
    hosts = 6
    promise = "a failover may lose the last writes and undo the last logouts"

    def __init__(self) -> None:
        self.servers = RedisCluster()

    def forever(self, place: str) -> int:
        count = 0
        for node in self.servers.primaries():
            with Redis.from_url(node.url, socket_timeout=10) as client:
                count += _without_expiry(client, place)
        return count


class StandaloneServer(MongoMember):
    """A MongoDB server that is no replica set, as nobody should run it, and many do."""

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def _arguments(self) -> list[str]:
        arguments = super()._arguments()
        place = arguments.index("--replSet")
        del arguments[place : place + 2]
        return arguments


class OneMongo(Mode):
    """One MongoDB, a replica set of one or none at all."""

    def __init__(self, name: str, promise: str, server: MongoServer) -> None:
        self.name = name
        self.promise = promise
        self.server = server

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def versions(self) -> dict[str, str]:
        client: MongoClient[dict[str, Any]]
        with MongoClient(self.server.url, timeoutMS=10_000) as client:
            return {"MongoDB": client.server_info()["version"]}

    def url(self, place: str) -> str:
        return with_database(self.server.url, place)

    def forever(self, place: str) -> int:
        return _mongo_forever(self.server.url, place)


class ReplicaSet(Several):
    """Three MongoDB servers that elect a primary."""

    name = "mongodb-set"
    hosts = 3
    promise = "all that was acknowledged"

    def __init__(self) -> None:
        self.servers = MongoReplicaSet()

    def url(self, place: str) -> str:
        return with_database(self.servers.url, place)

    def forever(self, place: str) -> int:
        return _mongo_forever(self.servers.url, place)


def _mongo_forever(url: str, place: str) -> int:
    client: MongoClient[dict[str, Any]]
    with MongoClient(url, timeoutMS=15_000) as client:
        database: Any = client[place]
        count = 0
        for name, expiry in (("gsession", "idle_expires_at"), ("sessions", "expiration")):
            collection = database[name]
            count += collection.count_documents({expiry: {"$not": {"$type": "date"}}})
            indexed = any(
                "expireAfterSeconds" in index for index in collection.index_information().values()
            )
            if not indexed:
                count += collection.count_documents({})
        client.drop_database(place)
    return count


def modes() -> dict[str, Callable[[], Mode]]:
    """The factory of each mode, by its name."""
    return {
        "memory": Memory,
        "sqlite": SQLite,
        "redis-always": lambda: OneRedis("always"),
        "redis-everysec": lambda: OneRedis("everysec"),
        "redis-sentinel": Sentinels,
        "redis-confirmed": ConfirmedLogouts,
        "redis-cluster": Cluster,
        "mongodb-one": lambda: OneMongo("mongodb-one", "all that was acknowledged", MongoServer()),
        "mongodb-bare": lambda: OneMongo(
            "mongodb-bare",
            "a crash may lose the last 100 ms: no majority, no wait for the journal",
            StandaloneServer(),
        ),
        "mongodb-set": ReplicaSet,
    }


def proxy_for(mode: Mode) -> TCPProxy:
    """A proxy before the one server of a mode, not started yet."""
    server = getattr(mode, "server", None)
    assert isinstance(server, (RedisServer, MongoServer)), f"{mode.name} has not one server"
    return TCPProxy(server.port)
