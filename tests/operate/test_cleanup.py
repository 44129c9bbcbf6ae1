"""`flask gsession cleanup` removes unreadable and expired records, and keeps live ones."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from redis import Redis

from flask_gsession import Session, StoreUnavailable
from flask_gsession.cli import gsession
from flask_gsession.stores import StoreOptions
from flask_gsession.stores.base import milliseconds
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.mongodb import MongoDBStore
from flask_gsession.stores.mongodb import scans as mongodb
from flask_gsession.stores.parts import MORE, Tidied
from flask_gsession.stores.redis import RedisStore
from flask_gsession.stores.sqlite import SQLiteStore
from flask_gsession.testing import FakeClock, a_blob, a_pointer, a_record
from tests.cli.test_command import down
from tests.harness.apps import PATIENCE, Site, SiteMaker
from tests.harness.console import Console, struck
from tests.harness.servers import RedisServer
from tests.test_docs import FOLDER_STORE

__all__ = ["down"]


class Counting(MemoryStore):
    """Has so many expired sessions, and fails at the step ``at``."""

    def __init__(self, expired: int, failure: BaseException | None = None, at: int = -1) -> None:
        super().__init__()
        self.left, self.failure, self.at = expired, failure, at
        self.limits: list[int] = []

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        if dry_run:
            return Tidied({"expired sessions": self.left}, self.left, "")
        if self.failure is not None and len(self.limits) == self.at:
            raise self.failure
        self.limits.append(limit)
        step = min(limit, self.left)
        self.left -= step
        return Tidied({"expired sessions": step}, step, MORE if self.left else "")


class InParts(MemoryStore):
    """Looks at ten parts, finds one thing in each, and fails at the part ``at``."""

    def __init__(self, failure: BaseException, at: int) -> None:
        super().__init__()
        self.failure, self.at = failure, at
        self.parts: list[int] = []

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        part = int(cursor or 0)
        if len(self.parts) == self.at:
            raise self.failure
        self.parts.append(part)
        return Tidied({"orphaned locks": 1}, 1, str(part + 1) if part < 9 else "")


def console_of(site: Site) -> Console:
    return Console(site.store.store, clock=site.clock)


# -- expired records


def test_the_expired_go_and_the_living_stay(site: Site) -> None:
    for _ in range(5):
        site.visitor().run(lambda session: session.update(a=1))
    site.clock.advance(100 * 86400)
    live = site.visitor()
    live.run(lambda session: session.update(a=1))
    # A create removes two expired records, and Redis has removed all of them itself.
    expired = len(site.stored()) - 1 if not site.url.startswith("redis") else 0
    console = console_of(site)
    found = json.loads(console.done("cleanup", "--dry-run", "--json", "--batch", "2"))
    assert found[0]["found"].get("expired sessions", 0) == expired
    assert f"{expired} expired sessions to be removed" in console.done("cleanup", "--dry-run")
    assert live.run(dict) == {"a": 1}
    text = console.done("cleanup", "--batch", "2")
    assert f"session: {expired} expired sessions removed" in text
    assert live.run(dict) == {"a": 1}
    if expired:
        assert len(site.stored()) == 1
    assert "session: 0 expired sessions removed" in console.done("cleanup")


# -- leftovers


@pytest.mark.parametrize("batch", [1, 1000])
def test_leftovers_on_redis(
    redis_url: str, redis_client: Redis, store_prefix: str, clock: FakeClock, batch: int
) -> None:
    store = RedisStore(redis_url, StoreOptions(prefix=store_prefix, clock=clock))

    def name(key: str) -> str:
        return f"{store_prefix}{{{key}}}"

    def key() -> str:
        return a_record(clock).key

    live, old, new, locked = (a_record(clock, idle=600) for _ in range(4))
    ended = a_record(clock, idle=10)
    for record in (live, old, locked, ended):
        store.create(record)
    store.replace(old.key, new, old.version, a_pointer(old, new, grace=300))
    store.leases.acquire(locked.key, "one", 60_000, 0)
    for record in (live, old, ended):
        redis_client.persist(name(record.key))
    corrupt, newer, no_string = key(), key(), key()
    redis_client.set(name(corrupt), b"what is no record")
    redis_client.set(name(newer), b"\3" + bytes(60))
    redis_client.lpush(name(no_string), "no string")
    of_others = [f"{store_prefix}{rest}" for rest in ("of:others", "{others}", "{others}:lock")]
    redis_client.mset(dict.fromkeys(of_others, b"stays"))
    redis_client.set(f"{name(key())}:lock", b"one 1 1\n", px=60_000)
    clock.advance(10)

    console = Console(store, clock=clock)
    there = sorted(redis_client.scan_iter(f"{store_prefix}*"))
    expected = {
        "expired sessions": 1, "sessions without expiry": 2, "unreadable records": 1,
        "orphaned locks": 1,
    }  # fmt: skip
    options = ("--json", "--batch", str(batch))
    for dry_run in ("--dry-run",), ():
        assert sorted(redis_client.scan_iter(f"{store_prefix}*")) == there
        assert json.loads(console.done("cleanup", *options, *dry_run))[0]["found"] == expected
    left = {each.decode() for each in redis_client.scan_iter(f"{store_prefix}*")}
    assert left == {
        *(name(each) for each in (live.key, old.key, new.key, locked.key, newer, no_string)),
        f"{name(locked.key)}:lock", *of_others,
    }  # fmt: skip
    assert 0 < redis_client.pttl(name(live.key)) <= 590_000
    assert 0 < redis_client.pttl(name(old.key)) <= 290_000
    assert store.load(live.key) == live
    assert store.leases.extend(locked.key, "one", 60_000)
    again = json.loads(console.done("cleanup", *options))[0]["found"]
    assert not any(again.values())
    store.close()


def test_large_values_without_expiry_on_redis(
    redis_url: str, redis_client: Redis, store_prefix: str, clock: FakeClock
) -> None:
    """Their new expiry is late enough for any session they may belong to."""
    with SiteMaker(redis_url, store_prefix, clock) as make_site:
        site = make_site()
        visitor = site.visitor()
        visitor.run(lambda session: session.update(rows=b"x" * 20_000, few=b"y" * 20_000))
        pattern = f"{store_prefix}blob:*"
        (one, other) = redis_client.scan_iter(pattern)
        redis_client.persist(one)
        life = redis_client.pttl(other)
        of_others = f"{store_prefix}blob:{{others}}"
        redis_client.set(of_others, b"stays")
        console = console_of(site)
        kind = "large values without expiry"
        for dry_run in ("--dry-run",), ():
            assert redis_client.pttl(one) == -1
            text = console.done("cleanup", "--json", "--batch", "1", *dry_run)
            assert json.loads(text)[0]["found"] == {kind: 1}
        assert "large value" not in console.done("cleanup")
        assert 31 * 86_400_000 < redis_client.pttl(one) <= 400 * 86_400_000
        assert redis_client.pttl(other) <= life
        assert redis_client.pttl(of_others) == -1
        assert visitor.run(lambda session: session["rows"]) == b"x" * 20_000
        visitor.run(lambda session: session.destroy())
        assert list(redis_client.scan_iter(pattern)) == [of_others.encode()]


def test_no_step_holds_a_redis_up(
    redis_url: str, redis_client: Redis, store_prefix: str, clock: FakeClock
) -> None:
    store = RedisStore(redis_url, StoreOptions(prefix=store_prefix, clock=clock))
    names = [f"{store_prefix}{{{a_record(clock).key}}}" for _ in range(3000)]
    redis_client.mset(dict.fromkeys(names, "x"))
    step = store.upkeep.tidy("", 100_000, dry_run=True)
    assert step.seen < 2000
    assert step.cursor
    redis_client.delete(*names)
    store.close()


def test_a_session_saved_in_parallel_stays(
    redis_url: str, redis_client: Redis, store_prefix: str, clock: FakeClock
) -> None:
    store = RedisStore(redis_url, StoreOptions(prefix=store_prefix, clock=clock))
    record = a_record(clock, idle=10)
    store.create(record)
    name = f"{store_prefix}{{{record.key}}}"
    redis_client.persist(name)
    saved = record._replace(version=1, idle_expires_at=record.idle_expires_at + 600_000)
    verdict = store.upkeep._verdict

    def verdict_and_save(key: str, value: bytes) -> tuple[str, int]:
        given = verdict(key, value)
        clock.advance(-10)
        store.save(saved, record.version)
        return given

    clock.advance(10)
    store.upkeep._verdict = verdict_and_save
    assert not any(store.upkeep.tidy("", 1000).found.values())
    assert store.load(record.key) == saved
    store.close()


def test_leftovers_on_mongodb(mongodb_url: str, store_prefix: str, clock: FakeClock) -> None:
    store = MongoDBStore(mongodb_url, StoreOptions(prefix=store_prefix, clock=clock))
    live, ended, other = a_record(clock), a_record(clock, idle=10), a_record(clock)
    of_others = ["of others", f"{store_prefix}of others"]
    store.create(live)
    with store.lend_collection("test") as collection:
        collection.drop_indexes()  # the sweep of the server must not be first
        wrong: list[Any] = ["tomorrow", 1.5, None, {"in": "hours"}]
        collection.insert_many(
            [{"_id": store_prefix + a_record(clock).key, "idle_expires_at": when} for when in wrong]
            + [{"_id": store_prefix + a_record(clock).key}]
            + [{"_id": name} for name in of_others]
        )
    for record in (ended, other):
        store.create(record)
    clock.advance(10)
    console = Console(store, clock=clock)
    expected = {"expired sessions": 1, "unreadable records": 5}
    expected |= {"expired large values": 0, "orphaned large values": 0}
    for dry_run in ("--dry-run",), ():
        text = console.done("cleanup", "--json", "--batch", "2", *dry_run)
        assert json.loads(text)[0]["found"] == expected
    with store.lend_collection("test") as collection:
        left = {document["_id"] for document in collection.find()}
    assert left == {store_prefix + live.key, store_prefix + other.key, *of_others}
    store.close()


@pytest.mark.parametrize("batch", ["2", "1000"])
def test_large_values_left_over_on_mongodb(
    mongodb_url: str, store_prefix: str, clock: FakeClock, batch: str
) -> None:
    store = MongoDBStore(mongodb_url, StoreOptions(prefix=store_prefix, clock=clock))
    now = milliseconds(clock)
    live, *ended = (a_blob() for _ in range(4))
    for name in (live, *ended):
        store.blobs.write_frame(name, 0, b"large", now + (60_000 if name == live else 5_000))
    blobs = store.driver.blobs
    blobs.drop_indexes()  # the sweep of the server must not be first
    wrong: list[Any] = ["tomorrow", 1.5, None, {"in": "hours"}, [], True]
    undated = [{"_id": f"{store_prefix}{a_blob()}:0", "expires_at": when} for when in wrong]
    blobs.insert_many([*undated, {"_id": f"{store_prefix}{a_blob()}:0"}])
    of_others = f"{store_prefix[:-1]}-others"
    blobs.insert_one({"_id": of_others})
    clock.advance(10)
    console = Console(store, clock=clock)
    for dry_run in ("--dry-run",), ():
        text = console.done("cleanup", "--json", "--batch", batch, *dry_run)
        found = json.loads(text)[0]["found"]
        assert (found["expired large values"], found["orphaned large values"]) == (3, 7)
    assert {each["_id"].rpartition(":")[0] or each["_id"] for each in blobs.find()} == {
        store_prefix + live,
        of_others,
    }
    assert store.blobs.read_frame(live, 0, 5) == b"large"
    blobs.delete_one({"_id": of_others})
    store.close()


def test_no_step_takes_a_mongodb_too_long(
    mongodb_url: str, store_prefix: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongodb, "_AT_ONCE", 2)
    store = MongoDBStore(mongodb_url, StoreOptions(prefix=store_prefix, clock=clock, timeout=10))
    for _ in range(3):
        store.create(a_record(clock))
    step = store.upkeep.tidy("", 10_000)
    assert step.seen == 2
    assert store.upkeep.tidy(step.cursor, 10_000).seen == 1
    store.close()


def test_leftovers_on_sqlite(sqlite_url: str, clock: FakeClock) -> None:
    path = sqlite_url.removeprefix("sqlite:///")
    store = SQLiteStore(path, StoreOptions(clock=clock))
    live, ended = a_record(clock), a_record(clock, idle=10)
    broken = [a_record(clock) for _ in range(3)]
    for record in (live, *broken):
        store.create(record)
    store.create(ended)
    store.leases.acquire(live.key, "one", 60_000, 0)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for record, when in zip(broken, ("tomorrow", b"\0", ""), strict=True):
            db.execute(
                "UPDATE gsession SET idle_expires_at = ? WHERE key LIKE ?", (when, f"%{record.key}")
            )
        db.execute("INSERT INTO gsession_lease VALUES ('gsession:gone', 'one', 1, 1, '{}')")
        db.execute("INSERT INTO gsession_blob VALUES ('gsession:one', 'tomorrow')")
        db.execute("INSERT INTO gsession_frame VALUES ('gsession:one', 0, 'large')")
    store.blobs.write_frame("live", 0, b"large", live.idle_expires_at)
    store.blobs.write_frame("ended", 0, b"large", ended.idle_expires_at)
    clock.advance(10)
    console = Console(store, clock=clock)
    expected = {"expired sessions": 1, "unreadable records": 3, "orphaned locks": 1}
    expected |= {"expired large values": 1, "orphaned large values": 1}
    for dry_run in ("--dry-run",), ():
        text = console.done("cleanup", "--json", "--batch", "2", *dry_run)
        assert json.loads(text)[0]["found"] == expected
    assert [record.key for record in store.scans.scan().records] == [live.key]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM gsession_frame").fetchall() == [("gsession:live",)]
    assert store.leases.extend(live.key, "one", 60_000)
    store.close()


# -- in steps


def test_a_clean_up_runs_in_batches_until_it_ends() -> None:
    store = Counting(expired=2500)
    assert "session: 2500 expired sessions removed" in Console(store).done("cleanup")
    assert store.limits == [1000, 1000, 1000]


def test_a_failure_says_how_far_it_came() -> None:
    console = Console(Counting(5000, StoreUnavailable("pulled the plug"), at=2))
    complaint = console.failed("cleanup")
    assert "failed after 2000 expired sessions removed: pulled the plug" in complaint


@pytest.mark.parametrize(
    ("failure", "status"), [(KeyboardInterrupt(), 130), (StoreUnavailable("no"), 1)]
)
def test_an_interrupted_clean_up_continues(failure: BaseException, status: int) -> None:
    store = InParts(failure, at=4)
    console = Console(store)
    complaint = console.failed("cleanup", status=status)
    assert "4 orphaned locks removed (continue with --cursor 4)" in complaint
    store.at = -1
    assert "6 orphaned locks removed" in console.done("cleanup", "--cursor", "4")
    assert store.parts == list(range(10))


def test_a_real_process_that_is_struck(own_redis: RedisServer, store_prefix: str) -> None:
    """On a server without keys of other tests, as it is struck in its second step."""
    redis_url, redis_client = own_redis.url, Redis.from_url(own_redis.url)
    for number in range(40):
        redis_client.set(f"{store_prefix}{{{number:043}}}:lock", "nobody 1 1\n", ex=3600)
    words = "cleanup", "--batch", "10"
    complaint = struck(redis_url, store_prefix, signal.SIGINT, "tidy", 2, *words)
    found = re.search(
        r"interrupted after .+ (\d+) orphaned locks? removed \(continue with --cursor (\S+)\)",
        complaint,
    )
    assert found is not None, complaint
    left = 40 - int(found[1])
    assert len(list(redis_client.scan_iter(f"{store_prefix}*"))) == left
    store: Any = RedisStore(redis_url, StoreOptions(store_prefix, timeout=PATIENCE))
    tidy, cursors = store.upkeep.tidy, []
    store.upkeep.tidy = lambda cursor, *rest, **more: (
        cursors.append(cursor),
        tidy(cursor, *rest, **more),
    )[1]
    assert f"{left} orphaned lock" in Console(store).done(*words, "--cursor", found[2])
    assert cursors[0] == found[2]
    assert not list(redis_client.scan_iter(f"{store_prefix}*"))
    store.close()
    redis_client.close()


def test_a_malformed_cursor(redis_url: str) -> None:
    assert "malformed cursor" in Console(redis_url).failed("cleanup", "--cursor", "what?", status=2)


@pytest.mark.parametrize("batch", ["0", "many"])
def test_a_wrong_batch(batch: str) -> None:
    assert Console("memory://").run("cleanup", "--batch", batch).exit_code == 2


def test_all_sessions_of_an_application() -> None:
    console = Console(Counting(1))
    Session(console.app, store=Counting(2), cookie_name="second")
    assert console.done("cleanup").splitlines() == [
        "session: 1 expired session removed", "second: 2 expired sessions removed",
    ]  # fmt: skip
    assert console.done("cleanup", "--session", "second") == (
        "second: 0 expired sessions removed\n"
    )


class Down(Counting):
    """One that fails in its second step."""

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        if cursor:
            raise StoreUnavailable("pulled the plug")
        return Tidied({"orphaned locks": 3}, 3, "on")


def test_one_store_that_is_down_does_not_stop_the_others() -> None:
    console = Console(Counting(1))
    Session(console.app, store=Down(0), cookie_name="second")
    Session(console.app, store=Counting(2), cookie_name="third")
    result = console.run("cleanup")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "session: 1 expired session removed", "third: 2 expired sessions removed",
    ]  # fmt: skip
    assert "second: the store failed after 0 expired sessions removed, 3" in result.stderr
    result = console.run("cleanup", "--json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert [row["session"] for row in rows] == ["session", "second", "third"]
    assert rows[1]["found"] == {"orphaned locks": 3}
    assert ["pulled the plug" in row.get("error", "") for row in rows] == [False, True, False]


# -- impossible requests


def test_the_store_of_the_documentation(tmp_path: Path) -> None:
    clock = FakeClock()
    store = FOLDER_STORE.FolderStore(tmp_path, clock=clock)
    console = Console(store, clock=clock)
    for idle in (10, 10, 10, 60):
        store.create(a_record(clock, idle=idle))
    assert "0 expired sessions removed" in console.done("cleanup")
    clock.advance(10)
    assert "3 expired sessions to be removed" in console.done("cleanup", "--dry-run")
    assert "3 expired sessions removed" in console.done("cleanup", "--batch", "2")
    assert "0 expired sessions removed" in console.done("cleanup")


class Neither(MemoryStore):
    upkeep = None


def test_a_store_that_needs_none() -> None:
    assert "nothing to do" in Console(Neither()).done("cleanup")


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_store_that_is_down(down: str, options: tuple[str, ...]) -> None:
    complaint = Console(down, store_timeout=0.2).failed("cleanup", *options)
    assert "session: the store failed" in complaint


def test_no_session_at_all() -> None:
    result = Flask(__name__).test_cli_runner().invoke(gsession, ["cleanup"])
    assert "call Session(app) first" in result.output
