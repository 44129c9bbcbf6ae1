"""The near cache: the records it keeps and uses, and the interleavings that must prevent a use.

Whether the whole is never older than its bound: tests/guarantees/test_g12_freshness.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from flask_gsession.live import listener
from flask_gsession.stores import StoreOptions
from flask_gsession.stores.base import Record, new_version
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.parts import Changes, Feed, Subscriber
from flask_gsession.stores.wrappers import near_cache
from flask_gsession.stores.wrappers.near_cache import NearCache
from flask_gsession.testing import FakeClock, HookedStore
from flask_gsession.testing.records import a_pointer, a_record

BOUND = 0.25


class Scripted(Changes):
    """Changes that the test makes up, all on one feed."""

    def __init__(self) -> None:
        self.subscribers: list[Subscriber] = []
        self.one: Feed | None = Feed()
        self.prove()

    @property
    def unproven(self) -> str:
        return ""

    @property
    def one_feed(self) -> bool:
        return True

    @property
    def trouble(self) -> str:
        return ""

    def prove(self) -> None:
        assert self.one is not None
        self.one.exact_as_of = listener.now() + 1000  # as if the test took no time

    def subscribe(self, subscriber: Subscriber, interval: float | None = None) -> None:
        assert interval == BOUND / 4
        self.subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        self.subscribers.remove(subscriber)

    def feed(self, key: str) -> Feed | None:
        return self.one

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def report(self, *keys: str) -> None:
        for subscriber in self.subscribers:
            subscriber.changed(keys)

    def lose(self) -> None:
        for subscriber in self.subscribers:
            subscriber.lost()


@pytest.fixture
def changes() -> Scripted:
    return Scripted()


@pytest.fixture
def store(clock: FakeClock, changes: Scripted) -> HookedStore:
    """The store inside the cache; `store.calls` are the calls that reach it."""
    inner = MemoryStore(StoreOptions(clock=clock))
    inner.changes = changes
    return HookedStore(inner)


@pytest.fixture
def cache(store: HookedStore, clock: FakeClock) -> NearCache:
    return NearCache(store, BOUND, 1_000_000, clock)


@pytest.fixture
def record(store: HookedStore, clock: FakeClock) -> Record:
    """Is in the store."""
    record = a_record(clock)
    store.create(record)
    store.calls.clear()
    return record


def newer(record: Record) -> Record:
    return record._replace(version=new_version(), payload=b"newer")


def read(cache: NearCache, key: str, version: int | None = None) -> Record | None:
    return cache.peek(key, version) or cache.load_near(key)


def test_a_cached_record_is_read_without_the_store(
    cache: NearCache, store: HookedStore, record: Record
) -> None:
    assert [read(cache, record.key) for _ in range(3)] == [record] * 3
    assert store.calls == ["load"]
    assert cache.figures()[:3] == (2, 1, 0)


def test_the_verb_load_always_asks_the_store(
    cache: NearCache, store: HookedStore, record: Record
) -> None:
    read(cache, record.key)
    cache.load(record.key)
    assert store.calls == ["load"] * 2


def test_a_reported_change_ends_it(cache: NearCache, changes: Scripted, record: Record) -> None:
    read(cache, record.key)
    changes.report(record.key)
    assert cache.peek(record.key) is None


def test_a_loss_ends_all(cache: NearCache, changes: Scripted, record: Record) -> None:
    read(cache, record.key)
    changes.lose()
    assert cache.peek(record.key) is None


@pytest.mark.parametrize("event", ["report", "report of another", "loss", "own write"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_record_that_changes_during_its_load_is_not_cached(
    cache: NearCache,
    store: HookedStore,
    changes: Scripted,
    record: Record,
    event: str,
    when: str,
) -> None:
    def happen() -> None:
        if event == "own write":
            cache.save(newer(record), record.version)
        elif event == "loss":
            changes.lose()
        else:
            changes.report(record.key if event == "report" else "another")

    hook = store.before if when == "before" else store.after
    hook("load", happen)
    cache.load_near(record.key)
    assert (cache.peek(record.key) is not None) is (event == "report of another")


def test_of_two_loads_at_once_the_first_to_end_is_kept(
    cache: NearCache, store: HookedStore, changes: Scripted, record: Record
) -> None:
    store.after("load", lambda: cache.load_near(record.key))  # the first to end
    store.after("load", lambda: changes.report(record.key))  # after the outer one's load
    cache.load_near(record.key)
    assert cache.peek(record.key) is None


def test_without_a_feed_nothing_is_kept(
    cache: NearCache, changes: Scripted, record: Record
) -> None:
    changes.one = None
    cache.load_near(record.key)
    assert cache.peek(record.key) is None


@pytest.mark.parametrize("age", [BOUND, 10])
def test_a_record_that_is_not_provably_fresh_is_not_used(
    cache: NearCache, store: HookedStore, changes: Scripted, record: Record, age: float
) -> None:
    read(cache, record.key)
    assert changes.one is not None
    changes.one.exact_as_of = listener.now() - age
    assert cache.peek(record.key) is None
    assert cache.figures().bypasses == 1
    assert cache.figures().age is None
    changes.prove()  # nothing has changed
    assert cache.peek(record.key) == record


class Paused(Feed):
    """A feed that hears of a change, and proves again, while a reader is looking at it."""

    def __init__(self, subscribe: Any) -> None:
        self._subscribe = subscribe

    @property
    def exact_as_of(self) -> float:
        self._subscribe()
        return listener.now() + 1000

    @exact_as_of.setter
    def exact_as_of(self, moment: float) -> None:
        raise AssertionError


def test_a_change_that_arrives_during_a_read_counts(
    cache: NearCache, changes: Scripted, record: Record
) -> None:
    changes.one = Paused(lambda: changes.report(record.key))
    cache.load_near(record.key)
    assert cache.peek(record.key) is None


@pytest.mark.parametrize("write", ["save", "renew", "replace", "delete", "leased"])
def test_an_own_write_ends_it(
    cache: NearCache, store: HookedStore, clock: FakeClock, record: Record, write: str
) -> None:
    read(cache, record.key)
    if write == "save":
        cache.save(newer(record), record.version)
    elif write == "renew":
        cache.renew(record, record.idle_expires_at + 1)
    elif write == "replace":
        cache.replace(record.key, a_record(clock), record.version, None)
    elif write == "delete":
        cache.delete(record.key)
    else:
        assert cache.leases is not None
        cache.leases.acquire(record.key, "owner", 10_000, 3)
        assert cache.peek(record.key) == record  # a lease is no change
        cache.leases.save(newer(record), record.version, "owner")
    assert cache.peek(record.key) is None


def test_a_write_of_unknown_outcome_ends_it(
    cache: NearCache, store: HookedStore, record: Record
) -> None:
    read(cache, record.key)

    def fail() -> None:
        raise KeyboardInterrupt

    store.after("save", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.save(newer(record), record.version)
    assert cache.peek(record.key) is None


def test_absent_keys_and_pointers_are_not_kept(
    cache: NearCache, store: HookedStore, clock: FakeClock, record: Record
) -> None:
    after = a_record(clock)
    store.replace(record.key, after, record.version, a_pointer(record, after))
    assert cache.load_near("absent") is None
    pointer = cache.load_near(record.key)
    assert pointer is not None
    assert pointer.successor == after.key
    assert cache.peek("absent") is None
    assert cache.peek(record.key) is None


def test_an_expired_record_is_asked_for(
    cache: NearCache, store: HookedStore, clock: FakeClock, record: Record
) -> None:
    read(cache, record.key)
    clock.advance(61)
    assert cache.peek(record.key) is None


def test_a_client_that_knows_another_version_is_served_by_the_store(
    cache: NearCache, store: HookedStore, record: Record
) -> None:
    read(cache, record.key)
    assert cache.peek(record.key, record.version) == record
    assert cache.peek(record.key, record.version + 1) is None


def test_the_cache_is_bounded_in_bytes(
    store: HookedStore, clock: FakeClock, changes: Scripted
) -> None:
    cache = NearCache(store, BOUND, 20_000, clock)
    records = [a_record(clock, payload=bytes(800)) for _ in range(20)]
    for record in records:
        store.create(record)
        read(cache, record.key)
    kept = [record for record in records if cache.peek(record.key)]
    assert kept == records[10:]  # 2000 bytes each: their payloads count twice
    huge = a_record(clock, payload=bytes(10_000))
    store.create(huge)
    read(cache, huge.key)
    assert cache.peek(huge.key) is None
    assert [record for record in records if cache.peek(record.key)] == kept
    for record in kept:
        changes.report(record.key)
    read(cache, records[0].key)
    assert cache.peek(records[0].key)


def test_it_turns_itself_off_where_others_write_too_much(
    cache: NearCache,
    changes: Scripted,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    time = [listener.now()]
    monkeypatch.setattr(near_cache, "now", lambda: time[0])
    read(cache, record.key)
    for _ in range(11):
        time[0] += 1
        for number in range(600):
            changes.report(f"other {number}")
    assert "the near cache is off for 60 s" in caplog.text.lower()
    assert changes.subscribers == []
    read(cache, record.key)
    assert cache.peek(record.key) is None
    time[0] += 60
    read(cache, record.key)
    assert len(changes.subscribers) == 1
    assert cache.peek(record.key) == record


def test_it_stays_on_where_it_spares_enough_reads(
    cache: NearCache, changes: Scripted, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = [listener.now()]
    monkeypatch.setattr(near_cache, "now", lambda: time[0])
    read(cache, record.key)
    for _ in range(22):
        time[0] += 1
        changes.report(*(f"other {number}" for number in range(600)))
        for _ in range(100):
            read(cache, record.key)
    assert len(changes.subscribers) == 1


def test_a_bound_too_short_for_the_network_is_said_once(
    cache: NearCache, changes: Scripted, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    assert changes.one is not None
    changes.one.exact_as_of = listener.now() - 1
    for _ in range(500):
        read(cache, record.key)
    assert caplog.text.count("is too short for this network") == 1


def test_a_forked_process_begins_with_nothing(cache: NearCache, record: Record) -> None:
    read(cache, record.key)
    child = os.fork()
    if not child:
        os._exit(cache.peek(record.key) is not None)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.peek(record.key) == record
