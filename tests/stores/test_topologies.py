"""`tests.harness.topologies` works as described, checked with plain redis-py and pymongo."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask, session
from pymongo import MongoClient
from pymongo.errors import (
    AutoReconnect,
    NotPrimaryError,
    OperationFailure,
    ServerSelectionTimeoutError,
)
from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster as ClusterClient
from redis.crc import key_slot
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel as SentinelClient

from flask_gsession import Session
from tests.harness.apps import within
from tests.harness.servers import RedisServer
from tests.harness.topologies import (
    HOST,
    ClusterNode,
    MongoAuthTLS,
    MongoReplicaSet,
    RedisACL,
    RedisCluster,
    RedisSentinels,
    RedisTLS,
    TCPProxy,
    until,
)

pytest_plugins = ["tests.harness.topologies"]

NEVER = Retry(NoBackoff(), 0)


def mongo_client_of(url: str, **options: Any) -> "MongoClient[dict[str, Any]]":
    """A client that waits at most ten seconds for anything."""
    return MongoClient(url, **{"timeoutMS": 10_000} | options)


def hosts_of(url: str) -> list[tuple[str, int]]:
    """The hosts and ports of a URL that names several."""
    pairs = [each.rsplit(":", 1) for each in urlsplit(url).netloc.split(",")]
    return [(host, int(port)) for host, port in pairs]


# Redis with sentinels --------------------------------------------------------------------------


@pytest.fixture
def sentinels(redis_sentinels: RedisSentinels) -> Iterator[RedisSentinels]:
    """The sentinels, made whole afterwards."""
    yield redis_sentinels
    redis_sentinels.start()


@pytest.fixture
def sentinel_client(sentinels: RedisSentinels) -> Iterator[Redis]:
    """A client of the primary, whichever it is, as the sentinels of the URL know it."""
    url = urlsplit(sentinels.url)
    assert (url.scheme, url.path) == ("redis+sentinel", f"/{RedisSentinels.SERVICE}/0")
    watchers: Any = SentinelClient(hosts_of(sentinels.url), socket_timeout=10)  # type: ignore[no-untyped-call]
    with watchers.master_for(RedisSentinels.SERVICE, socket_timeout=10) as client:
        yield client
    for watcher in watchers.sentinels:
        watcher.close()


def caught_up(client: Redis) -> None:
    """Wait until both replicas have all writes."""
    until(lambda: client.wait(2, 1000) == 2, "the replicas catching up")


def test_sentinels_replace_a_dead_primary(
    sentinels: RedisSentinels, sentinel_client: Redis
) -> None:
    sentinel_client.set("key", "before")
    caught_up(sentinel_client)
    primary = sentinels.primary()
    dead = sentinels.kill_primary()
    assert dead is primary
    assert not dead.running
    new = sentinels.wait_for_failover(dead)
    assert new is not dead
    assert sentinels.primary() is new
    assert sentinel_client.get("key") == b"before"
    sentinels.start()
    assert dead in sentinels.replicas()
    sentinel_client.set("key", "after")
    caught_up(sentinel_client)


def test_a_sentinel_replaces_a_living_primary(
    sentinels: RedisSentinels, sentinel_client: Redis
) -> None:
    sentinel_client.set("key", "value")
    caught_up(sentinel_client)
    old = sentinels.failover()
    new = sentinels.wait_for_failover(old)
    assert old.running
    assert new is not old
    assert sentinel_client.get("key") == b"value"


# A Redis cluster -------------------------------------------------------------------------------


@pytest.fixture
def cluster(redis_cluster: RedisCluster) -> Iterator[RedisCluster]:
    """The cluster, made whole afterwards."""
    yield redis_cluster
    redis_cluster.start()


@pytest.fixture
def cluster_client(cluster: RedisCluster) -> Iterator[ClusterClient]:
    """A client that follows the cluster from the first node of the URL."""
    assert urlsplit(cluster.url).scheme == "redis+cluster"
    host, port = hosts_of(cluster.url)[0]
    with ClusterClient(host=host, port=port, socket_timeout=10) as client:
        yield client


def value_at(node: ClusterNode, key: str) -> object:
    """One node's answer to GET, which may be an error."""
    with Redis(host=HOST, port=node.port) as client:
        try:
            return client.get(key)
        except ResponseError as error:
            return error


def test_a_cluster_shares_the_slots(cluster: RedisCluster, cluster_client: ClusterClient) -> None:
    keys = [f"key-{number}" for number in range(30)]
    for key in keys:
        cluster_client.set(key, key)
    owners = {cluster.primary(key_slot(key.encode())).port for key in keys}
    assert owners == {node.port for node in cluster.primaries()}
    assert len(owners) == 3
    assert all(cluster_client.get(key) == key.encode() for key in keys)


def test_a_slot_moves_with_its_keys(cluster: RedisCluster, cluster_client: ClusterClient) -> None:
    slot = key_slot(b"moving")
    cluster_client.set("moving", "value")
    source = cluster.primary(slot)
    with cluster.migrating(slot) as target:
        assert target is not source
        assert cluster.primary(slot) is source
        assert (
            "ASK" in repr(value_at(source, "moving")).upper()
        )  # a ResponseError before redis-py 6.0
        assert cluster_client.get("moving") == b"value"
    assert cluster.primary(slot) is target
    assert value_at(target, "moving") == b"value"
    assert cluster_client.get("moving") == b"value"
    assert cluster.migrate_slot(slot, to=source) is source
    assert value_at(source, "moving") == b"value"
    assert "MOVED" in repr(value_at(target, "moving")).upper()


def test_a_replica_takes_over_from_a_dead_primary(
    cluster: RedisCluster, cluster_client: ClusterClient
) -> None:
    slot = key_slot(b"key")
    cluster_client.set("key", "value")
    cluster.wait_for_replica(slot)
    dead = cluster.kill_primary(slot)
    cluster.wait_for_failover(dead)
    new = cluster.primary(slot)
    assert new is not dead
    assert value_at(new, "key") == b"value"
    cluster.start()
    assert dead.running
    assert dead not in cluster.primaries()


def test_a_replica_takes_over_when_asked(cluster: RedisCluster) -> None:
    old = cluster.failover(5)
    cluster.wait_for_failover(old)
    assert old.running
    assert cluster.primary(5) is not old


# Redis with TLS and with users -----------------------------------------------------------------


def test_a_tls_server_shows_a_certificate_and_speaks_nothing_else(
    redis_tls: RedisTLS,
) -> None:
    with Redis.from_url(redis_tls.url) as client:
        assert client.ping()
    with (
        Redis.from_url(redis_tls.url.partition("?")[0], retry=NEVER) as stranger,
        pytest.raises(RedisConnectionError, match="certificate verify failed"),
    ):
        stranger.ping()
    with (
        Redis(host=HOST, port=redis_tls.tls_port, socket_timeout=10, retry=NEVER) as plain,
        pytest.raises((RedisConnectionError, RedisTimeoutError)),
    ):
        plain.ping()


def test_a_tls_server_can_demand_a_certificate() -> None:
    with RedisTLS(client_certificates=True) as server:
        with Redis.from_url(server.url) as client:
            assert client.ping()
        ours_only = server.url.partition("&")[0]
        assert "ssl_certfile" not in ours_only
        with (
            Redis.from_url(ours_only, socket_timeout=10, retry=NEVER) as anonymous,
            pytest.raises((RedisConnectionError, OSError)),
        ):
            anonymous.ping()


def test_a_tls_server_comes_back_after_a_kill() -> None:
    with RedisTLS() as server, Redis.from_url(server.url, retry=NEVER) as client:
        client.ping()
        server.kill()
        with pytest.raises(RedisConnectionError):
            client.ping()
        server.start()
        assert client.ping()


@pytest.fixture
def no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every `redis-server` look as if it had been built without TLS."""
    monkeypatch.setattr("tests.harness.topologies.has_tls", lambda program: False)


@pytest.mark.usefixtures("no_tls")
def test_without_tls_in_the_server_a_proxy_speaks_it(capsys: pytest.CaptureFixture[str]) -> None:
    test_a_tls_server_can_demand_a_certificate()
    test_a_tls_server_comes_back_after_a_kill()
    assert "a proxy" in capsys.readouterr().out


def test_an_acl_user_has_the_permissions_of_its_acl(redis_acl: RedisACL) -> None:
    redis_acl.allow("~mine:* +get +set")
    with Redis.from_url(redis_acl.url) as client:
        assert client.set("mine:key", "value")
        assert client.get("mine:key") == b"value"
        with pytest.raises(NoPermissionError):
            client.get("other:key")
        with pytest.raises(NoPermissionError):
            client.delete("mine:key")
        assert {"key: other:key", "command: del"} <= set(redis_acl.denied())
        redis_acl.allow("~* +@all")
        assert client.delete("mine:key") == 1
        with pytest.raises(NoPermissionError):
            client.publish("channel", "text")
        redis_acl.allow("&channel +publish")
        assert client.publish("channel", "text") == 0
        with pytest.raises(ResponseError):
            redis_acl.allow("+nonsense")
    with Redis.from_url(redis_acl.anonymous_url) as nobody, pytest.raises(AuthenticationError):
        nobody.ping()
    with Redis.from_url(redis_acl.admin_url) as admin:
        assert admin.acl_whoami() == "admin"


def test_an_acl_outlives_a_kill() -> None:
    with RedisACL("~a +get") as server:
        server.allow("~b +get")
        server.kill()
        server.start()
        with Redis.from_url(server.url) as client:
            assert client.get("b") is None
            with pytest.raises(NoPermissionError):
                client.get("a")


# MongoDB ---------------------------------------------------------------------------------------


@pytest.fixture
def replica_set(mongo_replica_set: MongoReplicaSet) -> Iterator[MongoReplicaSet]:
    """The replica set, made whole afterwards."""
    yield mongo_replica_set
    mongo_replica_set.start()


@pytest.fixture
def replica_set_client(replica_set: MongoReplicaSet) -> "Iterator[MongoClient[dict[str, Any]]]":
    """A client of the whole set that writes to a majority; `test.things` is empty.

    It is patient: after an election the other member may need many seconds to find whom to follow.
    """
    with mongo_client_of(replica_set.url, w="majority", timeoutMS=60_000) as client:
        client["test"]["things"].drop()
        yield client


def test_a_replica_set_elects_another_primary_after_a_death(
    replica_set: MongoReplicaSet, replica_set_client: "MongoClient[dict[str, Any]]"
) -> None:
    things = replica_set_client["test"]["things"]
    things.insert_one({"_id": "kept"})
    assert len(replica_set_client.nodes) == 3
    dead = replica_set.kill_primary()
    new = replica_set.wait_for_primary(other_than=dead)
    assert new is not dead
    things.insert_one({"_id": "new"})
    assert {each["_id"] for each in things.find()} == {"kept", "new"}
    replica_set.start()
    assert dead in replica_set.secondaries()
    things.drop()


def test_a_primary_steps_down(
    replica_set: MongoReplicaSet, replica_set_client: "MongoClient[dict[str, Any]]"
) -> None:
    replica_set_client["test"]["things"].insert_one({"_id": "kept"})
    old = replica_set.primary()
    direct = f"mongodb://{HOST}:{old.port}/?directConnection=true"
    with mongo_client_of(direct, retryWrites=False) as client:
        client["test"]["things"].insert_one({"_id": "through the primary"})
        assert replica_set.step_down() is old
        with pytest.raises(NotPrimaryError):
            client["test"]["things"].insert_one({"_id": "too late"})
    assert replica_set.wait_for_primary(other_than=old) is not old
    replica_set_client["test"]["things"].drop()


def test_mongodb_users_have_their_rights(mongo_auth_tls: MongoAuthTLS) -> None:
    with mongo_client_of(mongo_auth_tls.url) as app:
        app["sessions"]["things"].insert_one({"_id": "one"})
        app["sessions"]["things"].create_index("expires")
        with pytest.raises(OperationFailure, match="not authorized"):
            app["elsewhere"]["things"].insert_one({})
    with mongo_client_of(mongo_auth_tls.url_of("frail")) as frail:
        things = frail["sessions"]["things"]
        things.update_one({"_id": "one"}, {"$set": {"value": 1}})
        assert list(things.find()) == [{"_id": "one", "value": 1}]
        assert "expires_1" in things.index_information()
        with pytest.raises(OperationFailure, match="not authorized"):
            things.create_index("value")
    with mongo_client_of(mongo_auth_tls.url_of("admin")) as admin:
        admin.drop_database("sessions")
    with (
        mongo_client_of(mongo_auth_tls.url_of(None)) as nobody,
        pytest.raises(OperationFailure, match="requires authentication"),
    ):
        nobody["sessions"]["things"].find_one()


@pytest.mark.parametrize("options", ["", "&tls=true"], ids=["no TLS", "another authority"])
def test_mongodb_wants_tls_with_its_authority(mongo_auth_tls: MongoAuthTLS, options: str) -> None:
    url = f"mongodb://{HOST}:{mongo_auth_tls.port}/?directConnection=true{options}"
    with (
        mongo_client_of(url, timeoutMS=500) as client,
        pytest.raises(ServerSelectionTimeoutError),
    ):
        client["sessions"]["things"].find_one()


def test_mongodb_with_users_comes_back_after_a_kill(mongo_auth_tls: MongoAuthTLS) -> None:
    mongo_auth_tls.kill()
    mongo_auth_tls.start()
    with mongo_client_of(mongo_auth_tls.url) as app:
        assert app["sessions"]["things"].find_one() is None


# The proxy -------------------------------------------------------------------------------------

TIMEOUT = 0.3  # seconds


@pytest.fixture
def proxy(own_redis: RedisServer) -> Iterator[TCPProxy]:
    """A proxy in front of a Redis of the module's own."""
    with TCPProxy(own_redis.port) as proxy:
        yield proxy


@pytest.fixture
def proxied(proxy: TCPProxy, own_redis: RedisServer) -> Iterator[Redis]:
    """A connected client behind the proxy that retries nothing, and is patient."""
    url = proxy.through(own_redis.url)
    with Redis.from_url(url, socket_timeout=10, retry=NEVER) as client:
        client.flushall()
        yield client


@pytest.fixture
def hasty(proxy: TCPProxy, own_redis: RedisServer) -> Iterator[Redis]:
    """A connected client behind the proxy that retries nothing and waits `TIMEOUT` seconds."""
    url = proxy.through(own_redis.url)
    with Redis.from_url(url, socket_timeout=TIMEOUT, retry=NEVER) as client:
        until(client.flushall, "an answer in time")
        yield client


@pytest.fixture
def direct(own_redis: RedisServer) -> Iterator[Redis]:
    """A client that goes past the proxy."""
    with Redis.from_url(own_redis.url) as client:
        yield client


def test_the_proxy_passes_all_on_and_counts(proxy: TCPProxy, proxied: Redis) -> None:
    large = os.urandom(3_000_000)
    proxied.set("large", large)
    assert proxied.get("large") == large
    assert (proxy.accepted, proxy.open, proxy.cuts) == (1, 1, 0)
    proxied.connection_pool.disconnect()
    until(lambda: proxy.open == 0, "the connection ending")
    proxied.ping()
    assert (proxy.accepted, proxy.open) == (2, 1)


def test_the_proxy_delays_replies(
    proxy: TCPProxy, proxied: Redis, hasty: Redis, direct: Redis
) -> None:
    def ask() -> None:
        proxied.set("large", "x" * 1_000_000)
        assert proxied.strlen("large") == 1_000_000
        assert proxied.get("large") == b"x" * 1_000_000

    begin = time.monotonic()
    with proxy.delay(0.1):
        within(0.7, ask)  # for all pieces of a reply at once
    assert time.monotonic() - begin >= 0.3
    with proxy.delay(60):
        with pytest.raises(RedisTimeoutError):
            hasty.incr("counter")
        until(lambda: direct.get("counter") == b"1", "the request arriving")


def test_a_delayed_request_arrives_after_its_client_gave_up(
    proxy: TCPProxy, hasty: Redis, direct: Redis
) -> None:
    with proxy.delay(60, "request"):
        with pytest.raises(RedisTimeoutError):
            hasty.incr("counter")
        assert direct.get("counter") is None
        with proxy.delay(TIMEOUT, "request"):  # that long after it was sent, which is over
            until(lambda: direct.get("counter") == b"1", "the request arriving")


def test_the_proxy_drips(proxy: TCPProxy, proxied: Redis) -> None:
    proxied.set("key", "x" * 100)
    begin = time.monotonic()
    with proxy.drip(20, 0.02):
        assert proxied.get("key") == b"x" * 100
    assert time.monotonic() - begin >= 0.08


def test_the_proxy_cuts_in_the_middle_of_a_reply(proxy: TCPProxy, proxied: Redis) -> None:
    proxied.set("key", "x" * 100)
    with proxy.cut(50, match=b"GET", times=1), pytest.raises(RedisConnectionError):
        proxied.get("key")
    assert proxy.cuts == 1
    assert proxied.get("key") == b"x" * 100


def test_a_cut_lets_earlier_bytes_through(proxy: TCPProxy, proxied: Redis) -> None:
    with proxy.cut(3 * len("+PONG\r\n")):
        for _ in range(3):
            assert proxied.ping()
        with pytest.raises(RedisConnectionError):
            proxied.ping()


def test_the_proxy_loses_a_reply_after_the_write(
    proxy: TCPProxy, proxied: Redis, direct: Redis
) -> None:
    with proxy.lose_reply(match=b"INCR", times=1):
        assert proxied.ping()
        with pytest.raises(RedisConnectionError):
            proxied.incr("counter")
        assert direct.get("counter") == b"1"
        assert proxied.incr("counter") == 2  # that was the one
    assert proxy.cuts == 1


def test_a_black_hole_says_nothing_and_ends(proxy: TCPProxy, hasty: Redis, direct: Redis) -> None:
    before = proxy.accepted
    with proxy.blackhole():
        for _ in range(2):  # the open connection, and a new one
            with pytest.raises(RedisTimeoutError):
                hasty.incr("counter")
        until(lambda: proxy.accepted == before + 1, "the new connection")
        assert direct.get("counter") is None
    assert until(hasty.ping, "an answer in time")
    until(lambda: direct.get("counter") == b"1", "the held request")


def test_the_proxy_refuses(proxy: TCPProxy, proxied: Redis) -> None:
    with proxy.refuse():
        for _ in range(2):
            with pytest.raises(RedisConnectionError):
                proxied.ping()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, proxy.port))
    assert proxied.ping()


def test_the_proxy_disconnects_but_refuses_nobody(proxy: TCPProxy, proxied: Redis) -> None:
    proxy.disconnect()
    until(lambda: proxy.open == 0, "the connection ending")
    assert proxied.ping()
    assert (proxy.accepted, proxy.open) == (2, 1)


def test_the_proxy_leads_mongodb_through(replica_set: MongoReplicaSet) -> None:
    primary = replica_set.primary()
    with TCPProxy(primary.port) as proxy:
        with mongo_client_of(proxy.through(primary.url), retryWrites=False) as client:
            things = client["test"]["lost"]
            things.insert_one({"_id": 1})
            with proxy.lose_reply(match=b"insert", times=1), pytest.raises(AutoReconnect):
                things.insert_one({"_id": 2})
            assert things.count_documents({}) == 2
            things.drop()
        assert proxy.accepted > 1


# How it ends -----------------------------------------------------------------------------------

KILLED = """
import os, signal
from tests.harness.topologies import RedisSentinels
members = RedisSentinels().members
for member in members:
    member.start()
print(*(member._process.pid for member in members))
print(*(member._directory for member in members), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_server_outlives_its_tests() -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, check=False, timeout=60
    )
    pids, directories = (line.split() for line in child.stdout.splitlines())
    assert len(pids) == 6
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the servers ending")
    until(lambda: not any(Path(each).exists() for each in directories), "the files going")


# Old sessions that are taken over ----------------------------------------------------------------


def test_flask_sessions_records_in_a_cluster(cluster_client: ClusterClient) -> None:
    check_takeovers(cluster_client)


def test_flask_sessions_records_behind_sentinels(sentinel_client: Redis) -> None:
    check_takeovers(sentinel_client)


def check_takeovers(client: Any) -> None:
    """Flask-Session keeps sessions by this client; each slot of a cluster is met."""
    app = Flask(__name__)
    app.config.update(SECRET_KEY="a key", SESSION_TYPE="redis", SESSION_REDIS=client)
    app.config.update(SESSION_IMPORT_UNTIL="2100-01-01", SESSION_KEY_PREFIX="old-test:")
    ext = Session(app)
    app.add_url_rule("/", "look", lambda: dict(session))
    app.add_url_rule("/out", "out", lambda: session.destroy() or "")
    for number in range(12):
        sid = chr(ord("a") + number) * 43
        client.set(f"old-test:{sid}", b'{"n": %d}' % number, ex=100)
        browser = app.test_client()
        browser.set_cookie("session", sid)
        assert browser.get("/").json == {"n": number}
        assert browser.get("/out").status_code == 200
        assert client.get(f"old-test:{sid}") is None
    ext.close(app)
