"""Stores and the near cache while another thread subscribes, closes or forks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from flask_gsession.live.listener import now
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.sqlite import file as sqlite
from flask_gsession.stores.wrappers.near_cache import KeptRecords
from flask_gsession.testing import a_record


def test_subscribers_that_come_at_the_same_time_are_all_kept() -> None:
    store = MemoryStore()
    first, second = KeptRecords(store, 1.0, 0), KeptRecords(store, 1.0, 0)
    other = Thread(target=store.subscribe, args=(first,))

    class Meanwhile(tuple[Any, ...]):
        def __iter__(self) -> Iterator[Any]:
            other.start()
            other.join(0.2)  # unless it waits for a lock
            return iter(())

    store._subscribers = Meanwhile()
    store.subscribe(second)
    other.join(30)
    assert {*store._subscribers} == {first, second}
    store.close()


class Listens:
    """Stands in for a store's listener. Another thread acts ``meanwhile``, as one subscribes."""

    def __init__(self) -> None:
        self.subscribers: list[Any] = []
        self.meanwhile = Thread()

    def subscribe(self, subscriber: Any, interval: float | None = None) -> None:
        if not self.meanwhile.ident:
            self.meanwhile.start()
            self.meanwhile.join(0.2)  # unless it waits for a lock
        self.subscribers.append(subscriber)

    def feed(self, key: str) -> Any:
        return object() if self.subscribers else "missed"


def test_the_near_cache_is_on_again_only_after_it_hears_changes() -> None:
    """Another listener's feed proves nothing for a cache that isn't subscribed to it."""
    changes: Any = Listens()
    kept = KeptRecords(changes, 1.0, 1000)
    changes.subscribers.clear()
    kept._off_until = 0.0  # its pause is over
    fed: list[Any] = []
    changes.meanwhile = Thread(target=lambda: fed.append(kept.feed("k")))
    kept.feed("k")
    changes.meanwhile.join(30)
    assert fed != ["missed"]
    assert changes.subscribers == [kept]


def test_a_near_cache_that_was_off_at_a_fork_stays_off() -> None:
    """Its subscription isn't there in the child, either."""
    changes: Any = Listens()
    kept = KeptRecords(changes, 1.0, 1000)
    kept._off_until = now() + 1000
    kept._start()
    assert kept.feed("k") is None


def test_calls_that_begin_while_the_mongodb_client_closes_use_the_next_one(
    mongodb_url: str, store_prefix: str
) -> None:
    store: Any = open_store(mongodb_url, StoreOptions(store_prefix))[0]
    record = a_record(time.time)
    store.create(record)
    driver, loaded = store.driver, []
    close = driver._close_client

    def slowly() -> None:
        close()
        loaded.append(store.load(record.key))

    driver._close_client = slowly
    store.close()
    assert loaded == [record]
    assert store.load(record.key) == record
    assert driver._inherited == []
    store.close()


@pytest.mark.parametrize("lock", ["near cache", "sqlite"])
def test_a_finalizer_or_a_signal_handler_may_take_a_lock_again(lock: str) -> None:
    near = KeptRecords(MemoryStore(), 1.0, 0)._lock
    again = {"near cache": near, "sqlite": sqlite._opened.lock}[lock]
    with again:
        taken = again.acquire(blocking=False)
        if taken:
            again.release()
    assert taken
