"""`flask gsession doctor` finds faults, and reports no healthy store."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from configparser import ConfigParser
from contextlib import closing, contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.errors import OperationFailure
from redis import Redis

from flask_gsession import Session, StoreUnavailable
from flask_gsession.cli import gsession
from flask_gsession.errors import StoreError
from flask_gsession.operate.health import check_store
from flask_gsession.stores import Record
from flask_gsession.stores.base import Deleted
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.stores.mongodb import health as mongodb_health
from flask_gsession.stores.parts import Finding
from flask_gsession.stores.redis import health as redis_health
from flask_gsession.stores.redis.confirmation import Confirmation
from flask_gsession.stores.sqlite.file import SQLiteFile
from flask_gsession.testing import FakeClock, HookedStore, a_record
from tests.cli.test_command import down
from tests.harness.apps import Site
from tests.harness.servers import RedisServer, free_port

__all__ = ["down"]

SOUND = {
    "SECRET_KEY": "a key of some length, for tests",
    "SESSION_COOKIE_NAME": "__Host-session",
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
    "SESSION_IDLE_TIMEOUT": 900,
    "PERMANENT_SESSION_LIFETIME": 900,
    "SESSION_ABSOLUTE_TIMEOUT": 12 * 3600,
    "SESSION_STORE_TIMEOUT": 10,
}


# They are open, and not the newest; see test_doctor_exposure.py.
OF_TEST_SERVERS = {"password", "known fault"}


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerate the delays of a busy machine: slow answers, and clocks that are read later."""
    monkeypatch.setattr("flask_gsession.operate.health._SLOW", 10_000.0)
    for server in ("redis", "mongodb"):
        monkeypatch.setattr(f"flask_gsession.stores.{server}.health._SKEW", 20.0)


def application(store: object, **config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({**SOUND, **config})
    Session(app, store=store)
    return app


def examine(app: Flask, *options: str) -> Result:
    return app.test_cli_runner().invoke(gsession, ["doctor", *options])


def wrong(app: Flask) -> dict[str, str]:
    """The severity of each finding by its check, except findings on every test server."""
    rows = json.loads(examine(app, "--json").stdout)
    return {
        row["check"]: row["severity"]
        for row in rows
        if row["severity"] != "ok" and row["check"] not in OF_TEST_SERVERS
    }


# -- healthy stores


def test_a_healthy_store(site: Site) -> None:
    site.visitor().run(lambda session: session.update(a=1))  # makes file and index
    before = site.stored()
    found = check_store(site.store.store, site.clock)
    bad = {finding.check for finding in found if finding.severity != "ok"}
    assert bad - OF_TEST_SERVERS <= {
        "persistence",
        "replicas",
        "clock",
    }  # of the test's own server and clock
    assert {
        *("writes", "keeps ended sessions ended", "large values", "latency", "write latency")
    } <= {finding.check for finding in found}
    assert site.stored() == before
    assert site.inside.blobs() == {}


def test_healthy_storage_of_large_values(tmp_path: Path) -> None:
    app = application("memory://", SESSION_SPILL_STORE=f"file://{tmp_path}/large")
    assert wrong(app) == {}
    assert "ok       storage of large values" in examine(app).output
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"gsession"}


def test_the_exit_status_and_the_text() -> None:
    well = examine(application("memory://"))
    assert well.exit_code == 0
    assert "ok       writes" in well.output
    ill = examine(application("memory://", SESSION_COOKIE_HTTPONLY=False))
    assert ill.exit_code == 1
    assert "error    SESSION_COOKIE_HTTPONLY: off\n         Scripts can read" in ill.output


def test_flask_finds_the_command() -> None:
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    name, _, target = setup["options.entry_points"]["flask.commands"].strip().partition(" = ")
    assert EntryPoint(name, target, "flask.commands").load() is gsession
    assert name == gsession.name


def test_warnings_do_not_fail_the_doctor() -> None:
    app = application("memory://", SESSION_COOKIE_SAMESITE=None)
    assert wrong(app) == {"SESSION_COOKIE_SAMESITE": "warning"}
    assert examine(app).exit_code == 0


def test_several_sessions() -> None:
    app = application("memory://")
    Session(app, store="memory://", cookie_name="second")
    assert "[second] writes" in examine(app).output


def test_no_session_at_all() -> None:
    result = examine(Flask(__name__))
    assert result.exit_code == 1
    assert "call Session(app) first" in result.output


# -- mistakes, each made on purpose

Need = Callable[[str], Any]  # the value of a fixture


@contextmanager
def plain(**config: Any) -> Iterator[Flask]:
    """An application with these settings."""
    yield application("memory://", **config)


@contextmanager
def in_debug_mode() -> Iterator[Flask]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASK_DEBUG", "1")  # the command line reads nothing else
        yield application("memory://")


@contextmanager
def on_redis(need: Need, *, config: Any = None, **settings: str) -> Iterator[Flask]:
    """An application on a Redis whose server has these settings."""
    client = need("redis_client")
    before = {name: client.config_get(name)[name] for name in settings}
    try:
        for name, value in settings.items():
            client.config_set(name, value)
        yield application(need("redis_url"), **(config or {}))
    finally:
        for name, value in before.items():
            client.config_set(name, value)


@contextmanager
def with_too_few_replicas(need: Need) -> Iterator[Flask]:
    ask = Confirmation.ask

    def ask_soon(*asked: Any) -> None:
        ask(*asked[:-1], time.monotonic() + 0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Confirmation, "ask", ask_soon)
        with on_redis(need, config={"SESSION_LOGOUT_REPLICAS": 1}) as app:
            yield app


@contextmanager
def on_a_full_redis(need: Need) -> Iterator[Flask]:
    used = need("redis_client").info("memory")["used_memory"]
    with on_redis(need, maxmemory=str(int(used * 1.05))) as app:
        yield app


@contextmanager
def on_a_redis_without_info(need: Need) -> Iterator[Flask]:
    with RedisServer("--rename-command", "INFO", "") as server:
        yield application(server.url)


@contextmanager
def on_a_replica(need: Need) -> Iterator[Flask]:
    with RedisServer() as replica, Redis.from_url(replica.url) as client:
        client.replicaof("127.0.0.1", need("own_redis").port)
        yield application(replica.url)


@contextmanager
def on_a_redis_that_is_down(need: Need) -> Iterator[Flask]:
    yield application(f"redis://127.0.0.1:{free_port()}/0")


@contextmanager
def without_the_index(need: Need) -> Iterator[Flask]:
    app = application(need("mongodb_url"))
    wrong(app)  # makes the index
    need("mongo_client").get_database(app_database(app))["gsession"].drop_index("gsession_expiry")
    yield app


@contextmanager
def without_the_index_of_large_values(need: Need) -> Iterator[Flask]:
    app = application(need("mongodb_url"))
    wrong(app)  # makes the index
    blobs = need("mongo_client").get_database(app_database(app))["gsession_blobs"]
    blobs.drop_index("gsession_expiry")
    yield app


@contextmanager
def without_setrange(need: Need) -> Iterator[Flask]:
    client, user = need("redis_client"), f"doctor-{secrets.token_hex(4)}"
    client.execute_command("ACL", "SETUSER", user, "on", ">pass", "~*", "&*", "+@all", "-setrange")
    try:
        yield application(need("redis_url").replace("redis://", f"redis://{user}:pass@"))
    finally:
        client.acl_deluser(user)


@contextmanager
def without_the_table_of_large_values(need: Need) -> Iterator[Flask]:
    with on_a_file(need) as app:
        (interface,) = app.extensions["gsession"].values()
        with closing(sqlite3.connect(interface.store.path)) as db:
            db.execute("DROP TABLE gsession_frame")
        yield app


@contextmanager
def with_a_file_for_a_folder(need: Need) -> Iterator[Flask]:
    taken = need("tmp_path") / "taken"
    taken.write_text("no folder")
    yield application("memory://", SESSION_SPILL_STORE=f"file://{taken}/large")


@contextmanager
def with_an_emptied_place(need: Need) -> Iterator[Flask]:
    """Files that are gone as soon as they are written, as behind a mount that comes and goes."""
    import fsspec

    class Emptied(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        protocol = "doctors-emptied"

        def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
            if path.endswith("gsession"):
                super().pipe_file(path, value, **options)

    fsspec.register_implementation("doctors-emptied", Emptied, clobber=True)
    yield application("memory://", SESSION_SPILL_STORE="doctors-emptied://large")


def app_database(app: Flask) -> str:
    (interface,) = app.extensions["gsession"].values()
    with interface.store.lend_collection("look") as collection:
        return str(collection.database.name)


@contextmanager
def on_a_majority_in_memory(need: Need) -> Iterator[Flask]:
    server = need("own_mongo")
    with MongoClient[dict[str, Any]](server.url, timeoutMS=30_000) as client:

        def configure(journal: bool) -> None:
            config = client.admin.command("replSetGetConfig")["config"]
            config["writeConcernMajorityJournalDefault"] = journal
            config["version"] += 1
            client.admin.command("replSetReconfig", config)

        configure(False)
        try:
            yield application(server.url)
        finally:
            configure(True)


@contextmanager
def on_a_file(need: Need, folder: int = 0o700, file: int = 0o600) -> Iterator[Flask]:
    where = need("tmp_path") / "sessions"
    where.mkdir()
    app = application(f"sqlite:///{where}/sessions.sqlite3")
    assert wrong(app) == {}
    (where / "sessions.sqlite3").chmod(file)
    where.chmod(folder)
    yield app


@contextmanager
def on_a_file_that_cannot_have_wal(need: Need) -> Iterator[Flask]:
    """As on a file system without shared memory, where SQLite keeps its journal mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SQLiteFile, "_switch_to_wal", lambda *_: None)
        yield application(need("sqlite_url"))


@contextmanager
def on_a_damaged_file(need: Need) -> Iterator[Flask]:
    with on_a_file(need) as app:
        (interface,) = app.extensions["gsession"].values()
        clock = FakeClock(time.time())
        for _ in range(40):
            interface.store.create(a_record(clock, idle=900, payload=bytes(2000)))
        interface.store.close()
        path = interface.store.path
        content = bytearray(path.read_bytes())
        content[40_960:61_440] = bytes(20_480)
        path.write_bytes(content)
        yield app


@contextmanager
def on_a_slow_store(need: Need) -> Iterator[Flask]:
    class Slow(MemoryStore):
        def load(self, key: str) -> Record | None:
            time.sleep(0.06)
            return super().load(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flask_gsession.operate.health._MAX_SECONDS", 0.3)
        patch.setattr("flask_gsession.operate.health._SLOW", 50.0)
        yield application(Slow())


MISTAKES: dict[str, tuple[Callable[[Need], Any], dict[str, str]]] = {
    "no key": (lambda _: plain(SECRET_KEY=None), {"SECRET_KEY": "error"}),
    "a short key": (lambda _: plain(SECRET_KEY="dev"), {"SECRET_KEY": "error"}),
    "a placeholder": (
        lambda _: plain(SECRET_KEY="please-change-me-in-production"),
        {"SECRET_KEY": "error"},
    ),
    "a key that repeats itself": (
        lambda _: plain(SECRET_KEY="abcabcabcabcabcabcabcabc"),
        {"SECRET_KEY": "error"},
    ),
    "an old key that is short": (
        lambda _: plain(SECRET_KEY_FALLBACKS=["old"]),
        {"SECRET_KEY_FALLBACKS": "error"},
    ),
    "a cookie over plain HTTP": (
        lambda _: plain(SESSION_COOKIE_SECURE=False, SESSION_COOKIE_NAME="session"),
        {"SESSION_COOKIE_SECURE": "warning"},
    ),
    "a cookie for scripts": (
        lambda _: plain(SESSION_COOKIE_HTTPONLY=False),
        {"SESSION_COOKIE_HTTPONLY": "error"},
    ),
    "a cookie for other sites": (
        lambda _: plain(SESSION_COOKIE_SAMESITE=None),
        {"SESSION_COOKIE_SAMESITE": "warning"},
    ),
    "a cookie without a prefix": (
        lambda _: plain(SESSION_COOKIE_NAME="session"),
        {"cookie prefix": "warning"},
    ),
    "a cookie for a whole domain": (
        lambda _: plain(
            SESSION_COOKIE_NAME="__Secure-session", SESSION_COOKIE_DOMAIN="example.org"
        ),
        {"SESSION_COOKIE_DOMAIN": "warning"},
    ),
    "debug mode": (lambda _: in_debug_mode(), {"debug": "warning"}),
    "debug dumps": (lambda _: plain(SESSION_DEBUG=True), {"SESSION_DEBUG": "warning"}),
    "testing mode": (lambda _: plain(TESTING=True), {"TESTING": "warning"}),
    "sessions for months": (
        lambda _: plain(SESSION_ABSOLUTE_TIMEOUT=90 * 86400),
        {"timeouts": "warning"},
    ),
    "a store that is down": (on_a_redis_that_is_down, {"answers": "error"}),
    "a store that is slow": (on_a_slow_store, {"latency": "warning"}),
    "a Redis that evicts": (
        lambda need: on_redis(
            need, **{"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, appendonly="no"
        ),
        {"eviction": "error", "persistence": "warning", "replicas": "warning"},
    ),
    "a Redis that may evict one day": (
        lambda need: on_redis(need, **{"maxmemory-policy": "volatile-lru"}),
        {"eviction": "warning", "persistence": "warning", "replicas": "warning"},
    ),
    "a Redis that is full": (
        on_a_full_redis,
        {"memory": "error", "persistence": "warning", "replicas": "warning"},
    ),
    "a Redis that refuses INFO": (on_a_redis_without_info, {"server": "warning"}),
    "a Redis that is a replica": (
        on_a_replica,
        {"answers": "error", "role": "error", "persistence": "warning"},
    ),
    "too few replicas for a logout": (
        with_too_few_replicas,
        {"answers": "error", "replicas": "error", "persistence": "warning"},
    ),
    "a MongoDB without its index": (
        without_the_index,
        {"expiry index": "error", "replicas": "warning"},
    ),
    "a MongoDB without its index of large values": (
        without_the_index_of_large_values,
        {"expiry index of large values": "error", "replicas": "warning"},
    ),
    "a Redis user who may not write large values": (
        without_setrange,
        {"large values": "error"},
    ),
    "an SQLite file without its large values": (
        without_the_table_of_large_values,
        {"large values": "error"},
    ),
    "no folder for large values": (
        with_a_file_for_a_folder,
        {"storage of large values": "error"},
    ),
    "a place that keeps no large values": (
        with_an_emptied_place,
        {"storage of large values": "error"},
    ),
    "a MongoDB whose majority forgets": (
        on_a_majority_in_memory,
        {"write concern": "warning", "replicas": "warning"},
    ),
    "an SQLite file for everybody": (
        lambda need: on_a_file(need, file=0o644),
        {"file permissions": "error"},
    ),
    "an SQLite folder for everybody": (
        lambda need: on_a_file(need, folder=0o777),
        {"folder permissions": "error"},
    ),
    "an SQLite file without a journal beside it": (
        on_a_file_that_cannot_have_wal,
        {"journal": "warning"},
    ),
    "a damaged SQLite file": (on_a_damaged_file, {"integrity": "error"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found(mistake: str, request: pytest.FixtureRequest) -> None:
    make, expected = MISTAKES[mistake]
    with make(request.getfixturevalue) as app:
        found = wrong(app)
        failed = examine(app).exit_code
    assert {check: found.get(check) for check in expected} == expected
    assert failed == ("error" in found.values())
    if "Mongo" not in mistake and "Redis" not in mistake and "SQLite" not in mistake:
        assert found == expected


def test_a_store_that_is_down(down: str) -> None:
    result = examine(application(down, SESSION_STORE_TIMEOUT=0.2))
    assert result.exit_code == 1
    assert "error    answers: " in result.output
    assert "canary" not in result.output
    assert "Traceback" not in result.output


def test_the_weakness_of_a_key_is_reported() -> None:
    for key, what in {"dev": "3 characters", "abc" * 8: "repeats itself"}.items():
        assert (
            f"error    SECRET_KEY: {what}"
            in examine(application("memory://", SECRET_KEY=key)).output
        )


def test_no_secret_is_shown() -> None:
    app = application(
        f"redis://user:canary-pass@127.0.0.1:{free_port()}/0", SECRET_KEY="canary-key"
    )
    for options in ([], ["--json"]):
        assert "canary" not in examine(app, *options).output


# -- faults of the store


class Forgetful(MemoryStore):
    """Breaks the contract in one way."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def create(self, record: Record) -> None:
        if self.fault == "creates once":
            self._records.pop(record.key, None)
        super().create(record)
        if self.fault == "reads what was written":
            self._records[record.key] = record._replace(payload=b"")

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        if self.fault == "saves":
            raise StoreError("not today")
        if self.fault == "refuses a stale save" and record.key in self._records:
            expected_version = self._records[record.key].version
        if self.fault == "keeps ended sessions ended" and record.key not in self._records:
            return
        there = self._records.get(record.key)
        if self.fault == "lets expire" and there and self._unexpired(record.key) is None:
            return
        if self.fault == "reads what was saved":
            record = record._replace(payload=b"")
        super().save(record, expected_version, lease, shorten=shorten)

    def delete(
        self, key: str, expected_version: int | None = None, lease: str | None = None
    ) -> Deleted:
        deleted = super().delete(key, expected_version, lease)
        return deleted._replace(found=deleted.found and self.fault != "deletes")


class Keeping(MemoryStore):
    """Lets no large value go, or not when it is time."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.asked = False  # to let one go at once

    def renew_blobs(self, names: Sequence[str], expires_at: int) -> None:
        if self.fault == "renewed":
            self._blobs.clear()
        super().renew_blobs(names, expires_at)

    def discard_blobs(self, names: Sequence[str], at: int) -> None:
        first, self.asked = not self.asked, True
        if self.fault != ("discarded" if first else "expired"):
            super().discard_blobs(names, at)


@pytest.mark.parametrize("fault", ["renewed", "discarded", "expired"])
def test_a_store_that_breaks_the_contract_of_large_values(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_gsession.operate.health._MAX_SECONDS", 0.1)
    found = [finding for finding in check_store(Keeping(fault)) if finding.severity != "ok"]
    assert [finding[:3] for finding in found] == [
        ("error", "large values", f"they can't be {fault}")
    ]


@pytest.mark.parametrize(
    "fault",
    [
        "reads what was written",
        "creates once",
        "saves",
        "refuses a stale save",
        "reads what was saved",
        "lets expire",
        "deletes",
        "keeps ended sessions ended",
    ],
)
def test_a_store_that_breaks_its_contract(fault: str) -> None:
    store = Forgetful(fault)
    found = [finding for finding in check_store(store) if finding.severity != "ok"]
    assert [(finding.severity, finding.check) for finding in found] == [("error", fault)]
    assert store._records == {}


# The second is of a socket or a file: no server said that the user lacks a right.
@pytest.mark.parametrize("detail", ["pulled the plug", "redis: GET: [Errno 13] Permission denied"])
def test_an_outage_on_the_way_leaves_nothing_behind(detail: str) -> None:
    store = HookedStore(MemoryStore())

    def fail() -> None:
        raise StoreUnavailable(detail)

    store.before("save", fail)
    assert check_store(store) == [
        Finding(
            "error", "answers", detail, "Check that it is running, and that its URL is correct."
        )
    ]
    inner: Any = store.store
    assert inner._records == {}


def test_a_redis_whose_user_may_not_ask(redis_client: Redis, redis_url: str) -> None:
    redis_client.acl_setuser(
        "doctor-test", enabled=True, passwords=["+pass"], keys=["*"], channels=["*"],
        commands=["+@all", "-info"],
    )  # fmt: skip
    try:
        url = redis_url.replace("redis://", "redis://doctor-test:pass@")
        assert wrong(application(url)) == {"server": "warning"}
    finally:
        redis_client.acl_deluser("doctor-test")


def test_a_clock_that_is_off(site: Site) -> None:
    site.visitor().run(lambda session: session.update(a=1))
    site.clock.advance(60)
    found = {finding.check: finding for finding in check_store(site.store.store, site.clock)}
    if site.url.startswith(("redis", "mongodb")):
        assert found["clock"].severity == "error"
    else:
        assert "clock" not in found


def test_a_mongodb_whose_user_may_not_ask(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OperationFailure("not authorized", 13, {"codeName": "Unauthorized"})

    monkeypatch.setattr(Collection, "index_information", refuse)
    found = wrong(application(mongodb_url))
    indexes = ("expiry index", "expiry index of large values")
    assert found == dict.fromkeys((*indexes, "replicas"), "warning")


def test_the_advice_for_a_missing_right_is_not_about_the_url(
    redis_client: Redis, redis_url: str
) -> None:
    user = f"doctor-{secrets.token_hex(4)}"
    redis_client.execute_command(
        "ACL", "SETUSER", user, "on", ">pass", "~*", "&*", "+@all", "-get"
    )  # fmt: skip
    try:
        rows = examine(application(redis_url.replace("//", f"//{user}:pass@")), "--json").stdout
    finally:
        redis_client.acl_deluser(user)
    (answers,) = (row for row in json.loads(rows) if row["check"] == "answers")
    assert answers["severity"] == "error"
    assert answers["advice"].startswith("The store answers: grant its user that permission")


# -- the settings that a server reports

WELL = {"redis_version": "7.0.15", "maxmemory_policy": "noeviction", "aof_enabled": "1"}
SLAVE = "ip=db,port=1,state={},offset=90,lag={}"


@pytest.mark.parametrize(
    ("told", "severity", "check", "found"),
    [
        ({"redis_version": "6.0.20"}, "error", "server version", "6.0.20"),
        ({"redis_version": "6.2.0"}, "ok", "server version", "6.2.0"),
        ({"redis_version": "next"}, "warning", "server version", "unknown"),
        ({"rdb_last_bgsave_status": "err"}, "error", "persistence", "the last snapshot failed"),
        (
            {"aof_last_write_status": "err"},
            "error",
            "persistence",
            "the append-only file cannot be written",
        ),
        (
            {"slave0": SLAVE.format("online", 1)},
            "ok",
            "replica",
            "db:1 online, 10 bytes behind, last heard from 1 s ago",
        ),
        (
            {"slave0": SLAVE.format("online", 6)},
            "warning",
            "replica",
            "db:1 online, 10 bytes behind, last heard from 6 s ago",
        ),
        (
            {"slave0": SLAVE.format("wait_bgsave", 0)},
            "warning",
            "replica",
            "db:1 wait_bgsave, 10 bytes behind, last heard from 0 s ago",
        ),
    ],
)
def test_findings_from_redis_info(
    told: dict[str, str], severity: str, check: str, found: str
) -> None:
    about = {**WELL, **told, "connected_slaves": "1", "master_repl_offset": "100"}
    rows = redis_health.checked(about, 0.0, 0)
    assert [row[:3] for row in rows if row.check == check] == [(severity, check, found)]


@pytest.mark.parametrize(("version", "severity"), [("4.4.29", "error"), ("5.0.0", "ok")])
def test_how_old_a_mongodb_is(version: str, severity: str) -> None:
    assert mongodb_health._version(version).severity == severity


@pytest.mark.parametrize(
    ("skew", "severity", "found"),
    [(-0.04, "ok", "+0.0 s"), (0.26, "ok", "+0.3 s"), (-20.06, "error", "-20.1 s")],
)
def test_how_far_a_clock_is_off(skew: float, severity: str, found: str) -> None:
    for rows in (redis_health._clock(skew), mongodb_health._clock(skew)):
        (row,) = rows
        assert row[:3] == (severity, "clock", f"the server's is {found} from this machine's")


@pytest.mark.parametrize(
    ("idle", "hours", "level"),
    [(900, 12, 3), (901, 12, 2), (1800, 12, 2), (1801, 12, 1), (900, 13, 1), (900, 720, 1)],
)
def test_the_level_of_the_timeouts(idle: int, hours: int, level: int) -> None:
    app = application(
        "memory://",
        SESSION_IDLE_TIMEOUT=900,
        PERMANENT_SESSION_LIFETIME=idle,
        SESSION_ABSOLUTE_TIMEOUT=hours * 3600,
    )
    rows = json.loads(examine(app, "--json").stdout)
    (row,) = (row for row in rows if row["check"] == "timeouts")
    assert row["severity"] == "ok"
    assert row["found"].endswith(f": level {level} of OWASP ASVS 4.0.3, V3.3.2")
