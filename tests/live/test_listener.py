"""The listener: hears of every change at a server, and knows up to when it has heard them all."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

import pytest
from redis import Redis

from flask_gsession.errors import StoreUnavailable
from flask_gsession.live.listener import Heard as HeardOf
from flask_gsession.live.listener import Listener, now
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import Record
from flask_gsession.stores.parts import NEVER, Changes, Feed, Subscriber
from flask_gsession.testing.records import a_record
from tests.harness.servers import RedisServer
from tests.harness.topologies import (
    MongoReplicaSet,
    RedisACL,
    RedisCluster,
    RedisSentinels,
    TCPProxy,
    until,
)

pytest_plugins = ["tests.harness.topologies"]

BEAT = 0.02  # seconds


class Heard(Subscriber):
    def __init__(self) -> None:
        self.keys: list[str] = []
        self.losses = 0

    def changed(self, keys: Iterable[str]) -> None:
        self.keys += keys

    def lost(self) -> None:
        self.losses += 1


Listens = Callable[..., tuple[Store, Changes, Heard]]


@pytest.fixture
def listens(store_prefix: str) -> Iterator[Listens]:
    """A store whose changes are heard: `listens(url_or_client, **options)`."""
    stores: list[Store] = []

    def open_one(source: Any, **options: Any) -> tuple[Store, Changes, Heard]:
        store, _ = open_store(source, StoreOptions(prefix=store_prefix, **options))
        stores.append(store)
        assert store.changes is not None
        heard = Heard()
        store.changes.subscribe(heard, BEAT)
        store.changes.start()
        return store, store.changes, heard

    yield open_one
    for store in stores:
        store.close()


def proven(changes: Changes, key: str = "k") -> Feed:
    """The feed, once it has proven something."""

    def exact() -> Feed | None:
        feed = changes.feed(key)
        return feed if feed is not None and feed.exact_as_of != NEVER else None

    return until(exact, "a feed that proves something")


def listeners() -> set[threading.Thread]:
    """The threads that listen for changes."""
    return {each for each in threading.enumerate() if each.name == "gsession-listener"}


def stored(store: Store) -> Record:
    record = a_record(time.time)
    store.create(record)
    return record


def test_every_kind_of_change_arrives(redis_url: str, listens: Listens) -> None:
    store, changes, heard = listens(redis_url)
    proven(changes)
    record = stored(store)
    until(lambda: heard.keys == [record.key], "a creation")
    store.save(record._replace(version=1), record.version)
    until(lambda: len(heard.keys) == 2, "a save")
    store.renew(record._replace(version=1), record.idle_expires_at + 1000)
    until(lambda: len(heard.keys) == 3, "a renewal")
    store.delete(record.key)
    until(lambda: len(heard.keys) == 4, "a deletion")
    assert set(heard.keys) == {record.key}


@pytest.fixture
def replica_set_url(mongo_replica_set: MongoReplicaSet) -> str:
    return mongo_replica_set.url


@pytest.mark.parametrize("kind", ["memory", "sqlite", "mongodb", "replica_set"])
def test_stores_that_prove_nothing_report_changes_too(
    kind: str, listens: Listens, request: pytest.FixtureRequest
) -> None:
    """Each change, or that there were some; made by this process, or by another one."""
    url = "memory://" if kind == "memory" else request.getfixturevalue(f"{kind}_url")
    store, changes, heard = listens(url)
    other = store if kind == "memory" else listens(url)[0]
    assert changes.unproven
    until(lambda: kind == "memory" or changes.feed("k") is not None, "the listener", 10)
    for writer in (store, other):
        record = a_record(time.time)
        renewed = record.idle_expires_at + 1000
        for work in (
            lambda: writer.create(record),  # noqa: B023  # called at once
            lambda: writer.save(record._replace(version=1), record.version),  # noqa: B023
            lambda: writer.renew(record._replace(version=1), renewed),  # noqa: B023
            lambda: writer.delete(record.key),  # noqa: B023
        ):
            losses, heard.keys[:] = heard.losses, []
            work()
            until(lambda: record.key in heard.keys or heard.losses > losses, "a change")  # noqa: B023
            if kind in ("memory", "replica_set"):
                assert heard.keys == [record.key]
    feed = changes.feed("k")
    assert feed is None or feed.exact_as_of == NEVER


def test_an_expiry_is_reported(redis_url: str, redis_client: Redis, listens: Listens) -> None:
    store, changes, heard = listens(redis_url)
    record = stored(store)
    proven(changes)
    heard.keys.clear()
    (name,) = redis_client.keys(f"*{record.key}*")
    redis_client.pexpire(name, 1)
    until(lambda: record.key in heard.keys, "an expiry")


def test_the_proof_is_less_than_three_beats_old(redis_url: str, listens: Listens) -> None:
    _, changes, _ = listens(redis_url)
    feed = proven(changes)
    started, first = now(), feed.exact_as_of
    until(lambda: feed.exact_as_of >= started, "a proof of what was before the start")
    assert feed.exact_as_of > first


def test_a_server_that_is_frozen_proves_nothing(own_redis: RedisServer, listens: Listens) -> None:
    _, changes, _ = listens(own_redis.url, timeout=5.0)
    feed = proven(changes)
    with own_redis.paused():
        frozen = now()
        time.sleep(5 * BEAT)
        assert feed.exact_as_of <= frozen
    until(lambda: feed.exact_as_of > frozen, "the server proving again")


def test_late_answers_prove_only_changes_before_the_request(
    own_redis: RedisServer, listens: Listens
) -> None:
    with TCPProxy(own_redis.port) as proxy:
        _, changes, _ = listens(f"redis://127.0.0.1:{proxy.port}", timeout=5.0)
        feed = proven(changes)
        with proxy.delay(0.3):
            time.sleep(0.4)
            for _ in range(5):
                proof = feed.exact_as_of  # first: it may rise at any time
                assert now() - proof >= 0.3
                time.sleep(BEAT)


def test_a_cut_begins_another_feed(own_redis: RedisServer, listens: Listens) -> None:
    with TCPProxy(own_redis.port) as proxy:
        store, changes, heard = listens(f"redis://127.0.0.1:{proxy.port}")
        feed = proven(changes)
        losses = heard.losses
        proxy.disconnect()
        until(lambda: heard.losses > losses, "the loss")
        assert proven(changes) is not feed
        record = stored(store)
        until(lambda: record.key in heard.keys, "a change after the cut")


def test_a_flush_is_a_loss(own_redis: RedisServer, listens: Listens) -> None:
    _, changes, heard = listens(own_redis.url)
    proven(changes)
    losses = heard.losses
    with Redis.from_url(own_redis.url) as client:
        client.flushall()
    until(lambda: heard.losses > losses, "the loss")


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_client_of_the_application_serves_too(
    redis_url: str, listens: Listens, protocol: int
) -> None:
    with Redis.from_url(redis_url, protocol=protocol, decode_responses=True) as client:
        store, changes, heard = listens(client)
        proven(changes)
        record = stored(store)
        until(lambda: record.key in heard.keys, "a change")


def test_a_missing_permission_is_named(
    redis_acl: RedisACL, listens: Listens, caplog: pytest.LogCaptureFixture
) -> None:
    redis_acl.allow("~* +@all -client")
    store, changes, _ = listens(redis_acl.url)
    until(lambda: "+client|tracking" in caplog.text, "the warning")
    assert changes.feed("k") is None
    stored(store)  # all else works
    redis_acl.allow("~* +@all +client")
    proven(changes)
    assert caplog.text.count("+client|tracking") == 1


def test_close_ends_the_thread_and_use_begins_again(redis_url: str, listens: Listens) -> None:
    before = set(threading.enumerate())  # of earlier tests, which may end
    store, changes, _ = listens(redis_url)
    proven(changes)
    assert listeners() - before
    store.close()
    until(lambda: not listeners() - before, "the end of the thread")
    proven(changes)
    store.close()


def test_the_last_to_leave_ends_the_thread(redis_url: str, listens: Listens) -> None:
    before = set(threading.enumerate())
    _, changes, heard = listens(redis_url)
    other = Heard()
    changes.subscribe(other)
    proven(changes)
    changes.unsubscribe(heard)
    assert listeners() - before
    changes.unsubscribe(other)
    until(lambda: not listeners() - before, "the end of the thread")
    assert changes.feed("k") is None


def test_a_forked_process_listens_for_itself(redis_url: str, listens: Listens) -> None:
    store, changes, heard = listens(redis_url)
    feed = proven(changes)
    child = os.fork()
    if not child:
        status = 1
        try:
            assert changes.feed("k") is not feed
            proven(changes)
            record = stored(store)
            until(lambda: record.key in heard.keys, "a change in the child", 10)
            store.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    last = feed.exact_as_of
    until(lambda: feed.exact_as_of > last, "the parent going on")
    assert changes.feed("k") is feed


def test_the_listener_follows_a_failover(redis_sentinels: RedisSentinels, listens: Listens) -> None:
    store, changes, heard = listens(redis_sentinels.url, timeout=5.0)
    feed = proven(changes)
    old = redis_sentinels.kill_primary()
    redis_sentinels.wait_for_failover(old)
    assert proven(changes) is not feed

    keys = set()

    def heard_of_one() -> bool:
        keys.add(stored(store).key)
        return not keys.isdisjoint(heard.keys)

    until(heard_of_one, "a change at the new primary")
    redis_sentinels.start()


def test_changes_at_each_primary_of_a_cluster_arrive(
    redis_cluster: RedisCluster, listens: Listens
) -> None:
    store, changes, heard = listens(redis_cluster.url, timeout=5.0)
    stored(store)
    records = [stored(store) for _ in range(30)]
    feeds = {id(proven(changes, record.key)) for record in records}
    assert len(feeds) == 3
    for record in records:
        store.delete(record.key)
    until(lambda: {record.key for record in records} <= set(heard.keys), "changes at all nodes")


@pytest.mark.parametrize("of_client", [False, True], ids=["URL", "client"])
def test_a_connection_that_leads_elsewhere_moves_the_listener(
    own_redis: RedisServer, listens: Listens, of_client: bool
) -> None:
    """As where a name leads to another server from now on, and the old one stays alive."""
    with RedisServer() as first:
        client = Redis.from_url(first.url)
        store: Any
        store, changes, heard = listens(client if of_client else first.url)
        feed = proven(changes)
        kept = heard.losses
        for connection in (store.commands.pool.make, client.connection_pool.connection_kwargs):
            where = getattr(connection, "keywords", connection)
            where.update(host="127.0.0.1", port=own_redis.port)
        client.connection_pool.disconnect()
        store.commands.pool.close()
        record = a_record(time.time)
        assert store.load(record.key) is None  # from the other server
        assert heard.losses > kept
        assert changes.feed(record.key) is None
        assert proven(changes) is not feed
        store.create(record)
        until(lambda: record.key in heard.keys, "a change at the other server")
        client.close()


def test_listening_to_a_file_leaves_it_usable_in_a_forked_process(
    sqlite_url: str, listens: Listens
) -> None:
    """SQLite damages a file that is open while a process is forked."""
    store, changes, heard = listens(sqlite_url)
    until(lambda: changes.feed("k") is not None, "the listener")
    child = os.fork()
    if not child:
        status = 1
        try:
            stored(store)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    losses = heard.losses
    stored(store)
    until(lambda: heard.losses > losses, "the parent going on")


class Silent:
    """A source whose server answers only if the test lets it."""

    unproven, one_feed, timeout = "", True, 30.0

    def __init__(self) -> None:
        self.beats = 0
        self.answers: SimpleQueue[int] = SimpleQueue()
        self.moved = self.shifted = bool

    def servers(self) -> Iterable[str]:
        return ("",)

    def server_of(self, key: str) -> str:
        return ""

    def open(self, server: object) -> Silent:
        return self

    def read(self, seconds: float) -> HeardOf:
        try:
            answers = self.answers.get(timeout=min(seconds, 0.01))
        except Empty:
            return HeardOf([])
        if not answers:
            raise StoreUnavailable("cut")
        return HeardOf([], answers)

    def beat(self) -> None:
        self.beats += 1

    def shut(self) -> None:
        self.answers.put(0)

    def close(self) -> None:
        pass


def test_two_beats_are_unanswered_at_most_and_the_last_one_proves_nothing() -> None:
    source = Silent()
    listener = Listener(source)
    listener.subscribe(Heard(), 0.001)
    listener.start()
    until(lambda: source.beats == 2, "two beats")
    time.sleep(0.1)
    assert source.beats == 2
    feed = listener.feed("k")
    assert feed is not None
    source.answers.put(1)
    until(lambda: source.beats == 3, "the third beat")
    assert feed.exact_as_of == NEVER
    before = now()
    source.answers.put(1)
    until(lambda: feed.exact_as_of != NEVER, "the proof")
    assert feed.exact_as_of < before  # when the first one was sent
    listener.close()


def test_after_a_cut_two_answers_are_needed_again() -> None:
    source = Silent()
    listener = Listener(source)
    heard = Heard()
    listener.subscribe(heard, 0.001)
    listener.start()
    until(lambda: source.beats == 2, "two beats")
    source.answers.put(2)
    first = proven(listener)
    until(lambda: source.beats == 4, "two more beats")
    source.answers.put(0)
    until(lambda: listener.feed("k") not in (None, first), "another feed")
    feed = listener.feed("k")
    assert feed is not None
    until(lambda: source.beats == 6, "two beats after the cut")
    source.answers.put(1)
    until(lambda: source.beats == 7, "the answer")
    assert feed.exact_as_of == NEVER
    source.answers.put(1)
    until(lambda: feed.exact_as_of != NEVER, "the proof")
    assert heard.losses
    listener.close()
