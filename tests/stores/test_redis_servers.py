"""Redis as production runs it: sentinels, a cluster, TLS, a user of the least rights."""

import ctypes
import json
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.cluster
from flask import Flask
from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster as ClusterClient
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.retry import Retry
from redis.sentinel import Sentinel as SentinelClient

from flask_gsession import Session, session
from flask_gsession.errors import (
    Gone,
    KeyTaken,
    RevocationUnfinished,
    SettingError,
    Stale,
    StoreUnavailable,
)
from flask_gsession.events import SessionDestroyed, WriteDropped
from flask_gsession.stores import Record, Store, StoreOptions, open_store
from flask_gsession.stores.base import Deleted
from flask_gsession.stores.redis import servers as redis_servers
from flask_gsession.stores.redis.cluster import Cluster
from flask_gsession.stores.redis.commands import packed
from flask_gsession.stores.redis.pool import Slot
from flask_gsession.testing import FakeClock, HookedStore, StoreContract, a_pointer, a_record
from tests.harness.apps import Site, hasty, within
from tests.harness.console import Console
from tests.harness.servers import HAS_OLDEST_REDIS, OldestRedisServer, RedisServer, free_port
from tests.harness.topologies import (
    HOST,
    RedisACL,
    RedisCluster,
    RedisMember,
    RedisSentinels,
    RedisTLS,
    until,
)

pytest_plugins = ["tests.harness.topologies"]

PATIENCE = 10.0  # seconds: a busy machine must not look like an outage


class OnServers(StoreContract):
    """The contract on the server of ``url``."""

    url: str
    prefix: str

    def open(self, clock: FakeClock) -> Store:
        options = StoreOptions(prefix=self.prefix, timeout=PATIENCE, clock=clock)
        return open_store(self.url, options)[0]


@pytest.mark.skipif(not HAS_OLDEST_REDIS, reason="Redis 6.2 is packaged for Linux x86-64 only")
class TestOldestRedis(OnServers):
    @pytest.fixture(autouse=True)
    def servers(self, oldest_redis: OldestRedisServer, store_prefix: str) -> None:
        self.url, self.prefix = oldest_redis.url, store_prefix


class TestSentinels(OnServers):
    @pytest.fixture(autouse=True)
    def servers(self, redis_sentinels: RedisSentinels, store_prefix: str) -> None:
        self.url, self.prefix = redis_sentinels.url, store_prefix


class TestCluster(OnServers):
    @pytest.fixture(autouse=True)
    def servers(self, redis_cluster: RedisCluster, store_prefix: str) -> None:
        self.url, self.prefix = redis_cluster.url, store_prefix


@pytest.mark.long  # same commands as the other setups; the tests below connect by TLS
class TestTLS(OnServers):
    @pytest.fixture(autouse=True)
    def servers(self, redis_tls: RedisTLS, store_prefix: str) -> None:
        self.url, self.prefix = redis_tls.url, store_prefix


# Shared by both ---------------------------------------------------------------------------------


class Shop:
    """A site with a counter on several servers."""

    def __init__(self, url: str, prefix: str, timeout: float = PATIENCE, **options: Any) -> None:
        self.options = StoreOptions(prefix=prefix, timeout=timeout, **options)
        self.store: Any = open_store(url, self.options)[0]
        self.site = Site("redis://unused", prefix, time.time, store=HookedStore(self.store))
        self.visitor = self.site.visitor()

    def hasty(self) -> AbstractContextManager[None]:
        """For the length of a block a store call has a budget as in production."""
        return hasty(self.store, 1.0)

    def count(self) -> int:
        """Count one more. Returns the new count."""
        number: int = self.visitor.run(lambda s: s.update_atomic("count", lambda n: n + 1, 0))
        return number

    def key(self) -> str:
        """The store's key of the visitor's session."""
        handle: str = self.visitor.run(lambda s: s.handle)
        return handle

    def slot(self) -> int:
        """The slot of the visitor's session in a cluster."""
        return key_slot(self.store.commands.names.record(self.key()))

    def warm(self, connections: int = 4) -> None:
        """Have so many connections at once, idle afterwards."""
        pool = self.store.commands.pool
        if isinstance(pool, Cluster):
            pool = pool.pool(pool.owner(self.slot(), time.monotonic() + PATIENCE))
        slots = [pool.take(time.monotonic() + PATIENCE) for _ in range(connections)]
        for slot in slots:
            slot.ask(packed(b"PING"))
        for slot in slots:
            pool.give(slot)

    def recovers(self) -> int:
        """Count until it works again. Returns the new count."""
        with self.hasty():
            until(self._try, "the shop serving again")
        number: int = self.visitor.run(lambda s: s["count"])
        return number

    def _try(self) -> bool:
        response = self.visitor.ask(lambda s: s.update_atomic("count", lambda n: n + 1, 0))
        assert response.status_code in (200, 503)
        return response.status_code == 200


@pytest.fixture
def open_shop(store_prefix: str) -> Iterator[Callable[..., Shop]]:
    opened: list[Shop] = []

    def opener(url: str, **options: Any) -> Shop:
        opened.append(Shop(url, store_prefix, **options))
        return opened[-1]

    yield opener
    for shop in opened:
        shop.store.close()


Opener = Callable[..., Shop]


# Sentinels -------------------------------------------------------------------------------------


@pytest.fixture
def sentinels(redis_sentinels: RedisSentinels) -> Iterator[RedisSentinels]:
    """The sentinels, made whole afterwards."""
    yield redis_sentinels
    redis_sentinels.start()


def caught_up(sentinels: RedisSentinels) -> None:
    """Wait until the replicas have all writes."""
    primary = sentinels.primary()

    def done() -> bool:
        offset = primary.command("ROLE")[1]
        return all(replica.command("ROLE")[4] >= offset for replica in sentinels.replicas())

    until(done, "the replicas catching up")


def contents_of(server: RedisServer) -> Any:
    with Redis.from_url(server.url) as client:
        return {key: client.dump(key) for key in client.scan_iter("*{*")}


def test_a_failover_is_followed_before_the_old_primary_knows(
    sentinels: RedisSentinels, open_shop: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_servers, "LOOK_AGAIN", 0.0)
    shop = open_shop(sentinels.url)
    assert [shop.count(), shop.count()] == [1, 2]
    shop.warm()
    caught_up(sentinels)
    old = sentinels.failover()
    new = sentinels.wait_for_failover(old)
    shop.store.commands.pool.look(time.monotonic() + 5)  # the listener, in a thread of its own
    before = contents_of(new)
    assert shop.count() == 3  # for a few seconds the old one would take it, and lose it
    assert contents_of(new) != before
    assert shop.count() == 4


def test_a_dead_primary_is_an_outage_until_another_is_there(
    sentinels: RedisSentinels, open_shop: Opener
) -> None:
    shop = open_shop(sentinels.url)
    assert shop.count() == 1
    shop.warm()
    caught_up(sentinels)
    dead = sentinels.kill_primary()
    with shop.hasty():
        assert within(1.5, lambda: shop.visitor.ask(dict)).status_code == 503
    sentinels.wait_for_failover(dead)
    assert shop.count() == 2  # at once: no connection leads to the dead one any more


def test_a_frozen_primary_costs_nothing_once_it_is_replaced(
    sentinels: RedisSentinels, open_shop: Opener
) -> None:
    shop = open_shop(sentinels.url)
    assert shop.count() == 1
    shop.warm(8)  # all of them would wait for it
    caught_up(sentinels)
    frozen = sentinels.primary()
    with frozen.paused():
        with shop.hasty():
            answer = within(2, lambda: shop.visitor.ask(dict))
            # A second try on a busy machine may come after the failover.
            assert answer.status_code == 503 or sentinels.primary() is not frozen
        sentinels.wait_for_failover(frozen)
        assert [shop.count(), shop.count()] == [2, 3]
    assert shop.count() == 4


def test_a_server_that_is_not_a_primary_is_not_used(
    sentinels: RedisSentinels, open_shop: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentinel may name one that was the primary; reads would be old, and nobody would notice."""
    shop = open_shop(sentinels.url)
    replica = sentinels.replicas()[0]
    monkeypatch.setattr(
        shop.store.commands.pool._sentinels, "primary", lambda _: (HOST, replica.port)
    )
    with pytest.raises(StoreUnavailable, match=f"{replica.port} isn.t the primary"):
        shop.store.load("A" * 43)


@pytest.mark.long
def test_without_sentinels_existing_connections_keep_working(
    sentinels: RedisSentinels, open_shop: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_servers, "LOOK_AGAIN", 0.0)
    shop = open_shop(sentinels.url)
    assert shop.count() == 1
    for sentinel in sentinels.sentinels:
        sentinel.kill()
    assert shop.count() == 2
    shop.store.close()  # and no new one can be made
    with pytest.raises(StoreUnavailable, match="no sentinel knows a primary of 'sessions'"):
        shop.store.load("A" * 43)
    sentinels.start()
    assert shop.count() == 3


def test_frozen_sentinels_leave_time_for_the_last(
    sentinels: RedisSentinels, open_shop: Opener
) -> None:
    shop = open_shop(sentinels.url, timeout=3.0)  # of which each may cost a quarter
    first, second, _ = sentinels.sentinels
    with first.paused(), second.paused():
        assert shop.count() == 1
        shop.store.close()
        within(0.5, lambda: shop.store.load("A" * 43))  # it asks the third first now


def test_sentinels_and_servers_have_users_of_their_own(
    sentinels: RedisSentinels, open_shop: Opener
) -> None:
    for members, name in ((sentinels.data, "app"), (sentinels.sentinels, "watcher")):
        for member in members:
            member.command("ACL", "SETUSER", name, "on", f">{name}-secret", "~*", "+@all")
    hosts = sentinels.url.removeprefix("redis+sentinel://")
    url = f"redis+sentinel://app:app-secret@{hosts}?sentinel_username=watcher&sentinel_password="
    assert open_shop(f"{url}watcher-secret").count() == 1
    with pytest.raises(StoreUnavailable, match=r"no sentinel.*Authentication"):
        open_shop(f"{url}wrong").store.load("A" * 43)
    wrong = url.replace("app-secret", "wrong")
    with pytest.raises(StoreUnavailable, match="password in SESSION_STORE missing or wrong"):
        open_shop(f"{wrong}watcher-secret").store.load("A" * 43)


def test_another_service_and_another_database(sentinels: RedisSentinels, open_shop: Opener) -> None:
    other = open_shop(sentinels.url.replace("/0", "/3"))
    assert other.count() == 1
    shop = open_shop(sentinels.url)
    assert shop.store.load(other.key()) is None
    unknown = open_shop(sentinels.url.replace("/sessions/", "/nobody/"))
    with pytest.raises(StoreUnavailable, match="no sentinel knows a primary of 'nobody'"):
        unknown.store.load("A" * 43)


@contextmanager
def a_client_of(
    sentinels: RedisSentinels, ports: Sequence[int], **options: Any
) -> Iterator[tuple[Any, Any]]:
    """redis-py's object for the sentinels, here at these ports, and a client that it made."""
    addresses = [(HOST, port) for port in ports]
    once: Any = Retry(NoBackoff(), 0)  # the driver's default takes seconds where nobody answers
    watchers: Any = SentinelClient(  # type: ignore[no-untyped-call]
        addresses, sentinel_kwargs={"retry": once, "socket_timeout": 1}
    )
    options |= {"retry": once, "socket_timeout": 1}
    with watchers.master_for(sentinels.SERVICE, **options) as client:
        yield watchers, client
    for watcher in watchers.sentinels:
        watcher.close()


def ports_of(sentinels: RedisSentinels) -> list[int]:
    return [sentinel.port for sentinel in sentinels.sentinels]


def test_a_client_made_by_a_sentinel(sentinels: RedisSentinels, open_shop: Opener) -> None:
    with a_client_of(sentinels, ports_of(sentinels), max_connections=2) as (_, client):
        shop = open_shop(client, pool_max=2)
        assert shop.count() == 1
        caught_up(sentinels)
        # Two requests are under way when the primary is replaced.
        pool, deadline = shop.store.commands.pool, time.monotonic() + 60
        slots = [pool.take(deadline) for _ in range(2)]
        for slot in slots:
            slot.ask(packed(b"PING"))
        sentinels.wait_for_failover(sentinels.failover())
        slots[0].connection.disconnect()
        slots[0].ask(packed(b"PING"))  # sees the new one
        for slot in slots:
            pool.give(slot)
        assert shop.recovers() == 2
        slots = [pool.take(deadline) for _ in range(2)]  # both are there
        for slot in slots:
            pool.give(slot)


@pytest.mark.parametrize("user", ["store", "limits"])
def test_a_client_whose_sentinels_were_down_does_not_run_out_of_connections(
    sentinels: RedisSentinels, store_prefix: str, user: str
) -> None:
    """From 5.3 to 8.0.1, redis-py's own pool loses a place at each try to connect."""
    options = StoreOptions(prefix=store_prefix, timeout=PATIENCE)
    with a_client_of(sentinels, [free_port()], max_connections=2) as (watchers, client):
        store: Any = open_store(client, options)[0]
        lent = Redis(connection_pool=store.lend_pool())
        use = {"store": lambda: store.load("A" * 43), "limits": lambda: lent.get("a")}[user]
        for _ in range(4):
            with pytest.raises((StoreUnavailable, RedisConnectionError)):
                use()
        with a_client_of(sentinels, ports_of(sentinels)) as (reachable, _):
            watchers.sentinels = reachable.sentinels
            assert use() is None
        store.close()
        lent.connection_pool.disconnect()


def test_the_doctor_looks_at_replicas_and_sentinels(
    sentinels: RedisSentinels, store_prefix: str
) -> None:
    store = open_store(sentinels.url, StoreOptions(store_prefix, timeout=3))[0]

    def found(check: str) -> list[tuple[str, str]]:
        return [(each.severity, each.found) for each in store.checks.check() if each.check == check]

    caught_up(sentinels)
    until(lambda: [severity for severity, _ in found("replica")] == ["ok"] * 2, "two well replicas")
    assert found("sentinels") == [("ok", "3 of 3 answer")]
    with sentinels.sentinels[0].paused():
        assert found("sentinels") == [("warning", "2 of 3 answer")]
    service = sentinels.SERVICE
    sentinels.sentinels[0].command("SENTINEL", "SET", service, "quorum", 5)
    try:
        ((severity, text),) = found("sentinels")
        assert (severity, "NOQUORUM" in text) == ("error", True)
    finally:
        sentinels.sentinels[0].command("SENTINEL", "SET", service, "quorum", 2)
    store.close()


# A cluster -------------------------------------------------------------------------------------


@pytest.fixture
def cluster(redis_cluster: RedisCluster) -> Iterator[RedisCluster]:
    """The cluster, made whole afterwards."""
    yield redis_cluster
    redis_cluster.start()


def test_each_node_of_a_cluster_is_asked(cluster: RedisCluster, store_prefix: str) -> None:
    store = open_store(cluster.url, StoreOptions(store_prefix, timeout=PATIENCE))[0]
    versions = [each.found for each in store.checks.check() if each.check == "server version"]
    assert len({text.partition(": ")[0] for text in versions}) == 3
    for _ in range(30):
        store.create(a_record(time.time))
    assert store.counts.count() == 30
    store.close()


def names_on(node: RedisMember) -> list[str]:
    names: list[str] = node.command("KEYS", "*")
    return names


def record_in(shop: Shop, slot: int) -> Record:
    """A new record, whose key is in this slot."""
    while True:
        record = a_record(time.time)
        if key_slot(shop.store.commands.names.record(record.key)) == slot:
            return record


def test_sessions_are_shared_out_among_the_nodes(cluster: RedisCluster, open_shop: Opener) -> None:
    shop = open_shop(cluster.url)
    records = [a_record(time.time) for _ in range(30)]
    for record in records:
        shop.store.create(record)
    assert all(shop.store.load(record.key) == record for record in records)
    owners = {
        cluster.primary(key_slot(shop.store.commands.names.record(each.key))).port
        for each in records
    }
    assert {port for _, port in shop.store.commands.pool._pools} >= owners
    assert len(owners) == 3


def test_a_slot_moves_under_load_and_no_count_is_lost(
    cluster: RedisCluster, open_shop: Opener
) -> None:
    shop = open_shop(cluster.url)
    assert shop.count() == 1
    slot = shop.slot()
    home = cluster.primary(slot)
    over = threading.Event()
    counted: list[None] = []

    def work() -> None:
        visitor = shop.visitor.another_tab()
        while not over.is_set():
            visitor.run(lambda s: s.update_atomic("count", lambda n: n + 1, 0))
            counted.append(None)

    def work_under_lock() -> None:
        visitor = shop.visitor.another_tab()

        def count(s: Any) -> None:
            with s.lock(wait=PATIENCE):
                s["locked"] = s.get("locked", 0) + 1

        while not over.is_set():
            visitor.run(count)
            counted.append(None)

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(each) for each in (work, work, work_under_lock, work_under_lock)]
        try:
            for _ in range(5):
                enough = len(counted) + 10
                cluster.migrate_slot(slot)
                until(lambda enough=enough: len(counted) >= enough, "the counting going on")
        finally:
            over.set()
        for each in working:
            each.result()
    cluster.migrate_slot(slot, to=home) if cluster.primary(slot) is not home else None
    assert shop.visitor.run(lambda s: s["count"] + s["locked"]) == 1 + len(counted)


def test_a_whole_life_while_the_slot_is_on_its_way(
    cluster: RedisCluster, open_shop: Opener
) -> None:
    shop = open_shop(cluster.url)
    store = shop.store
    slot = 4711
    old, later = record_in(shop, slot), record_in(shop, slot)
    store.create(old)
    with cluster.migrating(slot):
        assert store.load(old.key) == old
        store.create(later)
        with pytest.raises(KeyTaken):
            store.create(later._replace(version=later.version + 1))
        saved = old._replace(version=old.version + 1, payload=b"saved")
        store.save(saved, old.version)
        assert store.leases.acquire(old.key, "me", 10_000, 10) == 0
        store.leases.save(saved, saved.version, "me")
        assert store.leases.release(old.key, "me")
        assert store.renew(saved, saved.idle_expires_at + 1000)
        new = record_in(shop, slot)
        store.replace(old.key, new, saved.version, a_pointer(saved, new))
        pointer = store.load(old.key)
        assert pointer is not None
        assert pointer.successor == new.key
        assert store.delete(old.key)
        assert store.load(new.key) is None
        assert store.load(later.key) == later
    assert store.load(later.key) == later
    assert store.delete(later.key)


def test_a_replica_that_takes_over_is_found(cluster: RedisCluster, open_shop: Opener) -> None:
    shop = open_shop(cluster.url)
    assert shop.count() == 1
    shop.warm()
    old = cluster.failover(shop.slot())
    cluster.wait_for_failover(old)
    assert shop.count() == 2
    assert shop.store.commands.pool.owner(shop.slot(), 0) == (
        HOST,
        cluster.primary(shop.slot()).port,
    )


def test_a_dead_node_is_an_outage_of_its_own_sessions_only(
    cluster: RedisCluster, open_shop: Opener
) -> None:
    shop = open_shop(cluster.url)
    assert shop.count() == 1
    slot = shop.slot()
    shop.warm()
    cluster.wait_for_replica(slot)
    elsewhere = record_in(shop, (slot + RedisCluster.SLOTS // 2) % RedisCluster.SLOTS)
    shop.store.create(elsewhere)
    dead = cluster.kill_primary(slot)
    with shop.hasty():
        assert within(1.5, lambda: shop.visitor.ask(dict)).status_code == 503
        # With the default of the servers a cluster that lacks slots serves none, after a while.
        with suppress(StoreUnavailable):
            assert shop.store.load(elsewhere.key) == elsewhere
    cluster.wait_for_failover(dead)
    assert shop.count() == 2
    assert shop.store.load(elsewhere.key) == elsewhere


def test_a_frozen_node_costs_nothing_once_it_is_replaced(
    cluster: RedisCluster, open_shop: Opener
) -> None:
    shop = open_shop(cluster.url)
    assert shop.count() == 1
    slot = shop.slot()
    shop.warm(8)
    cluster.wait_for_replica(slot)
    frozen = cluster.primary(slot)
    with frozen.paused():
        with shop.hasty():
            within(2, lambda: shop.visitor.ask(dict))
        cluster.wait_for_failover(frozen)
        assert [shop.count(), shop.count()] == [2, 3]
    assert shop.count() == 4


def test_a_slot_that_nobody_serves_for_a_moment(cluster: RedisCluster, open_shop: Opener) -> None:
    shop = open_shop(cluster.url)
    record = record_in(shop, 815)
    shop.store.create(record)
    owner = cluster.primary(815)
    owner.command("CLUSTER", "DELSLOTS", 815)
    try:
        with (
            shop.hasty(),
            pytest.raises(StoreUnavailable, match=r"ClusterDownError|serves slot 815"),
        ):
            shop.store.load(record.key)
        adding = threading.Timer(0.1, lambda: owner.command("CLUSTER", "ADDSLOTS", 815))
        adding.start()
        assert shop.store.load(record.key) == record
        adding.join()
    finally:
        with suppress(ResponseError):
            owner.command("CLUSTER", "ADDSLOTS", 815)


def test_a_crash_in_a_rotation_leaves_the_session_as_it_was(
    cluster: RedisCluster, open_shop: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(cluster.url)
    store = shop.store
    old, new, later = (a_record(time.time) for _ in range(3))
    store.create(old)
    with monkeypatch.context() as patch:
        patch.setattr(store.commands, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.replace(old.key, new, old.version, None)
    assert store.load(old.key) == old
    (node,) = [
        node
        for node in cluster.primaries()
        if store.commands.names.record(new.key).decode() in names_on(node)
    ]
    assert node.command("PTTL", store.commands.names.record(new.key).decode()) > 0
    store.replace(old.key, later, old.version, None)
    assert store.load(old.key) is None
    assert store.load(later.key) == later
    name = store.commands.names.record(old.key).decode()
    assert 0 < cluster.primary(key_slot(name.encode())).command("PTTL", name) <= 10_000


@pytest.mark.parametrize("grace", [True, False], ids=["grace", "no grace"])
@pytest.mark.parametrize("step", [b"SET", b"EVAL"], ids=["first", "second"])
def test_a_rotation_whose_answer_is_lost_is_done_once(
    cluster: RedisCluster,
    open_shop: Opener,
    monkeypatch: pytest.MonkeyPatch,
    grace: bool,
    step: bytes,
) -> None:
    store = open_shop(cluster.url).store
    old, new = a_record(time.time), a_record(time.time)
    store.create(old)
    ask, lost = Slot.ask, []

    def lose_one(slot: Slot, request: bytes) -> Any:
        answer = ask(slot, request)
        if request.split(b"\r\n")[2].startswith(step) and not lost:
            lost.append(request)
            raise RedisConnectionError("for the test")
        return answer

    monkeypatch.setattr(Slot, "ask", lose_one)
    store.replace(old.key, new, old.version, a_pointer(old, new) if grace else None)
    assert lost
    assert store.load(new.key) == new
    left = store.load(old.key)
    assert (left.successor if left else None) == (new.key if grace else None)


def test_a_node_is_asked_over_one_connection(cluster: RedisCluster, open_shop: Opener) -> None:
    store = open_shop(cluster.url).store
    for _ in range(20):
        store.load("A" * 43)
    pool = store.commands.pool
    idle = pool.pool(pool.owner(key_slot(store.names.record("A" * 43)), 0))._lent.idle
    assert sum(slot.connection is not None for slot in idle) == 1


def test_an_interruption_says_nothing_about_a_node(
    cluster: RedisCluster, open_shop: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_shop(cluster.url).store
    assert store.load("A" * 43) is None

    def interrupted(slot: Slot, request: bytes) -> Any:
        raise TimeoutError  # as another thread raises it

    monkeypatch.setattr(Slot, "ask", interrupted)
    with pytest.raises(TimeoutError):
        store.load("A" * 43)
    assert not store.commands.pool._outdated


def test_a_lost_rotation_takes_its_record_away(cluster: RedisCluster, open_shop: Opener) -> None:
    store = open_shop(cluster.url).store
    old, winner, loser = (a_record(time.time) for _ in range(3))
    store.create(old)
    store.replace(old.key, winner, old.version, None)
    with pytest.raises(Gone):
        store.replace(old.key, loser, old.version, None)
    stale = a_record(time.time)
    with pytest.raises(Stale):
        store.replace(winner.key, stale, winner.version + 1, None)
    assert store.load(winner.key) == winner
    for record in (loser, stale):
        assert store.load(record.key) is None


READING_FROM_REPLICAS = (
    {"load_balancing_strategy": redis.cluster.LoadBalancingStrategy.RANDOM_REPLICA}
    if hasattr(redis.cluster, "LoadBalancingStrategy")
    else {"read_from_replicas": True}  # in redis-py before 5.3
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode_responses": True},
        READING_FROM_REPLICAS,
    ],
    ids=["plain", "decoding", "reading from replicas"],
)
def test_a_cluster_client_gives_its_nodes_and_options(
    cluster: RedisCluster, open_shop: Opener, options: dict[str, Any]
) -> None:
    node = cluster.primary()
    for each in cluster.nodes:
        each.command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all")
    with ClusterClient(
        host=HOST, port=node.port, username="app", password="secret", **options
    ) as client:
        shop = open_shop(client)
        assert [shop.count() for _ in range(3)] == [1, 2, 3]
        key = shop.key()
        shop.visitor.run(lambda s: s.rotate(grace=0))
        assert shop.store.load(key) is None
        assert shop.count() == 4
        made = [
            slot.connection
            for pool in shop.store.commands.pool._pools.values()
            for slot in pool._lent.idle
        ]
        assert {each.username for each in made if each} == {"app"}
        assert not any(each.redis_connect_func for each in made if each)  # it may ask for replicas
        shop.store.close()
        assert client.ping()  # it is not ours to close


def test_a_cluster_that_cannot_be_reached(open_shop: Opener) -> None:
    shop = open_shop(f"redis+cluster://{HOST}:{free_port()},{HOST}:{free_port()}")
    with pytest.raises(StoreUnavailable, match="no node of the cluster answers; ConnectionError"):
        shop.store.load("A" * 43)


def test_a_server_that_is_not_a_cluster(own_redis: RedisServer, open_shop: Opener) -> None:
    shop = open_shop(own_redis.url.replace("redis:", "redis+cluster:"))
    with pytest.raises(StoreUnavailable, match="cluster support disabled"):
        shop.store.load("A" * 43)


# TLS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "path", "said"),
    [
        ("rediss+cluster", "", "cluster support disabled"),
        ("rediss+sentinel", "/sessions", r"unknown command .SENTINEL"),
    ],
)
def test_tls_with_our_own_authority_reaches_the_servers(
    redis_tls: RedisTLS, open_shop: Opener, scheme: str, path: str, said: str
) -> None:
    """The server is neither a sentinel nor in a cluster, and says so over TLS."""
    assert open_shop(redis_tls.url).count() == 1
    address = f"{scheme}://{HOST}:{redis_tls.tls_port}{path}"
    options = redis_tls.url.partition("?")[2]
    with pytest.raises(StoreUnavailable, match=said):
        open_shop(f"{address}?{options}").store.load("A" * 43)
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        open_shop(address).store.load("A" * 43)


# Both ------------------------------------------------------------------------------------------


@pytest.fixture(params=["sentinels", "cluster"])
def several(request: pytest.FixtureRequest) -> RedisSentinels | RedisCluster:
    servers: RedisSentinels | RedisCluster = request.getfixturevalue(request.param)
    return servers


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("fork", [os.fork, ctypes.PyDLL(None).fork], ids=["Python's", "C's"])
def test_a_fork_shares_no_connection(
    fork: Callable[[], int], several: RedisSentinels | RedisCluster, open_shop: Opener
) -> None:
    shop = open_shop(several.url)
    assert shop.count() == 1
    pid = fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if all(shop.count() for _ in range(50)) else 2
        finally:
            os._exit(code)
    counts = [shop.count() for _ in range(50)]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert counts == sorted(set(counts))
    assert shop.visitor.run(lambda s: s["count"]) == 101


def test_many_threads_start_at_once(
    several: RedisSentinels | RedisCluster, open_shop: Opener
) -> None:
    shop = open_shop(several.url, pool_max=4)
    records = [a_record(time.time) for _ in range(40)]

    def live(record: Record) -> bool:
        shop.store.create(record)
        return bool(shop.store.load(record.key) == record and shop.store.delete(record.key))

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(live, records))


# Logouts that replicas confirm ------------------------------------------------------------------


@contextmanager
def all_paused(members: Sequence[RedisMember]) -> Iterator[None]:
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(member.paused())
        yield


class Confirmed:
    """A visitor with a session, and the replicas that are to confirm its end."""

    def __init__(self, servers: RedisSentinels | RedisCluster, open_shop: Opener) -> None:
        self.servers = servers
        self.count = 2 if isinstance(servers, RedisSentinels) else 1
        self.shop = open_shop(servers.url, logout_replicas=self.count)
        self.visitor = self.shop.visitor
        self.site = self.shop.site
        assert self.shop.count() == 1
        self.key = self.shop.key()
        self.name = self.shop.store.commands.names.record(self.key).decode()
        if isinstance(servers, RedisSentinels):
            self.primary: RedisMember = servers.primary()
            self.replicas: Sequence[RedisMember] = servers.replicas()
        else:
            self.primary = servers.primary(self.shop.slot())
            self.replicas = [servers._replica_of(servers.primary(self.shop.slot()))]

    def has(self, member: RedisMember, name: str) -> bool:
        if member.command("ROLE")[0] == "master":
            return bool(member.command("EXISTS", name))
        return name in member.command("KEYS", "*")

    def writes(self) -> int:
        """The number of SET commands at the primary: `WAIT` waits for writes."""
        stats = str(self.primary.command("INFO", "commandstats"))
        return int(re.search(r"cmdstat_set:calls=(\d+)", stats)[1])  # type: ignore[index]

    def blobs(self) -> list[str]:
        """The names of all large values on the servers that take writes."""
        one = isinstance(self.servers, RedisSentinels)
        members = [self.primary] if one else self.servers.primaries()  # type: ignore[union-attr]
        pattern = f"{self.shop.store.commands.names.prefix}blob:*"
        return [name for member in members for name in member.command("KEYS", pattern)]

    def old_token(self) -> Any:
        """A browser that still has the cookie of now."""
        return self.visitor.another_tab()


@pytest.fixture
def confirmed(several: RedisSentinels | RedisCluster, open_shop: Opener) -> Confirmed:
    return Confirmed(several, open_shop)


def test_a_confirmed_logout_is_on_the_replicas_when_it_returns(confirmed: Confirmed) -> None:
    until(lambda: all(confirmed.has(r, confirmed.name) for r in confirmed.replicas), "the copies")

    def log_out(s: Any) -> list[bool]:
        s.destroy()
        return [confirmed.has(replica, confirmed.name) for replica in confirmed.replicas]

    assert confirmed.visitor.run(log_out) == [False] * confirmed.count


def test_an_unconfirmed_logout_is_reported(
    confirmed: Confirmed, caplog: pytest.LogCaptureFixture
) -> None:
    tab = confirmed.old_token()
    with all_paused(confirmed.replicas):
        with confirmed.shop.hasty():
            answer = confirmed.visitor.ask(lambda s: s.destroy())
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        assert confirmed.visitor.cookie is None  # it is over all the same
        assert not confirmed.has(confirmed.primary, confirmed.name)
        assert tab.run(dict) == {}
        before = confirmed.writes()
        with confirmed.shop.hasty():  # nothing to do, and still not confirmed
            deleted = confirmed.shop.store.delete(confirmed.key)
        assert not deleted.found
        assert f"0 of {confirmed.count} replicas" in deleted.unconfirmed
        assert confirmed.writes() > before
    ended = [each for each in confirmed.site.events if isinstance(each, SessionDestroyed)]
    assert [each.handle for each in ended] == [confirmed.key]
    assert "not confirmed" in caplog.text
    assert confirmed.shop.store.delete(confirmed.key) == Deleted(False)


@pytest.mark.parametrize("how", ["unseen", "seen", "cleared"])
def test_an_unconfirmed_logout_takes_the_large_values_along(confirmed: Confirmed, how: str) -> None:
    """They are of no use to anybody, since the session is over as far as this process knows.

    A replica of the same primary that takes over has heard of the end of the session before that
    of the values: so it has both, or the values only. Where the values are elsewhere, in a cluster,
    a session that came back so would lack them.
    """
    confirmed.visitor.run(lambda s: s.update(rows=b"x" * 20_000))
    assert len(confirmed.blobs()) == 1

    def log_out(s: Any) -> None:
        if how != "unseen":
            assert s["rows"]
        (s.clear if how == "cleared" else s.destroy)()

    with all_paused(confirmed.replicas), confirmed.shop.hasty():
        assert confirmed.visitor.ask(log_out).status_code == 503
        assert not confirmed.has(confirmed.primary, confirmed.name)
        assert confirmed.blobs() == []


def test_a_cleared_session_is_confirmed_too(confirmed: Confirmed) -> None:
    with all_paused(confirmed.replicas), confirmed.shop.hasty():
        assert confirmed.visitor.ask(lambda s: s.clear()).status_code == 503
    assert confirmed.visitor.cookie is None
    assert not confirmed.has(confirmed.primary, confirmed.name)
    assert [type(event).__name__ for event in confirmed.site.events][-1] == "SessionDestroyed"


def test_an_unconfirmed_rotation_gives_the_new_token_all_the_same(confirmed: Confirmed) -> None:
    tab = confirmed.old_token()

    def log_in(s: Any) -> None:
        s["user"] = "mira"
        s.rotate(grace=0)

    with all_paused(confirmed.replicas):
        with confirmed.shop.hasty():
            assert confirmed.visitor.ask(log_in).status_code == 503
        assert confirmed.visitor.run(dict) == {"count": 1, "user": "mira"}
        assert tab.run(dict) == {}
    assert not any(isinstance(event, WriteDropped) for event in confirmed.site.events)


def test_users_on_several_servers(
    several: RedisSentinels | RedisCluster, open_shop: Opener
) -> None:
    """In a cluster, a roster and its sessions are in slots of different primaries."""
    site = open_shop(several.url).site
    visitors = [site.visitor() for _ in range(6)]
    for visitor in visitors:
        visitor.run(lambda s: s.bind("mira"))
    visitors[0].run(lambda s: s.rotate())
    visitors[1].run(lambda s: s.rotate(grace=0))
    visitors[2].run(lambda s: s.destroy())
    with site.app.app_context():
        users = site.ext.users
        devices = {device.id for device in users.devices("mira")}
        assert len(devices) == 5
        assert devices == {visitor.run(lambda s: s.device_id) for visitor in visitors} - {None}
        assert users.revoke("mira", visitors[3].run(lambda s: s.device_id))
        assert visitors[4].run(lambda s: users.revoke_others()) == 3
        assert [visitor.run(lambda s: s.owner) for visitor in visitors].count("mira") == 1
        assert users.revoke_all("mira") == 1
    assert {visitor.run(lambda s: s.owner) for visitor in visitors} == {None}


def test_a_roster_outlives_a_failover(sentinels: RedisSentinels, open_shop: Opener) -> None:
    shop = open_shop(sentinels.url)
    shop.visitor.run(lambda s: s.bind("mira"))
    caught_up(sentinels)
    sentinels.wait_for_failover(sentinels.failover())
    shop.recovers()
    with shop.site.app.app_context():
        until(lambda: _ended(shop), "the revocation after the failover")
    assert shop.visitor.run(lambda s: s.owner) is None


def _ended(shop: Shop) -> bool:
    try:
        return shop.site.ext.users.revoke_all("mira") == 1
    except StoreUnavailable:
        return False


def test_a_revocation_waits_for_the_replicas(confirmed: Confirmed) -> None:
    users = confirmed.site.ext.users
    confirmed.visitor.run(lambda s: s.bind("mira"))
    tab, key = confirmed.old_token(), confirmed.shop.key()
    name = confirmed.shop.store.commands.names.record(key).decode()
    servers, replicas = confirmed.servers, confirmed.replicas
    if isinstance(servers, RedisCluster):  # signing in moved it to another slot
        replicas = [servers._replica_of(servers.primary(confirmed.shop.slot()))]
    with confirmed.site.app.app_context():
        with all_paused(replicas):
            for _ in range(2):  # nothing is left to end, and it is still not confirmed
                with confirmed.shop.hasty(), pytest.raises(RevocationUnfinished):
                    users.revoke_all("mira")
            assert tab.run(dict) == {}
            assert users.devices("mira") == []
        assert users.revoke_all("mira") == 1
    assert not any(confirmed.has(replica, name) for replica in replicas)


def test_only_logouts_wait_for_replicas(confirmed: Confirmed) -> None:
    with all_paused(confirmed.replicas):
        confirmed.visitor.run(lambda s: s.rotate(grace=5))
        assert confirmed.shop.count() == 2


@pytest.mark.parametrize("how", ["destroy", "clear", "rotate"])
def test_a_repeat_on_another_connection_waits_for_the_first_try(
    confirmed: Confirmed, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store: Any = confirmed.shop.store
    ask, lost = Slot.ask, []

    def lose_one(slot: Slot, request: bytes) -> Any:
        answer = ask(slot, request)  # raises where this node does not know the script yet
        if request.split(b"\r\n")[2].startswith(b"EVAL") and not lost:
            lost.append(confirmed.writes())
            raise RedisConnectionError("for the test")
        return answer

    with monkeypatch.context() as patch, all_paused(confirmed.replicas):
        patch.setattr(Slot, "ask", lose_one)
        record = store.load(confirmed.key)
        if how == "rotate":
            log_out = partial(store.replace, record.key, a_record(time.time), record.version, None)
        else:
            log_out = partial(store.delete, record.key, record.version if how == "clear" else None)
        with confirmed.shop.hasty():
            assert log_out().unconfirmed
        assert confirmed.writes() > lost[0]  # there is something for WAIT to wait for
        assert store.load(confirmed.key) is None


@pytest.mark.parametrize("several", ["sentinels"], indirect=True)
def test_unconfirmed_logouts_do_not_count_as_an_outage(
    confirmed: Confirmed, store_prefix: str
) -> None:
    """The circuit breaker stays out of it: the store answers."""
    app = Flask(__name__)
    app.secret_key = "a key for tests"
    ext = Session(
        app,
        store=confirmed.shop.store,
        breaker_failures=1,
        key_prefix=store_prefix,
    )

    @app.post("/login")
    def login() -> str:
        session["user"] = "mira"
        return ""

    @app.post("/logout")
    def logout() -> str:
        session.destroy()
        return ""

    client = app.test_client()
    with all_paused(confirmed.replicas):
        for _ in range(2):
            assert client.post("/login").status_code == 200
            with confirmed.shop.hasty():
                assert client.post("/logout").status_code == 503
    ext.close(app)


def test_a_server_without_replicas_confirms_nothing(redis_url: str, open_shop: Opener) -> None:
    shop = open_shop(redis_url, logout_replicas=1)
    assert shop.count() == 1
    with shop.hasty():
        assert shop.visitor.ask(lambda s: s.destroy()).status_code == 503
    assert shop.visitor.run(dict) == {}


def test_a_wait_that_is_refused_is_not_a_confirmation(
    redis_acl: RedisACL, open_shop: Opener
) -> None:
    redis_acl.allow("~* +@all -wait")
    shop = open_shop(redis_acl.url, logout_replicas=1)
    record = a_record(time.time)
    shop.store.create(record)
    deleted = shop.store.delete(record.key)
    assert deleted.found
    assert "WAIT: NoPermissionError" in deleted.unconfirmed
    assert shop.store.load(record.key) is None


# Settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["s3cr3t"])
@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://u:{}@host",
        "redis+sentinel://u:{}@host/",
        "redis+sentinel://u:{}@host/service/one",
        "redis+sentinel://u:{}@/service",
        "redis+sentinel://u:{}@host,,other/service",
        "redis+sentinel://u:{}@host:99999/service",
        "redis+sentinel://u:{}@host/service?no_such_option=1",
        "redis+cluster://u:{}@",
        "redis+cluster://u:{}@host/1",
        "redis+cluster://u:{}@host?db=1",
        "redis+cluster://u:{}@host:port",
        "rediss+cluster://u:{}@host?ssl_cert_reqs=perhaps",
        "redis+other://u:{}@host",
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url: str, secret: str) -> None:
    with pytest.raises(SettingError, match="SESSION_STORE") as refused:
        open_store(url.format(secret), StoreOptions())
    text = "".join(traceback.format_exception(refused.value))
    assert secret not in text.replace(url, "")


@pytest.mark.parametrize("kind", ["rediss", "redis+sentinel", "rediss+cluster"])
def test_a_wrong_option_is_named(kind: str) -> None:
    secret = "hunter2"
    path = "/service" if "sentinel" in kind else ""
    with pytest.raises(SettingError, match=r"check the option no_such_option$") as refused:
        open_store(f"{kind}://u:{secret}@host{path}?no_such_option={secret}", StoreOptions())
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("redis+sentinel://a,b:1,[::1]:2/s", [("a", 26379), ("b", 1), ("::1", 2)]),
        ("rediss+sentinel://a/s/2?ssl_cert_reqs=none", [("a", 26379)]),
        ("redis+sentinel://:p%40ss@a,b/s", [("a", 26379), ("b", 26379)]),
    ],
)
def test_the_sentinels_of_a_url(url: str, addresses: list[tuple[str, int]]) -> None:
    store: Any = open_store(url, StoreOptions())[0]
    made = [make() for make in store.commands.pool._sentinels._makes]
    assert [(each.host, each.port) for each in made] == addresses
    assert all(each.password is None for each in made)
    connection = store.commands.pool.make()
    assert connection.password == ("p@ss" if "p%40ss" in url else None)
    assert (connection.db, "SSL" in type(connection).__name__) == (
        (2, True) if url.startswith("rediss") else (0, False)
    )


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("redis+cluster://a,b:1", [("a", 6379), ("b", 1)]),
        ("redis+cluster://a/0", [("a", 6379)]),
        ("rediss+cluster://u:p@a/", [("a", 6379)]),
    ],
)
def test_the_nodes_of_a_url(url: str, addresses: list[tuple[str, int]]) -> None:
    store: Any = open_store(url, StoreOptions())[0]
    assert store.commands.pool._seeds == addresses
    connection = store.commands.pool._make(host="n", port=7)
    assert (connection.host, connection.port) == ("n", 7)
    assert ("SSL" in type(connection).__name__) == url.startswith("rediss")
    assert connection.password == ("p" if "u:p@" in url else None)


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
def test_every_command(
    kind: str, request: pytest.FixtureRequest, store_prefix: str, tmp_path: Path
) -> None:
    url = request.getfixturevalue(f"redis_{kind}").url
    console = Console(url, key_prefix=store_prefix, store_timeout=PATIENCE)
    for number in range(30):
        with console.app.test_client().session_transaction() as visit:
            visit["number"] = number
    handles = {line.split(" ")[0] for line in console.done("list").splitlines()}
    assert len(handles) == 30
    first, second, *_ = sorted(handles)
    assert first in console.done("show", first)
    console.done("debug", first)
    assert json.loads(console.done("stats", "--json"))["sessions"] == 30
    console.done("cleanup")
    console.done("revoke", second)
    assert second in console.failed("show", second)
    file = str(tmp_path / "sessions")
    assert "29 records exported" in console.done("export", file)
    console.done("revoke", "--all", "--yes")
    assert first in console.failed("show", first)
    assert "29 imported" in console.done("import", file)
    assert first in console.done("show", first)
    rows = json.loads(console.run("doctor", "--json").stdout)
    found = {row["check"]: row["severity"] for row in rows}
    assert {found[name] for name in ("answers", "keeps ended sessions ended", "large values")} == {
        "ok"
    }
    assert "server version" in found
    console.ext.close(console.app)
