"""The stores of old sessions: each reader finds, removes and lists them."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cachelib.file import FileSystemCache
from click.testing import CliRunner
from flask import Flask, session
from flask.cli import ScriptInfo
from flask_sqlalchemy import SQLAlchemy
from pymongo import MongoClient
from redis import Redis

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.errors import StoreUnavailable, UnreadableRecord
from flask_gsession.events import CircuitOpened
from flask_gsession.moving.cachelib_cache import CacheFiles
from flask_gsession.moving.sqlalchemy_table import SQLAlchemyTable
from flask_gsession.stores import StoreOptions
from flask_gsession.stores.foreign import ForeignValues
from flask_gsession.stores.mongodb import MongoDBStore
from flask_gsession.stores.redis import RedisStore
from tests.harness.apps import Site, SiteMaker
from tests.harness.servers import mongo_server, redis_server

from .old import KEY, UNTIL, OldFiles

Put = Callable[[str, Any, datetime | None], None]


class Kept:
    """A reader, and a function that stores a value until a time, as Flask-Session does."""

    def __init__(self, values: ForeignValues, put: Put, prefix: str) -> None:
        self.values, self.put, self.prefix = values, put, prefix


@pytest.fixture(params=["redis", "mongodb", "sqlalchemy", "files"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    """Each place in turn. Redis and cachelib have a clock of their own, so all have that."""
    prefix = f"test-{secrets.token_hex(6)}[*]:"
    make = {
        "redis": on_redis,
        "mongodb": on_mongodb,
        "sqlalchemy": on_sqlalchemy,
        "files": in_files,
    }
    yield from make[request.param](prefix, tmp_path)


def on_redis(prefix: str, folder: Path) -> Iterator[Kept]:
    with Redis.from_url(redis_server().url) as client:

        def put(name: str, value: Any, until: datetime | None) -> None:
            if isinstance(value, bytes):
                client.set(name, value, pxat=None if until is None else until)
            else:
                client.rpush(name, "no string")

        store = RedisStore(redis_server().url)
        yield Kept(store.strings(), put, prefix)
        store.close()
        for name in client.scan_iter(prefix.replace("[*]", "*") + "*"):
            client.delete(name)


def on_mongodb(prefix: str, folder: Path) -> Iterator[Kept]:
    name = f"test_{secrets.token_hex(6)}"
    with MongoClient[dict[str, Any]](mongo_server().url) as client:

        def put(key: str, value: Any, until: datetime | None) -> None:
            document = {"id": key, "val": value, "expiration": until}
            client[name]["sessions"].update_one({"id": key}, {"$set": document}, upsert=True)

        store = MongoDBStore(mongo_server().url)
        yield Kept(store.documents(name, "sessions"), put, prefix)
        store.close()
        client.drop_database(name)


def on_sqlalchemy(prefix: str, folder: Path) -> Iterator[Kept]:
    engine = sa.create_engine(f"sqlite:///{folder}/old.db")
    columns = [sa.Column("id", sa.Integer, primary_key=True), sa.Column("session_id", sa.String)]
    columns += [sa.Column("data", sa.LargeBinary), sa.Column("expiry", sa.DateTime)]
    table = sa.Table("sessions", sa.MetaData(), *columns)
    table.create(engine)

    def put(key: str, value: Any, until: datetime | None) -> None:
        data = value if isinstance(value, bytes) else None
        naive = None if until is None else until.astimezone(UTC).replace(tzinfo=None)
        with engine.begin() as connection:
            connection.execute(sa.delete(table).where(table.c.session_id == key))
            connection.execute(sa.insert(table).values(session_id=key, data=data, expiry=naive))

    yield Kept(SQLAlchemyTable(lambda: engine, "sessions", None, time.time), put, prefix)
    engine.dispose()


def in_files(prefix: str, folder: Path) -> Iterator[Kept]:
    cache = FileSystemCache(str(folder / "old"), threshold=0)

    def put(key: str, value: Any, until: datetime | None) -> None:
        path = Path(cache._get_filename(key))
        end = 0 if until is None else int(until.timestamp())
        path.write_bytes(end.to_bytes(4, "little") + value if isinstance(value, bytes) else b"x")

    yield Kept(CacheFiles(str(folder / "old"), time.time), put, prefix)


SOON = timedelta(hours=1)


def test_a_stored_value(kept: Kept) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + SOON
    name = f"{kept.prefix}one"
    assert kept.values.load(name) is None
    kept.put(name, b"\x00\xffvalue", end)
    found = kept.values.load(name)
    assert found is not None
    assert found.value == b"\x00\xffvalue"
    assert found.expires_at == pytest.approx(end.timestamp() * 1000, abs=1500)
    assert "value" not in repr(found).replace("Foreign value", "")
    kept.values.delete(name)
    kept.values.delete(name)
    assert kept.values.load(name) is None


def test_an_expired_value(kept: Kept) -> None:
    name = f"{kept.prefix}late"
    kept.put(name, b"value", datetime.now(UTC) - timedelta(seconds=2))
    assert kept.values.load(name) is None


def test_a_value_without_an_expiry(kept: Kept) -> None:
    """Flask-Session takes a row or document without an expiry for expired."""
    name = f"{kept.prefix}endless"
    kept.put(name, b"value", None)
    found = kept.values.load(name)
    if isinstance(kept.values, CacheFiles) or "Redis" in type(kept.values).__name__:
        assert found is not None
        assert found.expires_at is None
    else:
        assert found is None


def test_a_foreign_value_is_unreadable(kept: Kept) -> None:
    name = f"{kept.prefix}other"
    kept.put(name, 7, datetime.now(UTC) + SOON)
    with pytest.raises(UnreadableRecord):
        kept.values.load(name)


def test_listing_names(kept: Kept) -> None:
    names = {f"{kept.prefix}{number:04}" for number in range(1203)}
    end = datetime.now(UTC) + SOON
    if isinstance(kept.values, CacheFiles):
        with pytest.raises(NotImplementedError):
            kept.values.names(kept.prefix)
        return
    some = sorted(names)[:40]
    for name in some:
        kept.put(name, b"v", end)
    kept.put("elsewhere:" + kept.prefix, b"v", end)
    assert set(kept.values.names(kept.prefix)) == set(some)
    kept.values.delete("elsewhere:" + kept.prefix)


def test_md5_names_of_an_earlier_cachelib(tmp_path: Path) -> None:
    import hashlib

    cache = FileSystemCache(str(tmp_path), threshold=0, hash_method=hashlib.md5)
    cache.set("session:a", {"a": 1})
    values = CacheFiles(str(tmp_path), time.time)
    assert values.load("session:a") is not None
    assert CacheFiles(str(tmp_path), time.time, hashlib.sha256).load("session:a") is None
    values.delete("session:a")
    assert list(tmp_path.glob("*")) == []


# Outages --------------------------------------------------------------------------------------


def test_a_store_that_is_down(tmp_path: Path) -> None:
    options = StoreOptions(timeout=0.2)
    readers: list[ForeignValues] = [
        RedisStore("redis://127.0.0.1:1", options).strings(),
        MongoDBStore("mongodb://127.0.0.1:1", options).documents("a", "b"),
        SQLAlchemyTable(
            lambda: sa.create_engine(f"sqlite:///{tmp_path}/no/such/folder"), "t", None, time.time
        ),
    ]
    for values in readers:
        with pytest.raises(StoreUnavailable) as error:
            values.load("session:geheim")
        assert "geheim" not in str(error.value)
        with pytest.raises(StoreUnavailable):
            values.delete("session:geheim")
    (tmp_path / "folder").mkdir(mode=0o700)
    files = CacheFiles(str(tmp_path / "folder"), time.time)
    Path(files._paths("session:geheim")[0]).mkdir()
    with pytest.raises(StoreUnavailable, match="filesystem: load: Is a directory"):
        files.load("session:geheim")


def test_an_old_store_that_is_down_costs_no_time_for_long(make_site: SiteMaker) -> None:
    """Requests that need it get 503, at once after a few; others notice nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        config = {"SESSION_TYPE": "redis", "SESSION_REDIS": url, "SESSION_IMPORT_UNTIL": UNTIL}
        site = make_site(config=config, store_timeout=0.3, breaker_failures=2, breaker_pause=60)
        ask_in_vain(site)


def ask_in_vain(site: Site) -> None:
    old = site.visitor()
    old.set_cookie("session", "a" * 43)
    known = site.visitor()
    known.run(lambda session: session.update(a=1))
    for _ in range(4):
        response = old.ask(dict)
        assert response.status_code == 503
        assert response.headers["Retry-After"]
    (opened,) = site.happened(CircuitOpened)
    assert opened.operations == "old sessions"
    assert known.run(dict) == {"a": 1, "_permanent": True}
    assert old.get_cookie("session") is not None


# In an application ----------------------------------------------------------------------------


@pytest.mark.parametrize("bind", [None, "sessions"])
def test_flask_sqlalchemys_object(tmp_path: Path, bind: str | None) -> None:
    """As applications have it: the engine needs an application context."""
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=KEY,
        SESSION_STORE="memory://",
        SESSION_TYPE="sqlalchemy",
        SESSION_IMPORT_UNTIL=UNTIL,
        SESSION_SQLALCHEMY_BIND_KEY=bind,
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/main.db",
        SQLALCHEMY_BINDS={"sessions": f"sqlite:///{tmp_path}/sessions.db"},
    )
    app.config["SESSION_SQLALCHEMY"] = database = SQLAlchemy(app)
    Session(app)
    with app.app_context(), database.engines[bind].begin() as connection:
        connection.execute(
            sa.text("CREATE TABLE sessions (session_id, data BLOB, expiry DATETIME)")
        )
        row = {"id": f"session:{'a' * 43}", "data": b'{"a": 1}'}
        insert = "INSERT INTO sessions VALUES (:id, :data, '2100-01-01 00:00:00.000000')"
        connection.execute(sa.text(insert), row)
    app.add_url_rule("/", "look", lambda: dict(session))
    app.add_url_rule("/out", "out", lambda: session.destroy() or "")
    client = app.test_client()
    client.set_cookie("session", "a" * 43)
    assert client.get("/").json == {"a": 1}
    client.get("/out")
    with app.app_context(), database.engines[bind].begin() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM sessions")).scalar() == 0


def test_the_command_revokes_the_old_record_too(make_site: SiteMaker, tmp_path: Path) -> None:
    old = OldFiles(tmp_path / "old")
    site: Site = make_site(config=old.config)
    sid = old.add(_user_id="7")
    visitor = site.visitor()
    visitor.set_cookie("session", sid)
    handle = visitor.run(lambda session: session.handle)
    info = ScriptInfo(create_app=lambda: site.app)
    result = CliRunner().invoke(gsession, ["revoke", handle, "--yes"], obj=info)
    assert result.exit_code == 0, result.output
    assert not old.has(sid)
    assert visitor.run(dict) == {}


# Records of other versions ----------------------------------------------------------------------

#: As real applications on these versions stored `_user_id`. 0.7 writes the same as 0.8.
PICKLED = b'\x80\x04\x95"\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\n_permanent\x94\x88\x8c\x08_user_id'
PICKLED += b"\x94\x8c\x017\x94u."
RECORDED = {
    "0.6-redis": ("XhJWQrzc54FNIRwD9-xpWmCb1eKIKzMmfIDt-mTn650", PICKLED),
    "0.6-mongodb": (
        "We8SDy-fClCDWOiBoNUvhMsmVcPSunxuKfd8I_31NdU.Uxdk7tf2SFMjywCXrW6BlflIepk",
        PICKLED,
    ),
    "0.7-mongodb": (
        "WjMG-IEMrtHB4nIHGwqxO9fRSn49tv21s-5iqLY3HIU.g7yp66WjbDZWrx1cASZVFPxLavs",
        b"\x82\xaa_permanent\xc3\xa8_user_id\xa17",
    ),
    "0.7-files": (
        "Sldn-SfRADiciLdnuCQEg_fKosQRSunQfYut0OlL8UQ",
        b"\x80\x05" + PICKLED[2:],
    ),
}


@pytest.mark.parametrize("recorded", RECORDED)
def test_records_of_other_versions(tmp_path: Path, recorded: str) -> None:
    cookie, stored = RECORDED[recorded]
    kind, sid = recorded.partition("-")[2], cookie.partition(".")[0]
    name = f"test_{secrets.token_hex(6)}"
    config: dict[str, Any] = {"SESSION_TYPE": kind, "SESSION_USE_SIGNER": "." in cookie}
    later = datetime.now(UTC) + timedelta(hours=1)
    with Redis.from_url(redis_server().url) as redis, MongoClient(mongo_server().url) as mongo:
        if kind == "redis":
            redis.set(f"{name}:{sid}", stored, ex=60)
            config |= {"SESSION_REDIS": redis, "SESSION_KEY_PREFIX": f"{name}:"}
        elif kind == "mongodb":
            document = {"id": f"session:{sid}", "val": stored, "expiration": later}
            mongo[name]["sessions"].insert_one(document)
            config |= {"SESSION_MONGODB": mongo, "SESSION_MONGODB_DB": name}
        else:
            old = OldFiles(tmp_path)
            old.put_raw(sid, stored)
            config |= old.config
        app = Flask(__name__)
        app.config.update(config, SECRET_KEY=KEY, SESSION_IMPORT_UNTIL=UNTIL)
        ext = Session(app, store="memory://")
        app.add_url_rule("/", view_func=lambda: dict(session))
        browser = app.test_client()
        browser.set_cookie("session", cookie)
        assert browser.get("/").json == {"_permanent": True, "_user_id": "7"}
        ext.close(app)
        redis.delete(f"{name}:{sid}")
        mongo.drop_database(name)
