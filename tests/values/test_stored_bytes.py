"""G8: whatever the record of a session holds, the request gets the session or a new, empty one.

Never an error, never another session's data, never a value that was not stored; and each refusal
is counted and logged, without a secret.
"""

from __future__ import annotations

import logging
import pickle
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import bson
import pytest
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from msgspec import Raw
from msgspec.msgpack import Ext, encode
from pymongo import MongoClient
from redis import Redis

from flask_gsession.events import SessionRefused
from flask_gsession.stores.base import Record
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.sqlite import SQLiteStore
from flask_gsession.stores.support import StoreOptions
from flask_gsession.testing import FakeClock, a_record
from flask_gsession.tokens import new_token, session_key
from tests.harness.apps import Site, SiteMaker, Visitor, within
from tests.values.test_payload import Trap, bound

# Texts that no token or handle can hold by chance.
VALUES = {"user": "Ada L.", "cart": ["a mug", ("a pen", 2)], "card": "4111 1111"}
OTHERS = {"user": "Eve A.", "cart": ["a hat", ("a pen", 9)], "card": "4999 9999"}


# Ways into each store, past its own code -----------------------------------------------------


class Vault:
    """Access to the raw record under a session key."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def name(self, key: str) -> str:
        """The store's own name of the key."""
        return self.site.prefix + key

    def read(self, key: str) -> bytes:
        """The bytes that hold the values."""
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        """Put other bytes in their place."""
        raise NotImplementedError

    def write_payload(self, key: str, payload: bytes) -> None:
        """Put another payload there, in an envelope of the store's that is right."""
        self.write(key, payload)

    def move(self, source: str, target: str) -> None:
        """Put the whole record of one key under another, as it is."""
        raise NotImplementedError

    def spoil(self, key: str) -> None:
        """Make something of the record that the store itself cannot read."""
        raise NotImplementedError

    def all_of(self, key: str) -> object:
        """Everything that is stored under the key; None for nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """Release connections."""


class MemoryVault(Vault):
    @property
    def records(self) -> dict[str, Record]:
        store = self.site.store.store
        assert isinstance(store, MemoryStore)
        return store._records

    def read(self, key: str) -> bytes:
        return self.records[key].payload

    def write(self, key: str, data: bytes) -> None:
        self.records[key] = self.records[key]._replace(payload=data)

    def move(self, source: str, target: str) -> None:
        self.records[target] = self.records[source]

    def spoil(self, key: str) -> None:
        self.write(key, b"")

    def all_of(self, key: str) -> object:
        return self.records.get(key)


class SQLiteVault(Vault):
    def run(self, statement: str, *values: Any) -> Any:
        """The first row, or None."""
        with closing(sqlite3.connect(urlsplit(self.site.url).path[1:])) as db, db:
            db.text_factory = bytes
            return db.execute(statement, values).fetchone()

    def set(self, key: str, column: str, expression: str, *values: Any) -> None:
        """Change one column."""
        statement = f"UPDATE gsession SET {column} = {expression} WHERE key = ?"
        self.run(statement, *values, self.name(key))

    def get(self, key: str, column: str) -> Any:
        """The value of one column."""
        return self.run(f"SELECT {column} FROM gsession WHERE key = ?", self.name(key))[0]

    def read(self, key: str) -> bytes:
        return bytes(self.get(key, "payload"))

    def write(self, key: str, data: bytes) -> None:
        self.set(key, "payload", "?", data)

    def move(self, source: str, target: str) -> None:
        self.run("DELETE FROM gsession WHERE key = ?", self.name(target))
        self.run(
            "INSERT INTO gsession SELECT ?, version, created_at, idle_expires_at, "
            "absolute_expires_at, payload, successor FROM gsession WHERE key = ?",
            self.name(target),
            self.name(source),
        )

    def spoil(self, key: str) -> None:
        self.set(key, "version", "'text'")

    def all_of(self, key: str) -> object:
        return self.run("SELECT * FROM gsession WHERE key = ?", self.name(key))


class RedisVault(Vault):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.client = Redis.from_url(site.url, socket_timeout=10)

    def name(self, key: str) -> str:
        return f"{self.site.prefix}{{{key}}}"

    def read(self, key: str) -> bytes:
        return self.client.get(self.name(key)) or b""

    def write(self, key: str, data: bytes) -> None:
        self.client.set(self.name(key), data, ex=3600)

    def write_payload(self, key: str, payload: bytes) -> None:
        self.write(key, self.read(key)[:31] + payload)

    def move(self, source: str, target: str) -> None:
        self.write(target, self.read(source))

    def spoil(self, key: str) -> None:
        self.client.delete(self.name(key))
        self.client.hset(self.name(key), "user", "ada")

    def all_of(self, key: str) -> object:
        return self.client.dump(self.name(key))

    def close(self) -> None:
        self.client.close()


class MongoDBVault(Vault):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.client: MongoClient[Any] = MongoClient(
            site.url, timeoutMS=10_000, document_class=RawBSONDocument
        )
        self.collection = self.client.get_default_database("gsession")["gsession"]

    def document(self, key: str) -> dict[str, Any]:
        """The document, as Python values."""
        return bson.decode(self.collection.find_one({"_id": self.name(key)}).raw)

    def put(self, key: str, document: dict[str, Any]) -> None:
        """Put another document there."""
        self.collection.replace_one({"_id": self.name(key)}, document, upsert=True)

    def read(self, key: str) -> bytes:
        return bytes(self.document(key)["payload"])

    def write(self, key: str, data: bytes) -> None:
        self.collection.update_one({"_id": self.name(key)}, {"$set": {"payload": data}})

    def move(self, source: str, target: str) -> None:
        self.put(target, {**self.document(source), "_id": self.name(target)})

    def spoil(self, key: str) -> None:
        self.collection.update_one({"_id": self.name(key)}, {"$set": {"version": "text"}})

    def all_of(self, key: str) -> object:
        found = self.collection.find_one({"_id": self.name(key)})
        return None if found is None else found.raw

    def close(self) -> None:
        self.client.close()


VAULTS: dict[str, type[Vault]] = {
    "memory": MemoryVault,
    "sqlite": SQLiteVault,
    "redis": RedisVault,
    "mongodb": MongoDBVault,
}


# A victim, and the values it may see ---------------------------------------------------------


class Scene:
    """A site with two sessions: Ada's, which is tampered with, and Eve's."""

    def __init__(self, site: Site, log: pytest.LogCaptureFixture) -> None:
        self.site, self.log = site, log
        self.vault = VAULTS[urlsplit(site.url).scheme](site)
        self.eve = site.visitor()
        self.eve.run(lambda session: session.update(OTHERS))
        self.eves_key = session_key(self.eve.token)
        self.renew()

    def renew(self) -> None:
        """Give Ada a new session."""
        ada = self.site.visitor()
        ada.run(lambda session: session.update(VALUES))
        assert ada.cookie is not None
        self.cookie, self.key = ada.cookie, session_key(ada.token)
        self.whole = self.vault.read(self.key)

    def tab(self) -> Visitor:
        """A browser with Ada's cookie."""
        return self.site.visitor(self.cookie)

    def see(self) -> str:
        """The result of Ada's request: "the session" as it was, or the reason of its refusal."""
        self.site.events.clear()
        self.log.clear()
        values, about, new = self.tab().run(everything)
        refused = self.site.happened(SessionRefused)
        self.assert_no_secret_in_the_log()
        if not refused:
            assert values == VALUES
            assert not new
            return "the session"
        assert values == {}
        assert about == (None, None, None, 0)
        assert new
        assert [event.handle for event in refused] == [self.key]
        reason = str(refused[0].reason)
        if reason not in ("unknown", "expired"):
            assert reason in ("corrupt", "newer format", "unknown encryption key")
            (line,) = [record for record in self.log.records if record.name == "flask_gsession"]
            assert line.levelno == logging.WARNING
            assert self.key in line.getMessage()
            assert reason in line.getMessage()
        return reason

    def assert_no_secret_in_the_log(self) -> None:
        for secret in (*self.cookie.split("."), "Ada L.", "Eve A.", "4111 1", "4999 9", "a mug"):
            assert secret not in self.log.text

    def see_and_go_on(self) -> str:
        """As `see`; then Ada writes and logs out, as if nothing had been, and has a new session."""
        reason = self.see()
        before = self.vault.all_of(self.key)
        tab = self.tab()
        tab.run(lambda session: session.update(n=1))
        if reason == "the session":
            assert tab.run(dict) == {**VALUES, "n": 1}
        else:
            assert tab.cookie != self.cookie
            assert tab.run(dict) == {"n": 1}
            assert session_key(tab.token) != self.key
            after = self.vault.all_of(self.key)
            assert after in (before, None)  # an expired record may be removed
        old = self.tab()
        old.run(lambda session: session.destroy())
        assert old.cookie is None
        assert tab.run(dict) == ({} if reason == "the session" else {"n": 1})
        self.assert_no_secret_in_the_log()
        assert self.eve.run(dict) == OTHERS
        self.renew()
        return reason


def everything(session: Any) -> tuple[dict[str, Any], tuple[Any, ...], bool]:
    """All that a page can show of a session."""
    values = dict(session)
    about = (session.handle, session.created_at, session.expires_at, session.size)
    return values, about, session.new


@pytest.fixture
def scene_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[Site], Scene]]:
    """Makes the scene on a site."""
    with ExitStack() as stack:

        def make(site: Site) -> Scene:
            scene = Scene(site, caplog)
            stack.callback(scene.vault.close)
            return scene

        yield make


@pytest.fixture
def scene(make_site: SiteMaker, scene_of: Callable[[Site], Scene]) -> Scene:
    """The scene on each store in turn."""
    return scene_of(make_site())


def test_the_steps_change_nothing_if_the_record_is_intact(scene: Scene) -> None:
    """The steps of the other tests change nothing if the record is intact."""
    assert scene.see() == "the session"
    scene.vault.write(scene.key, scene.whole)
    scene.vault.write_payload(scene.key, scene.whole[31:] if is_redis(scene) else scene.whole)
    assert scene.see() == "the session"
    body = encode([{"user": encode("bob")}, None])
    scene.vault.write_payload(scene.key, bound(body, scene.key))
    assert scene.tab().run(dict) == {"user": "bob"}
    scene.renew()
    assert scene.see_and_go_on() == "the session"


def is_redis(scene: Scene) -> bool:
    return isinstance(scene.vault, RedisVault)


# Bytes ---------------------------------------------------------------------------------------

FOREIGN = [
    b"",
    b"\x01",
    bytes(200),
    b"\xff" * 200,
    b"user=ada",
    b'{"user": "ada"}',
    b"eyJ1c2VyIjoiYWRhIn0.ZxYk1w.4m2Zf0m0dG9rZW4tc2lnbmF0dXJl",  # a cookie of Flask's
    b"\x1f\x8b\x08" + bytes(50),  # compressed
    encode([1, 2, 3]),
    encode(7),
    encode("ada"),
    encode({"user": "ada"}),
    b"\x91" * 100_000 + b"\xc0",
    bytes(range(256)) * 4096,
]


def test_foreign_bytes(scene: Scene) -> None:
    for data in FOREIGN:
        scene.vault.write(scene.key, data)
        # The first byte is the version: a payload with a large one may have a later format.
        assert scene.see_and_go_on() in ("corrupt", "newer format")
        scene.vault.write_payload(scene.key, data)
        assert scene.see_and_go_on() in ("corrupt", "newer format")


def test_wrong_bodies_in_a_right_envelope(scene: Scene) -> None:
    for body in (
        *FOREIGN,
        encode([]),
        encode([{"user": encode("ada")}, "7200"]),
        encode([{"user": encode("ada")}, None])[:-1],
        encode([{7: encode("ada")}, None]),
        encode([{"user": b""}, None]),
        b"\x91" * 100_000,
        scene.eves_key.encode(),
    ):
        scene.vault.write_payload(scene.key, bound(body, scene.key))
        assert scene.see_and_go_on() == "corrupt"


def test_a_pickle_is_never_executed(scene: Scene, tmp_path: Path) -> None:
    pickled = pickle.dumps(Trap(tmp_path / "caught"))
    for payload in (
        pickled,
        bound(pickled, scene.key),
        bound(encode([{"user": pickled}, None]), scene.key),
    ):
        scene.vault.write_payload(scene.key, payload)
        assert scene.see() in ("corrupt", "newer format")
    scene.vault.write(scene.key, pickled)
    assert scene.see_and_go_on() in ("corrupt", "newer format")
    assert not (tmp_path / "caught").exists()
    pickle.loads(pickled)
    assert (tmp_path / "caught").exists()


def test_truncated_at_every_length(scene: Scene) -> None:
    for length in range(len(scene.whole)):
        scene.vault.write(scene.key, scene.whole[:length])
        assert scene.see() == "corrupt"


def test_with_any_one_bit_flipped(scene: Scene) -> None:
    # SQLite and MongoDB hold the same payload as memory; a stride of 5 meets each bit of a byte.
    every = 1 if is_redis(scene) or scene.site.url == "memory://" else 5
    for bit in range(0, len(scene.whole) * 8, every):
        flipped = bytearray(scene.whole)
        flipped[bit // 8] ^= 1 << bit % 8
        scene.vault.write(scene.key, bytes(flipped))
        assert scene.see() in ("corrupt", "newer format", "unknown encryption key")
    scene.vault.write(scene.key, scene.whole)
    assert scene.see() == "the session"


@pytest.mark.parametrize("keys", [None, [b"k" * 32]], ids=["plain", "sealed"])
def test_another_sessions_record(
    make_site: SiteMaker, scene_of: Callable[[Site], Scene], keys: list[bytes] | None
) -> None:
    scene = scene_of(make_site(encryption_keys=keys))
    eves = scene.vault.read(scene.eves_key)
    scene.vault.write_payload(scene.key, eves[31:] if is_redis(scene) else eves)
    assert scene.see_and_go_on() == "corrupt"
    scene.vault.move(scene.eves_key, scene.key)
    assert scene.see_and_go_on() == "corrupt"


def test_values_sealed_with_a_key_that_is_gone(
    make_site: SiteMaker, scene_of: Callable[[Site], Scene]
) -> None:
    scene = scene_of(make_site(encryption_keys=[b"k" * 32]))
    assert b"ada" not in scene.whole
    before = scene.vault.all_of(scene.key)
    for keys in (None, [b"n" * 32], [b"n" * 32, "plain"]):
        later = make_site(store=scene.site.store, encryption_keys=keys)
        assert later.visitor(scene.cookie).run(dict) == {}
        refusal = SessionRefused("unknown encryption key", scene.key)
        assert later.happened(SessionRefused) == [refusal]
    assert scene.vault.all_of(scene.key) == before
    assert scene.see_and_go_on() == "the session"


def test_a_newer_version_is_left_untouched(scene: Scene) -> None:
    envelope = 31 if is_redis(scene) else 0
    newer = [(envelope, version) for version in (5, 100, 255)]
    if is_redis(scene):
        newer += [(0, 3), (0, 31)]  # of the envelope
    for place, version in newer:
        data = scene.whole[:place] + bytes((version,)) + scene.whole[place + 1 :]
        scene.vault.write(scene.key, data)
        before = scene.vault.all_of(scene.key)
        assert scene.see() == "newer format"
        tab = scene.tab()
        tab.run(lambda session: session.update(n=1))
        tab.run(lambda session: session.update(n=2))
        assert scene.vault.all_of(scene.key) == before
    scene.vault.write(scene.key, scene.whole)
    assert scene.see() == "the session"


# One value that cannot be read ---------------------------------------------------------------


def deep_tuples() -> bytes:
    data = encode([])
    for _ in range(2_000):
        data = encode(Ext(2, encode([Raw(data)])))
    return data


UNREADABLE = [
    b"\xc1",
    b"\xa1\xff",  # bytes that aren't text
    b"\x91" * 5_000,
    deep_tuples(),
    encode(Ext(99, b"of a later version")),
    encode(Ext(6, b"2024-02-30")),
    encode(Ext(3, encode([[]]))),  # a set that holds a list
    encode(7) * 2,
]


def write_with(scene: Scene, bad: bytes) -> None:
    """A valid session except for two of its values."""
    items = {"good": encode(1), "user": bad, "hits": bad, "last": encode(2)}
    scene.vault.write_payload(scene.key, bound(encode([items, None]), scene.key))


def test_values_that_cannot_be_read_are_refused_with_their_session(scene: Scene) -> None:
    for bad in UNREADABLE:
        write_with(scene, bad)
        before = scene.vault.all_of(scene.key)
        assert scene.see() == "corrupt"
        assert scene.vault.all_of(scene.key) == before


USES: dict[str, Callable[[Any], object]] = {
    "dict": dict,
    "copy": lambda session: session.copy(),
    "items": lambda session: list(session.items()),
    "values": lambda session: list(session.values()),
    "or": lambda session: session | {"more": 1},
    "equal": lambda session: session == {},
    "in and get": lambda session: "user" in session and session.get("user"),
    "get": lambda session: session.get("user"),
    "setdefault": lambda session: session.setdefault("user", "new"),
    "pop": lambda session: session.pop("user", None),
    "ttl": lambda session: "user" in session and session.ttl("user"),
    "set with a ttl": lambda session: session.set("user", "new", ttl=60),
    "get_or_set": lambda session: session.get_or_set("user", "new"),
    "count": lambda session: session.update(hits=session.get("hits", 0) + 1),
    "set": lambda session: session.update(user="new"),
    "set_many": lambda session: session.set_many({"user": "new"}),
    "remove": lambda session: session.remove("user"),
    "clear": lambda session: session.clear(),
    "destroy": lambda session: session.destroy(),
    "rotate": lambda session: session.rotate(),
    "reload": lambda session: session.reload(),
    "size": lambda session: session.size,
    "lifetime": lambda session: session.set_lifetime(60),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_value_that_cannot_be_read_fails_no_page(
    store_prefix: str,
    clock: FakeClock,
    scene_of: Callable[[Site], Scene],
    use: Callable[[Any], object],
) -> None:
    """On one store: which one it is makes no difference to values."""
    with Site("memory://", store_prefix, clock) as site:
        scene = scene_of(site)
        write_with(scene, encode(Ext(99, b"")))
        tab = scene.tab()
        tab.run(use)
        tab.run(everything)
        tab.run(lambda session: session.update(n=1))
        assert tab.run(lambda session: session["n"]) == 1
        scene.assert_no_secret_in_the_log()


def test_a_value_that_cannot_be_read_fails_no_merge(
    make_site: SiteMaker, scene_of: Callable[[Site], Scene]
) -> None:
    scene = scene_of(make_site(merge_policies={"hits": "counter"}))

    def count(session: Any) -> None:
        session["hits"] = session.get("hits", 0) + 1
        scene.tab().run(lambda other: other.update(hits=10))
        write_with(scene, encode(Ext(99, b"")))

    scene.tab().run(count)
    assert scene.site.happened(SessionRefused)


def test_an_atomic_update_of_a_value_that_cannot_be_read_is_answered(scene: Scene) -> None:
    write_with(scene, encode(Ext(99, b"")))
    tab = scene.tab()
    response = tab.ask(lambda session: session.update_atomic("hits", lambda hits: hits + 1, 0))
    assert response.status_code in (200, 409)
    assert tab.run(lambda session: session.update_atomic("hits", lambda hits: hits + 1, 0)) == 1


# Spoilt between a request's load and its save ------------------------------------------------

CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda session: None,
    "set": lambda session: session.update(user="new"),
    "rotate": lambda session: session.rotate(),
    "clear": lambda session: session.clear(),
    "reload": lambda session: session.reload(),
    "destroy": lambda session: session.destroy(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_record_that_is_spoilt_while_a_request_runs(
    scene: Scene, clock: FakeClock, change: Callable[[Any], object]
) -> None:
    clock.advance(120)  # so that an idle expiry is due to be moved

    def use(session: Any) -> None:
        assert dict(session) == VALUES
        scene.vault.spoil(scene.key)
        change(session)

    tab = scene.tab()
    tab.run(use)
    scene.assert_no_secret_in_the_log()
    tab.run(everything)
    assert scene.eve.run(dict) == OTHERS


def test_an_atomic_update_of_a_record_that_was_spoilt_is_answered(scene: Scene) -> None:
    def use(session: Any) -> None:
        assert dict(session) == VALUES
        scene.vault.spoil(scene.key)
        session.update_atomic("hits", lambda hits: hits + 1, 0)

    assert scene.tab().ask(use).status_code in (200, 409)


# Pointers ------------------------------------------------------------------------------------


def plant(scene: Scene, key: str, successor: str, payload: bytes) -> None:
    """A pointer under `key`, as the store itself writes one."""
    pointer = a_record(scene.site.clock, key=key, payload=payload, successor=successor)
    scene.site.store.store.delete(key)
    scene.site.store.store.create(pointer)


def test_a_pointer_of_another_session(scene: Scene) -> None:
    old_key = scene.eves_key
    scene.eve.run(lambda session: session.rotate(grace=60))
    scene.vault.move(old_key, scene.key)
    assert scene.see() == "corrupt"
    assert scene.eve.run(dict) == OTHERS


def test_a_pointer_that_is_not_bound_to_its_key(scene: Scene) -> None:
    for payload in (b"", scene.eves_key.encode(), bound(b"", scene.key), bound(b"x", scene.key)):
        plant(scene, scene.key, scene.eves_key, payload)
        assert scene.see() in ("corrupt", "newer format")
        scene.renew()
    plant(scene, scene.key, scene.eves_key, bound(scene.eves_key.encode()))
    assert scene.see() == "corrupt"
    assert scene.eve.run(dict) == OTHERS


def test_pointers_that_lead_nowhere(scene: Scene) -> None:
    for successor in (session_key(new_token()), "x", "", "a" * 1000, "../", "{a}*?[", "a\n\0"):
        plant(scene, scene.key, successor, bound(successor.encode(), scene.key))
        assert scene.see_and_go_on() in ("unknown", "corrupt")


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_pointers_in_a_circle(scene: Scene, length: int) -> None:
    keys = [scene.key, *(session_key(new_token()) for _ in range(length - 1))]
    for key, successor in zip(keys, [*keys[1:], scene.key], strict=True):
        plant(scene, key, successor, bound(successor.encode(), key))
    assert within(1, scene.see) == "corrupt"
    within(1, lambda: scene.tab().run(lambda session: session.destroy()))


# Foreign data in each store ------------------------------------------------------------------


@pytest.mark.parametrize(
    "put",
    [
        lambda client, name: client.hset(name, mapping={"user": "ada"}),
        lambda client, name: client.rpush(name, "user", "ada"),
        lambda client, name: client.sadd(name, "user"),
        lambda client, name: client.zadd(name, {"user": 1}),
        lambda client, name: client.xadd(name, {"user": "ada"}),
        lambda client, name: client.pfadd(name, "user"),
        lambda client, name: client.setbit(name, 999, 1),
        lambda client, name: client.incr(name),
    ],
    ids=["hash", "list", "set", "sorted set", "stream", "hyperloglog", "bits", "number"],
)
def test_another_type_of_redis(
    redis_url: str,
    store_prefix: str,
    clock: FakeClock,
    scene_of: Callable[[Site], Scene],
    put: Callable[[Any, str], object],
) -> None:
    with Site(redis_url, store_prefix, clock) as site:
        scene = scene_of(site)
        vault = scene.vault
        assert isinstance(vault, RedisVault)
        vault.client.delete(vault.name(scene.key))
        put(vault.client, vault.name(scene.key))
        assert scene.see_and_go_on() == "corrupt"


COLUMNS = ["version", "created_at", "idle_expires_at", "absolute_expires_at", "payload"]
EXPRESSIONS = [
    "'text'",
    "''",
    "x'00'",
    "x''",
    "1.5",
    "9e999",
    "-1",
    "0",
    "9223372036854775807",
    "-9223372036854775808",
    "253402300800000",  # the year 10000
    "CAST(x'80ff' AS TEXT)",
    "CAST(payload AS TEXT)",
    "zeroblob(100000)",
]


def test_a_file_of_before_leases_had_a_length(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "sessions.db"
    record = a_record(clock)
    store = SQLiteStore(path, StoreOptions(clock=clock))
    store.create(record)
    store.leases.acquire(record.key, "one", 5000, 10)
    store.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE gsession_lease DROP COLUMN length")
        db.execute("PRAGMA user_version=2")
    store = SQLiteStore(path, StoreOptions(clock=clock))
    assert store.load(record.key) == record
    assert store.leases.acquire(record.key, "two", 5000, 10) == 0
    store.close()


@pytest.mark.parametrize("column", [*COLUMNS, "successor"])
def test_columns_of_sqlite(
    sqlite_url: str,
    store_prefix: str,
    clock: FakeClock,
    scene_of: Callable[[Site], Scene],
    column: str,
) -> None:
    with Site(sqlite_url, store_prefix, clock) as site:
        scene = scene_of(site)
        assert isinstance(scene.vault, SQLiteVault)
        for expression in EXPRESSIONS:
            scene.vault.set(scene.key, column, expression)
            reason = scene.see_and_go_on()
            assert reason != "the session" or column not in ("payload", "successor")


@pytest.mark.parametrize("column", COLUMNS[:-1])
def test_any_bit_of_a_number_in_sqlite(
    sqlite_url: str,
    store_prefix: str,
    clock: FakeClock,
    scene_of: Callable[[Site], Scene],
    column: str,
) -> None:
    with Site(sqlite_url, store_prefix, clock) as site:
        scene = scene_of(site)
        assert isinstance(scene.vault, SQLiteVault)
        right = scene.vault.get(scene.key, column)
        for bit in range(64):
            flipped = right ^ (1 << bit)
            signed = flipped - 2**64 if flipped >= 2**63 else flipped
            scene.vault.set(scene.key, column, "?", signed)
            scene.see()
        scene.vault.set(scene.key, column, "?", right)
        assert scene.see() == "the session"


MISSING_FIELD = object()
BSON_VALUES = [
    MISSING_FIELD,
    None,
    True,
    0,
    7,
    -1,
    2**62,
    1.5,
    float("nan"),
    "text",
    "",
    b"bytes",
    bson.Binary(b"bytes", 4),
    bson.Binary(bytes(16), 5),
    [],
    [1, 2],
    {},
    {"$gt": ""},
    bson.ObjectId(),
    bson.Decimal128("1"),
    bson.Regex(".*"),
    bson.Timestamp(1, 1),
    bson.MinKey(),
    bson.Code("x"),
    DatetimeMS(0),
    DatetimeMS(-1),
    DatetimeMS(2**62),
    DatetimeMS(-(2**62)),
]


@pytest.mark.parametrize("field", [*COLUMNS, "successor"])
def test_fields_of_mongodb(
    mongodb_url: str,
    store_prefix: str,
    clock: FakeClock,
    scene_of: Callable[[Site], Scene],
    field: str,
) -> None:
    with Site(mongodb_url, store_prefix, clock) as site:
        scene = scene_of(site)
        vault = scene.vault
        assert isinstance(vault, MongoDBVault)
        for value in BSON_VALUES:
            document = vault.document(scene.key)
            if value is MISSING_FIELD:
                del document[field]
            else:
                document[field] = value
            vault.put(scene.key, document)
            reason = scene.see_and_go_on()
            assert reason != "the session" or field != "payload"


def test_other_documents_of_mongodb(
    mongodb_url: str, store_prefix: str, clock: FakeClock, scene_of: Callable[[Site], Scene]
) -> None:
    with Site(mongodb_url, store_prefix, clock) as site:
        scene = scene_of(site)
        vault = scene.vault
        assert isinstance(vault, MongoDBVault)
        name = vault.name(scene.key)
        vault.put(scene.key, {"_id": name})
        assert scene.see_and_go_on() == "corrupt"
        name = vault.name(scene.key)
        vault.put(scene.key, {"_id": name, "user": "ada", "expiration": DatetimeMS(2**40)})
        assert scene.see_and_go_on() == "corrupt"
        vault.put(scene.key, {**vault.document(scene.key), "user": "eve", "more": [1]})
        assert scene.see_and_go_on() == "the session"
        # Text that is no UTF-8, which a driver refuses to decode.
        document = {**vault.document(scene.key), "successor": "-marker-"}
        raw = bson.encode(document).replace(b"-marker-", b"\xff\xfe\x80\x81\xed\xa0\x80\xc0")
        vault.collection.delete_one({"_id": document["_id"]})
        vault.collection.insert_one(RawBSONDocument(raw))
        assert scene.see_and_go_on() == "corrupt"
