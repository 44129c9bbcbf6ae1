"""How many sessions there are, without a look at each: on every store."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis

from flask_gsession import StoreUnavailable
from flask_gsession.stores import StoreOptions, open_store
from flask_gsession.stores.mongodb import scans as mongodb
from flask_gsession.stores.redis import scans as redis
from flask_gsession.stores.sqlite import scans as sqlite
from flask_gsession.testing import FakeClock, a_pointer, a_record
from tests.harness.servers import free_port


def open_at(url: str, prefix: str, clock: FakeClock) -> Any:
    return open_store(url, StoreOptions(prefix=prefix, clock=clock, timeout=10))[0]


def test_few_sessions_are_counted(store_url: str, store_prefix: str, clock: FakeClock) -> None:
    store = open_at(store_url, store_prefix, clock)
    assert store.counts.count() == 0
    records = [a_record(clock) for _ in range(5)]
    for record in records:
        store.create(record)
    store.leases.acquire(records[0].key, "owner", 60_000, 5)
    store.delete(records[1].key)
    assert store.counts.count() == 4
    store.close()


@pytest.mark.parametrize("store_url", ["memory", "sqlite", "mongodb"], indirect=True)
def test_other_records_are_not_counted(store_url: str, store_prefix: str, clock: FakeClock) -> None:
    store = open_at(store_url, store_prefix, clock)
    old, new, short = a_record(clock), a_record(clock), a_record(clock, idle=20)
    for record in (old, short):
        store.create(record)
    store.replace(old.key, new, old.version, a_pointer(old, new))
    assert store.counts.count() == 2
    clock.advance(30)
    assert store.counts.count() == 1
    store.close()


@pytest.mark.parametrize("store_url", ["sqlite", "redis", "mongodb"], indirect=True)
def test_many_sessions_are_estimated(
    store_url: str, store_prefix: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sqlite, redis, mongodb):
        monkeypatch.setattr(module, "COUNT_ALL", 60)
    monkeypatch.setattr(mongodb, "_SAMPLE", 60)
    store = open_at(store_url, store_prefix, clock)
    another = open_at(store_url, f"another-{store_prefix}", clock)
    for _ in range(120):
        store.create(a_record(clock))
        another.create(a_record(clock))
    # A sample of 60 in which half are ours: nine deviations either way.
    assert 50 <= store.counts.count() <= 190
    if store_url.startswith("redis"):
        with Redis.from_url(store_url) as client:
            names = list(client.scan_iter(f"another-{store_prefix}*"))
            assert names
            client.delete(*names)
    store.close()
    another.close()


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "mongodb"])
def test_a_store_that_is_down_cannot_be_counted(scheme: str, clock: FakeClock) -> None:
    options = StoreOptions(clock=clock, timeout=0.3)
    store = open_store(f"{scheme}://127.0.0.1:{free_port()}", options)[0]
    with pytest.raises(StoreUnavailable):
        store.counts.count()
    store.close()
