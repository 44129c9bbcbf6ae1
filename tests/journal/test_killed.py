"""A process is killed at every step of every write: each end is in the journal, in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flask_gsession.errors import Gone
from flask_gsession.journal.store import JournalingStore, Subject
from flask_gsession.journal.sweeping import Sweeper
from flask_gsession.stores import Record, Store, StoreOptions, open_store
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.redis.pool import Slot
from flask_gsession.stores.sqlite.file import SQLiteFile
from flask_gsession.testing import FakeClock, a_pointer, a_record
from tests.harness.apps import PATIENCE
from tests.harness.topologies import RedisCluster

pytest_plugins = ["tests.harness.topologies"]

_MOST = 10_000
_STEPS = 40  # of one write, at most


class Killed(BaseException):
    """This process is killed before its next command."""


class Killer:
    """Counts commands, and kills before the one whose number is ``at``, also any later one."""

    def __init__(self) -> None:
        self.at: int | None = None
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.at is not None and self.count > self.at:
            raise Killed


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    killer = Killer()
    monkeypatch.setattr(Slot, "ask", stepping(killer, Slot.ask))
    monkeypatch.setattr("flask_gsession.stores.mongodb.round_trips.count_round_trip", killer.step)
    monkeypatch.setattr(SQLiteFile, "within", stepping(killer, SQLiteFile.within))
    for name in ("create", "load", "save", "renew", "replace", "delete", "remove_expired"):
        monkeypatch.setattr(MemoryStore, name, stepping(killer, getattr(MemoryStore, name)))
    return killer


def stepping(killer: Killer, verb: Any) -> Any:
    def counted(*arguments: Any, **options: Any) -> Any:
        killer.step()
        return verb(*arguments, **options)

    return counted


def opened(url: str, prefix: str, clock: FakeClock) -> Store:
    return open_store(url, StoreOptions(prefix=prefix, clock=clock, timeout=PATIENCE))[0]


def journaling(store: Store, clock: FakeClock) -> JournalingStore:
    assert store.journal is not None
    made = JournalingStore(store, store.journal, _MOST, clock)
    made.use(lambda record: Subject("ada", "laptop"))
    return made


def entries_of(store: Store) -> list[tuple[str, str]]:
    assert store.journal is not None
    found = [json.loads(entry) for _, entry in store.journal.read(0, 1000).entries]
    once = {entry["id"]: entry for entry in reversed(found)}  # the first of each
    first = sorted(once.values(), key=found.index)
    return [(entry["kind"], entry["handle"]) for entry in first]


def created(store: Store, record: Record, clock: FakeClock) -> None:
    store.create(record)


def saved(store: Store, record: Record, clock: FakeClock) -> None:
    store.save(record._replace(version=record.version + 1), record.version)


def renewed(store: Store, record: Record, clock: FakeClock) -> None:
    store.renew(record, record.idle_expires_at + 5000)


def ended(store: Store, record: Record, clock: FakeClock) -> None:
    store.delete(record.key)


def expired(store: Store, record: Record, clock: FakeClock) -> None:
    clock.advance(61)
    assert isinstance(store, JournalingStore)
    store.journal.expire([(record, store.expired(record).pack())])


def rotated(store: Store, record: Record, clock: FakeClock) -> None:
    new = a_record(clock)
    store.replace(record.key, new, record.version, a_pointer(record, new))


WRITES = [created, saved, renewed, ended, expired, rotated]


@pytest.fixture(params=["memory", "sqlite", "redis", "cluster", "mongodb"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        return cluster.url
    if request.param == "memory":
        return "memory://"
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.mark.parametrize("write", WRITES)
def test_killed_at_every_step(
    write: Callable[[Store, Record, FakeClock], None],
    url: str,
    store_prefix: str,
    killer: Killer,
) -> None:
    for step in range(_STEPS):
        clock = FakeClock()
        prefix = f"{store_prefix}{step}:"
        inner, record = opened(url, prefix, clock), a_record(clock)
        store = journaling(inner, clock)
        if write is not created:
            store.create(record)
        killer.count, killer.at = 0, step
        killed = False
        try:
            write(store, record, clock)
        except Killed:
            killed = True
        killer.at = None
        if url != "memory://":  # which ends with the process: only the call was cut short
            inner = opened(url, prefix, clock)
        check_ends(journaling(inner, clock), record, clock)
        if not killed:
            assert step > 0
            return
    pytest.fail("this write has more steps")


def check_ends(store: JournalingStore, record: Record, clock: FakeClock) -> None:
    """However far a write came, every session there was has its end once it has expired."""
    there = store.load(record.key)
    lived = there is not None and there.successor is None
    if there is not None and there.successor:
        assert store.load(there.successor) is not None
        store.delete(record.key)  # by the old token: nobody has the new one
    clock.advance(3600)
    sweeper = Sweeper(store, clock)
    while sweeper.run():
        pass
    entries = entries_of(store)
    ends = {handle for kind, handle in entries if kind in ("ended", "expired")}
    assert store.journal.figures().due == 0
    if lived:
        assert record.key in ends
    if ("created", record.key) in entries:  # it lived, and whatever became of it is known
        assert ends
    for kind, handle in entries:
        if kind in ("ended", "expired"):
            before = entries.index((kind, handle))
            assert all(entry[1] != handle for entry in entries[before + 1 :] if entry[0] != kind)
    with pytest.raises(Gone):
        store.save(record, record.version)
