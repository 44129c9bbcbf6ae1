"""Changes and beats over gRPC, in one order: proofs, and events that end them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flask_gsession.live.listener import now
from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.sharing import watch as watching
from flask_gsession.sharing.server import Refused
from flask_gsession.sharing.store_service import StoreService
from flask_gsession.sharing.watch import Relay
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.parts import Feed
from flask_gsession.stores.wrappers.near_cache import NearCache
from flask_gsession.testing import FakeClock
from flask_gsession.testing.records import a_record
from tests.harness.servers import RedisServer
from tests.harness.sharing import ServeCommand, serving
from tests.harness.topologies import TCPProxy, until
from tests.live.test_listener import BEAT, Heard, proven, stored
from tests.stores.test_near_cache import BOUND, Scripted

pytest_plugins = ["tests.harness.topologies"]


class Watched:
    """A far store, and one over gRPC whose changes are heard."""

    def __init__(self, far: Store, url: str, timeout: float) -> None:
        self.far = far
        self.store: Any = open_store(url, StoreOptions(timeout=timeout))[0]
        self.heard = Heard()
        self.changes = self.store.changes
        self.changes.subscribe(self.heard, BEAT)
        self.changes.start()


Watches = Callable[..., Watched]


@pytest.fixture
def watches(store_prefix: str) -> Iterator[Watches]:
    """`watches(url)`: a store there, watched through a server in this process."""
    with ExitStack() as stack:

        def start(url: str, timeout: float = 5.0, threads: int = 4, **options: Any) -> Watched:
            far, _ = open_store(url, StoreOptions(prefix=store_prefix, **options))
            address = stack.enter_context(serving(StoreService(far), threads=threads))
            watched = Watched(far, f"grpc://{address}", timeout)
            stack.callback(watched.store.close)
            stack.callback(far.close)
            return watched

        yield start


def test_every_change_arrives_whichever_process_made_it(redis_url: str, watches: Watches) -> None:
    watched = watches(redis_url)
    proven(watched.changes)
    for store in (watched.store, watched.far):
        watched.heard.keys.clear()
        record = stored(store)
        until(lambda key=record.key: watched.heard.keys == [key], "a creation")
        store.save(record._replace(version=1), record.version)
        until(lambda: len(watched.heard.keys) == 2, "a save")
        store.delete(record.key)
        until(lambda: len(watched.heard.keys) == 3, "a deletion")
        assert set(watched.heard.keys) == {record.key}


def test_a_beat_proves_earlier_changes(redis_url: str, watches: Watches) -> None:
    """Whenever the proof has passed the moment of a write, the write was heard."""
    watched = watches(redis_url)
    feed = proven(watched.changes)
    for _ in range(15):
        record = stored(watched.far)
        written = now()
        until(lambda at=written: feed.exact_as_of > at, "a proof")
        assert record.key in watched.heard.keys


def test_a_frozen_far_store_proves_nothing(own_redis: RedisServer, watches: Watches) -> None:
    watched = watches(own_redis.url, timeout=5.0)
    feed = proven(watched.changes)
    with own_redis.paused():
        frozen = now()
        time.sleep(5 * BEAT)
        assert feed.exact_as_of <= frozen
    until(lambda: feed.exact_as_of > frozen, "a proof again")


@pytest.mark.parametrize("where", ["before the server", "behind the server"])
def test_a_cut_begins_another_feed(
    where: str, own_redis: RedisServer, watches: Watches, store_prefix: str
) -> None:
    """Neither feed has changes from the gap, so records kept before it must not outlive it."""
    with ExitStack() as stack:
        if where == "behind the server":
            proxy = stack.enter_context(TCPProxy(own_redis.port))
            watched = watches(f"redis://127.0.0.1:{proxy.port}")
        else:
            far, _ = open_store(own_redis.url, StoreOptions(prefix=store_prefix))
            stack.callback(far.close)
            address = stack.enter_context(serving(StoreService(far)))
            proxy = stack.enter_context(TCPProxy(int(address.rpartition(":")[2])))
            watched = Watched(far, f"grpc://127.0.0.1:{proxy.port}", 5.0)
            stack.callback(watched.store.close)
        feed, losses = proven(watched.changes), watched.heard.losses
        proxy.disconnect()
        until(lambda: watched.heard.losses > losses, "the loss")
        assert proven(watched.changes) is not feed
        record = stored(watched.far)
        until(lambda: record.key in watched.heard.keys, "a change after the cut")


def test_a_server_that_ends_cuts_the_feed(own_redis: RedisServer, store_prefix: str) -> None:
    """At once, also while calls under way have their grace: another may serve new ones by then."""
    far, _ = open_store(own_redis.url, StoreOptions(prefix=store_prefix))
    service = StoreService(far)
    with serving(service) as address:
        watched = Watched(far, f"grpc://{address}", 5.0)
        proven(watched.changes)
        losses = watched.heard.losses
        service.stop()
        until(lambda: watched.heard.losses > losses, "the loss")
        assert watched.changes.feed("k") is None or watched.heard.losses > losses
        watched.store.close()
    far.close()


@pytest.mark.parametrize("url", ["memory", "sqlite", "mongodb"])
def test_a_store_without_proof_is_named_and_nothing_is_kept(
    url: str,
    request: pytest.FixtureRequest,
    watches: Watches,
    caplog: pytest.LogCaptureFixture,
    clock: FakeClock,
) -> None:
    there = "memory://" if url == "memory" else request.getfixturevalue(f"{url}_url")
    watched = watches(there)
    until(lambda: "can't be proven" in caplog.text, "the warning")
    assert watched.changes.feed("k") is None
    cache = NearCache(watched.store, 0.25, 100_000, time.time)
    record = stored(watched.far)
    for _ in range(3):
        assert cache.peek(record.key) is None
        assert cache.load_near(record.key) == record
    assert caplog.text.count("can't be proven") == 1


def test_the_near_cache_on_grpc_is_never_older_than_its_bound(
    redis_url: str, watches: Watches
) -> None:
    """G12: readers through the cache beside a writer; each value says when it was overwritten."""
    bound = 1.0
    watched = watches(redis_url)
    cache = NearCache(watched.store, bound, 100_000, time.time)
    record = a_record(time.time)
    watched.far.create(record)
    ended: dict[int, float] = {}  # by version: when it was certainly no longer current
    over, stale, hits = threading.Event(), [], [0]

    def read() -> None:
        while not over.is_set():
            began = now()
            found = cache.peek(record.key)
            if found is None:
                found = cache.load_near(record.key)
            else:
                hits[0] += 1
            assert found is not None
            end = ended.get(found.version)
            if end is not None and began - end > bound:
                stale.append(began - end)
            time.sleep(0.0005)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        version = record.version
        for number in range(1, 40):
            watched.far.save(record._replace(version=number), version)
            ended[version] = now()
            version = number
            time.sleep(0.02 if number % 4 else 0.3)
    finally:
        over.set()
        for reader in readers:
            reader.join()
    assert stale == []
    assert hits[0] > 100, "the cache was of no use: that shows nothing"


def test_watchers_take_no_thread_from_the_calls(redis_url: str, watches: Watches) -> None:
    watched = watches(redis_url, threads=1)
    proven(watched.changes)
    others = [Watched(watched.far, self_url(watched), 5.0) for _ in range(4)]
    for other in others:
        proven(other.changes)
    assert watched.store.load("x" * 43) is None
    for other in others:
        other.store.close()


def self_url(watched: Watched) -> str:
    return f"grpc://{watched.store.channel.address.target}"


def test_close_ends_the_threads_and_use_begins_again(redis_url: str, watches: Watches) -> None:
    others = set(threading.enumerate())  # of earlier tests
    watched = watches(redis_url)
    proven(watched.changes)
    watched.store.close()
    names = ("gsession-watch", "gsession-watched")
    until(
        lambda: not any(t.name in names and t not in others for t in threading.enumerate()),
        "the end of threads",
    )
    proven(watched.changes)


def test_a_forked_process_watches_for_itself(redis_url: str, tmp_path: Path) -> None:
    """A fork ends the stream, with its threads inside of gRPC; parent and child go on."""
    settings = {"SESSION_STORE": redis_url, "SESSION_KEY_PREFIX": "test-fork:"}
    with ServeCommand(tmp_path / "serve", settings) as far:
        store: Any = open_store(far.url, StoreOptions(timeout=10))[0]
        heard = Heard()
        store.changes.subscribe(heard, BEAT)
        store.changes.start()
        proven(store.changes)
        for _ in range(3):
            child = os.fork()
            if not child:
                status = 1
                try:
                    proven(store.changes)
                    record = stored(store)
                    until(lambda key=record.key: key in heard.keys, "a change in the child")
                    store.delete(record.key)
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            proven(store.changes)
            record = stored(store)
            until(lambda key=record.key: key in heard.keys, "a change in the parent")
            store.delete(record.key)
        store.close()


IN_GEVENT = """
from gevent import monkey

monkey.patch_all()
import sys, time
import gevent
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.wrappers.near_cache import NearCache
from flask_gsession.testing import a_record

store = open_store(sys.argv[1], StoreOptions(timeout=10))[0]
cache = NearCache(store, 2.0, 100_000, time.time)
record = a_record(time.time)
store.create(record)
turns = []
gevent.spawn(lambda: [turns.append(gevent.sleep(0.001)) for _ in range(10_000)])
end = time.monotonic() + 20
while cache.peek(record.key) is None and time.monotonic() < end:
    cache.load_near(record.key)
    gevent.sleep(0.005)
assert cache.peek(record.key) == record
store.delete(record.key)
assert cache.load_near(record.key) is None
assert len(turns) > 1, "the other greenlets had no turn"
store.close()
print("done")
"""


def test_gevent(redis_url: str, tmp_path: Path, store_prefix: str) -> None:
    settings = {"SESSION_STORE": redis_url, "SESSION_KEY_PREFIX": store_prefix}
    with ServeCommand(tmp_path / "serve", settings) as far:
        run = subprocess.run(
            [sys.executable, "-c", IN_GEVENT, far.url], capture_output=True, text=True, timeout=60
        )
        assert run.stdout == "done\n", run.stderr


# Several servers behind one name ------------------------------------------------------------------


def test_a_load_from_another_server_is_not_kept(
    redis_url: str, store_prefix: str, watches: Watches
) -> None:
    """The stream is of one server, and a new connection leads to another: neither proves the other.

    The other one may read from a primary that was replaced, as tests/simulation/near_cache_model.py
    plays it.
    """
    watched = watches(redis_url)
    with (
        serving(StoreService(watched.far)) as other,
        TCPProxy(int(self_url(watched).rpartition(":")[2])) as proxy,
    ):
        store: Any = open_store(f"grpc://127.0.0.1:{proxy.port}", StoreOptions(timeout=5.0))[0]
        cache = NearCache(store, 5.0, 100_000, time.time)
        record = stored(watched.far)
        feed = proven(store.changes)
        assert cache.load_near(record.key) == record
        until(lambda: cache.peek(record.key) == record, "a proof")
        proxy.target = int(other.rpartition(":")[2])
        store.channel._drop()  # as after its certificates were renewed
        assert store.changes.feed("k") is feed
        changed = record._replace(payload=b"changed", version=7)
        watched.far.save(changed, record.version)
        assert cache.load_near(record.key) == changed
        assert cache.peek(record.key) is None
        assert store.changes.feed("k") is not feed
        proven(store.changes)
        cache.load_near(record.key)
        until(lambda: cache.peek(record.key) == changed, "the other server's proof")
        store.close()


def test_calls_that_are_spread_over_servers_are_named_and_not_kept(
    redis_url: str, watches: Watches, caplog: pytest.LogCaptureFixture
) -> None:
    """By a proxy that sends each call where it likes."""

    class Spread(StoreService):
        """Loads are answered by others than the stream's."""

        def _load(self, request: Any) -> Any:
            reply = super()._load(request)
            if request.name_server:
                reply.server += 1
            return reply

    watched = watches(redis_url)
    with serving(Spread(watched.far)) as address:
        store: Any = open_store(f"grpc://{address}", StoreOptions(timeout=5.0))[0]
        cache = NearCache(store, 5.0, 100_000, time.time)
        record = stored(watched.far)
        proven(store.changes)

        def is_named() -> bool:
            assert cache.load_near(record.key) == record
            assert cache.peek(record.key) is None
            return "reach different servers" in caplog.text

        until(is_named, "the warning")
        for _ in range(20):
            is_named()
        assert caplog.text.count("reach different servers") == 1
        store.close()


# The relay --------------------------------------------------------------------------------------


def waiting(*beats: int) -> Relay:
    """A relay with beats that arrived just now."""
    relay = Relay()
    relay._beats.extend((beat, now()) for beat in beats)
    return relay


def test_a_beat_waits_until_the_far_store_has_proven_its_arrival() -> None:
    feed, relay = Feed(), waiting(1)
    feed.exact_as_of = now() - 1  # proven before it arrived
    relay.changed(["a"])
    assert relay.wait(feed, 0) == (["a"], [])
    relay.changed(["b"])
    feed.exact_as_of = now()
    assert relay.wait(feed, 0) == (["b"], [1])


def test_changes_come_before_the_answer_that_proves_them() -> None:
    """The proof rises while the relay looks: whatever it proves was heard before."""
    relay = waiting(1)

    class Rising:
        @property
        def exact_as_of(self) -> float:
            relay._keys["heard just before"] = None
            return now() + 1

    feed: Any = Rising()
    assert relay.wait(feed, 0) == (["heard just before"], [1])


def test_a_loss_ends_the_stream_before_any_further_answer() -> None:
    feed, relay = Feed(), waiting(1)
    feed.exact_as_of = now() + 1
    relay.lost()
    with pytest.raises(Refused, match="lost"):
        relay.wait(feed, 0)


def test_a_slow_watcher_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MOST_KEYS", 3)
    relay = Relay()
    relay.changed(["a", "b", "c", "d"])
    with pytest.raises(Refused, match="too slow"):
        relay.wait(Feed(), 0)


def test_another_feed_ends_the_stream(store_prefix: str) -> None:
    """Nothing reports the changes between the two."""
    changes = Scripted()
    left = threading.Event()

    def requests() -> Iterator[Any]:
        yield pb.WatchRequest(interval=BOUND)  # the cache of which asks for a quarter
        left.wait(20)

    replies = watching.watch(changes, requests(), 1.0, lambda: False)
    assert next(replies).started
    changes.one = Feed()
    with pytest.raises(Refused, match="lost"):
        list(replies)
    assert changes.subscribers == []
    left.set()
