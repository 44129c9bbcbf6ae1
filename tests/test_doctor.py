"""`flask gsession doctor`: what is wrong is found, and what is well is left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from configparser import ConfigParser
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
from flask_gsession.health import check_store
from flask_gsession.stores import Record
from flask_gsession.stores.base import Finding
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import HookedStore
from tests.apps import Site
from tests.servers import RedisServer, free_port

SOUND = {
    "SECRET_KEY": "a key of some length, for tests",
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
}


def application(store: object, **config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({**SOUND, **config})
    Session(app, store=store)
    return app


def examine(app: Flask, *options: str) -> Result:
    return app.test_cli_runner().invoke(gsession, ["doctor", *options])


def wrong(app: Flask) -> dict[str, str]:
    """What is found to be wrong: severity by check."""
    rows = json.loads(examine(app, "--json").output)
    return {row["check"]: row["severity"] for row in rows if row["severity"] != "ok"}


# -- what is well


def test_a_store_that_is_well(site: Site) -> None:
    site.visitor().run(lambda session: session.update(a=1))  # makes file and index
    before = site.stored()
    found = check_store(site.store.store, site.clock)
    bad = {finding.check for finding in found if finding.severity != "ok"}
    assert bad <= {"persistence", "clock"}  # of the test's own server and clock
    assert {"writes", "keeps the dead dead", "latency"} <= {finding.check for finding in found}
    assert site.stored() == before


def test_the_exit_status_and_the_text() -> None:
    well = examine(application("memory://"))
    assert well.exit_code == 0
    assert "ok       writes" in well.output
    ill = examine(application("memory://", SESSION_COOKIE_HTTPONLY=False))
    assert ill.exit_code == 1
    assert "error    SESSION_COOKIE_HTTPONLY: off\n         Scripts can read" in ill.output


def test_flask_finds_the_command() -> None:
    setup = ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    name, _, target = setup["options.entry_points"]["flask.commands"].strip().partition(" = ")
    assert EntryPoint(name, target, "flask.commands").load() is gsession
    assert name == gsession.name


def test_warnings_are_no_failure() -> None:
    app = application("memory://", SESSION_COOKIE_SECURE=False)
    assert wrong(app) == {"SESSION_COOKIE_SECURE": "warning"}
    assert examine(app).exit_code == 0


def test_several_sessions() -> None:
    app = application("memory://")
    Session(app, store="memory://", cookie_name="second")
    assert "[second] writes" in examine(app).output


def test_no_session_at_all() -> None:
    result = examine(Flask(__name__))
    assert result.exit_code == 1
    assert "call Session(app) first" in result.output


# -- what is wrong with the application


@pytest.mark.parametrize(
    ("config", "check", "severity"),
    [
        ({"SECRET_KEY": None}, "SECRET_KEY", "error"),
        ({"SECRET_KEY": "dev"}, "SECRET_KEY", "error"),
        ({"SESSION_COOKIE_SECURE": False}, "SESSION_COOKIE_SECURE", "warning"),
        ({"SESSION_COOKIE_HTTPONLY": False}, "SESSION_COOKIE_HTTPONLY", "error"),
        ({"SESSION_COOKIE_SAMESITE": None}, "SESSION_COOKIE_SAMESITE", "warning"),
        ({"SESSION_COOKIE_SAMESITE": "None"}, "SESSION_COOKIE_SAMESITE", "warning"),
    ],
)
def test_the_application(config: dict[str, Any], check: str, severity: str) -> None:
    assert wrong(application("memory://", **config)) == {check: severity}


def test_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")  # the command line reads nothing else
    assert wrong(application("memory://")) == {"debug": "warning"}


def test_no_secret_is_shown() -> None:
    app = application(
        f"redis://user:canary-pass@127.0.0.1:{free_port()}/0", SECRET_KEY="canary-key"
    )
    for options in ([], ["--json"]):
        assert "canary" not in examine(app, *options).output


# -- what is wrong with the store


def test_a_store_that_is_down() -> None:
    app = application(f"redis://127.0.0.1:{free_port()}/0")
    assert wrong(app) == {"answers": "error"}
    assert examine(app).exit_code == 1


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

    def load(self, key: str) -> Record | None:
        record = self._records.get(key)
        return record if self.fault == "lets expire" else super().load(key)

    def save(self, record: Record, expected_version: int, lease: str | None = None) -> None:
        if self.fault == "saves":
            raise StoreError("not today")
        if self.fault == "refuses a stale save" and record.key in self._records:
            expected_version = self._records[record.key].version
        if self.fault == "keeps the dead dead" and record.key not in self._records:
            return
        if self.fault == "reads what was saved":
            record = record._replace(payload=b"")
        super().save(record, expected_version, lease)

    def delete(
        self, key: str, expected_version: int | None = None, lease: str | None = None
    ) -> bool:
        return super().delete(key, expected_version, lease) and self.fault != "deletes"


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
        "keeps the dead dead",
    ],
)
def test_a_store_that_breaks_its_contract(fault: str) -> None:
    store = Forgetful(fault)
    found = [finding for finding in check_store(store) if finding.severity != "ok"]
    assert [(finding.severity, finding.check) for finding in found] == [("error", fault)]
    assert store._records == {}


def test_an_outage_on_the_way_leaves_nothing_behind() -> None:
    store = HookedStore(MemoryStore())

    def fail() -> None:
        raise StoreUnavailable("pulled the plug")

    store.before("save", fail)
    assert check_store(store) == [
        Finding("error", "answers", "pulled the plug", "Is it running, and is its URL right?")
    ]
    inner: Any = store.store
    assert inner._records == {}


@pytest.fixture
def server_says(redis_url: str, redis_client: Redis) -> Callable[..., dict[str, str]]:
    """What is wrong with a Redis, while its settings are these."""

    def says(**settings: str) -> dict[str, str]:
        before = {name: redis_client.config_get(name)[name] for name in settings}
        try:
            for name, value in settings.items():
                redis_client.config_set(name, value)
            return wrong(application(redis_url))
        finally:
            for name, value in before.items():
                redis_client.config_set(name, value)

    return says


def test_a_redis_that_evicts(server_says: Callable[..., dict[str, str]]) -> None:
    policy = {"maxmemory-policy": "allkeys-lru"}
    assert server_says(**policy)["eviction"] == "warning"
    assert server_says(**policy, maxmemory="100mb")["eviction"] == "error"
    assert "eviction" not in server_says()


def test_a_redis_without_persistence(server_says: Callable[..., dict[str, str]]) -> None:
    assert server_says(appendonly="no")["persistence"] == "warning"


def test_a_redis_that_is_a_replica(own_redis: RedisServer) -> None:
    with RedisServer() as replica, Redis.from_url(replica.url) as client:
        app = application(replica.url)
        client.replicaof("127.0.0.1", own_redis.port)
        assert wrong(app) == {"answers": "error"}
        assert "read" in examine(app).output.lower()


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


def test_a_mongodb_without_its_index(mongodb_url: str) -> None:
    app = application(mongodb_url)
    wrong(app)  # makes the index
    assert "expiry index" not in wrong(app)
    with MongoClient[dict[str, Any]](mongodb_url, timeoutMS=10_000) as client:
        client.get_default_database()["gsession"].drop_index("gsession_expiry")
    assert wrong(app)["expiry index"] == "error"


def test_a_mongodb_whose_user_may_not_ask(
    mongodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OperationFailure("not authorized", 13, {"codeName": "Unauthorized"})

    monkeypatch.setattr(Collection, "index_information", refuse)
    assert wrong(application(mongodb_url)) == {"expiry index": "warning"}


def test_an_sqlite_file_for_everybody(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    app = application(f"sqlite:///{path}")
    assert wrong(app) == {}
    os.chmod(path, 0o644)
    assert wrong(app) == {"file rights": "error"}
