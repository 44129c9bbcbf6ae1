"""Junk where a lease stands is no lasting failure: the next to lock the session replaces it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest
from pymongo import MongoClient
from redis import Redis

from flask_gsession.errors import QueueFull
from flask_gsession.events import SessionRefused
from flask_gsession.stores.lease import LONGEST_LEASE, Lease
from flask_gsession.testing import FakeClock, a_record
from flask_gsession.tokens import session_key
from tests.harness.apps import Site

Plant = Callable[[str], object]
FAR = 2**53


def redis_with(site: Site, junk: Any) -> Plant:
    def plant(key: str) -> None:
        store: Any = site.store.store
        with Redis.from_url(site.url) as client:
            name = store.commands.names.lease(key)
            client.delete(name)
            junk(client, name)

    return plant


def sqlite_with(site: Site, junk: tuple[Any, ...]) -> Plant:
    def plant(key: str) -> None:
        with closing(sqlite3.connect(urlsplit(site.url).path[1:])) as db, db:
            row = (site.prefix + key, *junk)
            db.execute("INSERT OR REPLACE INTO gsession_lease VALUES (?, ?, ?, ?, ?)", row)

    return plant


def mongodb_with(site: Site, junk: Any) -> Plant:
    def plant(key: str) -> None:
        client: MongoClient[Any]
        with MongoClient(site.url) as client:
            collection = client.get_default_database("gsession")["gsession"]
            done = collection.update_one({"_id": site.prefix + key}, {"$set": {"lease": junk}})
            assert done.matched_count == 1

    return plant


WAITING = {"owner": "w", "seen": 1}
JUNK: dict[str, tuple[Callable[[Site, Any], Plant], list[Any]]] = {
    "sqlite": (
        sqlite_with,
        [
            ("w", "text", 1, "{}"),
            ("w", FAR, FAR, "{}"),
            (b"\xff", FAR, 1000, "{}"),
            ("", 0, 0, "not JSON"),
            ("", 0, 0, "[1, 2]"),
            ("", 0, 0, '{"w": "text"}'),
            ("", 0, 0, "7"),
            ("", 0, 0, b"\xff\xfe"),
            ("", 0, 0, "[" * 100_000),
            ("", "x", "y", "z"),
        ],
    ),
    "redis": (
        redis_with,
        [
            lambda client, name: client.set(name, b"junk"),
            lambda client, name: client.set(name, b""),
            lambda client, name: client.set(name, b"\xff\xfe\n\n"),
            lambda client, name: client.set(name, b"w far 1000\n"),
            lambda client, name: client.set(name, b"w %d %d\n" % (FAR, FAR)),
            lambda client, name: client.set(name, b"w " + b"9" * 400 + b" " + b"9" * 400 + b"\n"),
            lambda client, name: client.set(name, b" 0 0\na line of something\n\n"),
            lambda client, name: client.hset(name, "owner", "w"),
            lambda client, name: client.rpush(name, "w"),
            lambda client, name: client.zadd(name, {"w": 1}),
        ],
    ),
    "mongodb": (
        mongodb_with,
        [
            "junk",
            7,
            None,
            [],
            [1, {"owner": "w"}],
            {},
            {"owner": 7, "until": "text", "length": None, "waiters": 3},
            {"owner": "w", "until": "text", "length": "text", "waiters": "text"},
            {"owner": "w", "until": FAR, "length": FAR, "waiters": []},
            {"owner": "w", "until": float("inf"), "length": float("nan"), "waiters": {}},
            {"owner": "", "until": 0, "length": 0, "waiters": [1, "w", {"owner": "w"}, [WAITING]]},
            {"owner": "", "until": 0, "length": 0, "waiters": [{"owner": "w", "seen": "now"}]},
        ],
    ),
}


@pytest.fixture(params=JUNK)  # the leases of the memory store are objects of this process
def store_url(request: pytest.FixtureRequest) -> str:
    kind = {"mongodb": "emptied_mongodb"}.get(request.param, request.param)
    url: str = request.getfixturevalue(f"{kind}_url")
    return url


@pytest.fixture
def plants(site: Site) -> list[Plant]:
    """Ways to put junk where the lease of a session stands."""
    make, junk = JUNK[urlsplit(site.url).scheme]
    return [make(site, each) for each in junk]


def test_a_session_with_junk_is_locked_saved_rotated_and_ended(
    site: Site, plants: list[Plant]
) -> None:
    def locked(session: Any) -> None:
        with session.lock():
            session["n"] += 1

    for plant in plants:
        visitor = site.visitor()
        visitor.run(lambda session: session.update(n=0))
        plant(session_key(visitor.token))
        visitor.run(lambda session: session.update(m=1))
        visitor.run(locked)
        assert visitor.run(lambda session: session["n"]) == 1
        plant(session_key(visitor.token))
        before = visitor.cookie
        visitor.run(lambda session: session.rotate(grace=0))
        assert visitor.cookie != before
        assert visitor.run(dict) == {"n": 1, "m": 1}
        plant(session_key(visitor.token))
        visitor.run(lambda session: session.destroy())
        assert visitor.run(dict) == {}


def test_junk_under_a_lock_loses_the_lock_only(site: Site, plants: list[Plant]) -> None:
    for plant in plants:
        visitor = site.visitor()
        visitor.run(lambda session: session.update(n=0))

        def locked(session: Any, visitor: Any = visitor, plant: Plant = plant) -> None:
            with session.lock():
                plant(session_key(visitor.token))
                session["n"] += 1

        site.events.clear()
        assert visitor.ask(locked).status_code == 409
        assert site.happened(SessionRefused) == []
        assert visitor.run(dict) == {"n": 0}
        visitor.run(lambda session: session.update(m=1))
        with_a_lock(visitor)


def with_a_lock(visitor: Any) -> None:
    def locked(session: Any) -> None:
        with session.lock():
            session["n"] = 2

    visitor.run(locked)
    assert visitor.run(lambda session: session["n"]) == 2


def test_the_steps_of_a_store_over_junk(site: Site, plants: list[Plant], clock: FakeClock) -> None:
    store: Any = site.store.store
    for plant in plants:
        record = a_record(clock)
        store.create(record)
        plant(record.key)
        assert store.leases.extend(record.key, "me", 1000) is False
        assert store.leases.release(record.key, "me") is False
        plant(record.key)
        assert store.leases.acquire(record.key, "me", 1000, 0) == 0
        with pytest.raises(QueueFull):
            store.leases.acquire(record.key, "other", 1000, 0)
        assert store.leases.release(record.key, "me") is True
        plant(record.key)
        store.leases.wait_for_release(record.key, "me", 0.01)
        store.delete(record.key)


def test_the_longest_lease_that_can_be_asked_for_counts(clock: FakeClock) -> None:
    lease = Lease()
    assert lease.acquire("me", 0, LONGEST_LEASE, 0) == 0
    with pytest.raises(QueueFull):
        lease.acquire("other", LONGEST_LEASE - 1, 1000, 0)
