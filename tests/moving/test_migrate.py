"""`flask gsession migrate`: old sessions are taken over without a request."""

from __future__ import annotations

import datetime as dt
import os
import pickle
import secrets
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import ScriptInfo
from flask_login import LoginManager
from markupsafe import Markup
from pymongo import MongoClient
from redis import Redis

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.events import SessionImported
from flask_gsession.moving.migrating import Migration
from flask_gsession.moving.takeover import Takeover
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker
from tests.harness.servers import mongo_server, redis_server

from .old import KEY, UNTIL, OldFiles, visit


class Old:
    """Flask-Session's sessions: `put` stores bytes under a name, `has` looks for them."""

    def __init__(
        self, put: Callable[[str, bytes], None], has: Callable[[str], bool], **config: Any
    ) -> None:
        self._put, self._has = put, has
        self.prefix = f"test-{secrets.token_hex(6)}:"
        self.config = {
            "SESSION_KEY_PREFIX": self.prefix,
            "SESSION_IMPORT_UNTIL": UNTIL,
            **config,
        }

    def add(self, **values: Any) -> str:
        """Store a session as version 0.8 does; returns the value of its cookie."""
        return self.add_raw(msgspec.msgpack.encode({"_permanent": True, **values}))

    def add_pickle(self, contents: Any, protocol: int = 4) -> str:
        """The same as version 0.5 does."""
        return self.add_raw(pickle.dumps(contents, protocol))

    def add_raw(self, stored: bytes) -> str:
        sid = secrets.token_urlsafe(32)
        self._put(self.prefix + sid, stored)
        return sid

    def has(self, sid: str) -> bool:
        return self._has(self.prefix + sid)


HOUR = dt.timedelta(hours=1)


def on_redis(folder: Path) -> Iterator[Old]:
    with Redis.from_url(redis_server().url) as client:
        old = Old(
            lambda name, stored: client.set(name, stored, ex=3600) and None,
            lambda name: bool(client.exists(name)),
            SESSION_TYPE="redis",
            SESSION_REDIS=redis_server().url,
        )
        yield old
        for name in client.scan_iter(f"{old.prefix}*"):
            client.delete(name)


def on_mongodb(folder: Path) -> Iterator[Old]:
    database = f"test_{secrets.token_hex(6)}"
    with MongoClient[dict[str, Any]](mongo_server().url) as client:
        sessions = client[database]["sessions"]

        def put(name: str, stored: bytes) -> None:
            end = dt.datetime.now(dt.UTC) + HOUR
            sessions.insert_one({"id": name, "val": stored, "expiration": end})

        yield Old(
            put,
            lambda name: sessions.find_one({"id": name}) is not None,
            SESSION_TYPE="mongodb",
            SESSION_MONGODB=mongo_server().url,
            SESSION_MONGODB_DB=database,
        )
        client.drop_database(database)


def on_sqlalchemy(folder: Path) -> Iterator[Old]:
    engine = sa.create_engine(f"sqlite:///{folder}/old.db")
    columns = [sa.Column("id", sa.Integer, primary_key=True), sa.Column("session_id", sa.String)]
    columns += [sa.Column("data", sa.LargeBinary), sa.Column("expiry", sa.DateTime)]
    table = sa.Table("sessions", sa.MetaData(), *columns)
    table.create(engine)

    def put(name: str, stored: bytes) -> None:
        end = (dt.datetime.now(dt.UTC) + HOUR).replace(tzinfo=None)
        with engine.begin() as connection:
            connection.execute(sa.insert(table).values(session_id=name, data=stored, expiry=end))

    def has(name: str) -> bool:
        with engine.begin() as connection:
            query = sa.select(table).where(table.c.session_id == name)
            return connection.execute(query).first() is not None

    yield Old(put, has, SESSION_TYPE="sqlalchemy", SESSION_SQLALCHEMY=engine)
    engine.dispose()


#: Stores of Flask-Session, and a store of ours for each.
PAIRS = {"redis": "redis", "mongodb": "sqlite", "sqlalchemy": "redis"}


@pytest.fixture(params=PAIRS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def old(kind: str, tmp_path: Path) -> Iterator[Old]:
    """Each store of Flask-Session in turn."""
    make = {"redis": on_redis, "mongodb": on_mongodb, "sqlalchemy": on_sqlalchemy}
    yield from make[kind](tmp_path)


@pytest.fixture
def make(kind: str, tmp_path: Path) -> Iterator[SiteMaker]:
    """Makes applications of ours, with the clock of the servers."""
    urls = {"sqlite": f"sqlite:///{tmp_path}/new.sqlite3", "redis": redis_server().url}
    clock = FakeClock()
    clock.advance(time.time() - clock())
    with SiteMaker(urls[PAIRS[kind]], f"new-{secrets.token_hex(6)}:", clock) as maker:
        yield maker


@pytest.fixture
def site(make: SiteMaker, old: Old) -> Site:
    return make(config=old.config)


def run(site: Site, *words: str) -> Result:
    """The command, in the application of this site."""
    info = ScriptInfo(create_app=lambda: site.app)
    return CliRunner().invoke(gsession, ["migrate", "--from", "flask-session", *words], obj=info)


def migrate(site: Site, *words: str, status: int = 0) -> str:
    result = run(site, "--yes", *words)
    assert result.exit_code == status, result.output
    return result.stdout


# The protocol ---------------------------------------------------------------------------------


def test_the_old_cookie_leads_to_the_migrated_session(site: Site, old: Old) -> None:
    sids = [old.add(_user_id=str(number), cart=["mug"]) for number in range(3)]
    assert migrate(site) == "session_gs: 3 taken over\n"
    for number, sid in enumerate(sids):
        visitor = visit(site, sid)
        values = {"_user_id": str(number), "cart": ["mug"], "_permanent": True}
        assert visitor.run(dict) == values
        assert visitor.cookie is not None
        visitor.delete_cookie("session")
        assert visitor.run(dict) == values
        assert visit(site, sid).run(lambda session: session.handle) == visitor.run(
            lambda session: session.handle
        )
        assert old.has(sid)
    assert len(site.happened(SessionImported)) == 3


def test_a_second_run_changes_nothing(site: Site, old: Old) -> None:
    sid = old.add(a=1)
    migrate(site)
    visit(site, sid).run(lambda session: session.update(a=2))
    assert migrate(site) == "session_gs: 0 taken over, 1 already\n"
    assert visit(site, sid).run(lambda session: session["a"]) == 2


def test_a_session_that_a_request_took_over_is_skipped(site: Site, old: Old) -> None:
    visitor = visit(site, old.add(a=1))
    visitor.run(lambda session: session.update(a=2))
    assert migrate(site) == "session_gs: 0 taken over, 1 already\n"
    assert visitor.run(lambda session: session["a"]) == 2


def test_a_dry_run_writes_nothing(site: Site, old: Old) -> None:
    old.add(a=1)
    assert "1 to be taken over" in migrate(site, "--dry-run")
    assert site.happened(SessionImported) == []
    assert "1 taken over" in migrate(site)
    assert "0 to be taken over, 1 already" in migrate(site, "--dry-run")


@pytest.mark.parametrize("word", ["--dry-run", "--check"])
def test_a_dry_run_creates_no_file(old: Old, tmp_path: Path, word: str) -> None:
    app = Flask(__name__)
    file = tmp_path / "none.sqlite3"
    app.config.update(SECRET_KEY=KEY, SESSION_STORE=f"sqlite:///{file}", **old.config)
    ext = Session(app)
    words = ["migrate", "--from", "flask-session", word]
    old.add(a=1)
    result = app.test_cli_runner().invoke(gsession, words)
    assert (result.exit_code, "1 to be taken over" in result.stdout) == (0, True), result.output
    assert not file.exists()
    ext.close(app)


def test_interrupted_and_resumed(site: Site, old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    sids = [old.add(a=number) for number in range(5)]
    take_over, left = Migration.take_over, 2

    def interrupted(self: Migration, name: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        take_over(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Migration, "take_over", interrupted)
        result = run(site, "--yes")
    assert result.exit_code == 130
    assert "interrupted after 2 taken over" in result.stderr
    assert migrate(site) == "session_gs: 3 taken over, 2 already\n"
    assert [visit(site, sid).run(lambda session: session["a"]) for sid in sids] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("first", ["command", "request"])
def test_a_parallel_request_takes_over_the_same_session(
    site: Site, old: Old, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Both see no mark. The other one creates the session and the mark in between."""
    sid = old.add(a=1)
    visitor, create = visit(site, sid), Takeover.create
    between: list[Callable[[], Any]] = []

    def slow(self: Takeover, *arguments: Any) -> Any:
        if between:
            between.pop()()
        return create(self, *arguments)

    monkeypatch.setattr(Takeover, "create", slow)
    if first == "command":
        between.append(lambda: visitor.run(lambda session: session.update(a=2)))
        assert migrate(site) == "session_gs: 0 taken over, 1 already\n"
    else:
        between.append(lambda: migrate(site))
        visitor.run(lambda session: session.update(a=2))
    handles = {each.run(lambda s: s.handle) for each in (visitor, visit(site, sid))}
    assert len(handles) == 1
    assert visit(site, sid).run(lambda session: session["a"]) == 2
    assert len(site.happened(SessionImported)) == 1


def test_beside_many_requests(site: Site, old: Old) -> None:
    sids = [old.add(a=number) for number in range(8)]
    handles: dict[str, set[str]] = {sid: set() for sid in sids}

    def browse() -> None:
        for sid in reversed(sids):
            handles[sid].add(visit(site, sid).run(lambda session: session.handle))

    threads = [threading.Thread(target=browse) for _ in range(2)]
    for thread in threads:
        thread.start()
    migrate(site)
    for thread in threads:
        thread.join(60)
    assert {len(found) for found in handles.values()} == {1}
    assert len(site.happened(SessionImported)) == 8


def test_a_logout_kills_the_old_cookie(site: Site, old: Old) -> None:
    sid = old.add(_user_id="7")
    migrate(site)
    visit(site, sid).run(lambda session: session.destroy())
    assert not old.has(sid)
    assert visit(site, sid).run(dict) == {}
    printed = migrate(site, status=1)
    assert printed.startswith("session_gs: 0 taken over\nsession_gs: no old sessions found")
    assert visit(site, sid).run(dict) == {}


def test_a_revocation_before_the_first_request(site: Site, old: Old) -> None:
    """The session isn't in its user's roster yet; the roster's epoch ends it."""
    LoginManager(site.app)
    sid, other = old.add(_user_id="7"), old.add(_user_id="8")
    migrate(site)
    with site.app.app_context():
        site.ext.users.revoke_all("7")
    assert visit(site, sid).run(dict) == {}
    visitor = visit(site, other)
    handle = visitor.run(lambda session: session.handle)
    with site.app.app_context():
        assert [device.handle for device in site.ext.users.devices("8")] == [handle]


def test_a_migrated_session_keeps_its_expiry(site: Site, old: Old) -> None:
    unused, used = old.add(a=1), old.add(a=1)
    migrate(site)
    site.clock.advance(3000)
    visit(site, used).run(dict)
    site.clock.advance(1000)
    assert visit(site, used).run(lambda session: session["a"]) == 1
    assert visit(site, unused).run(dict) == {}


def test_records_that_are_left_alone(site: Site, old: Old) -> None:
    """Other things under the prefix, empty sessions, damaged ones, values that can't be kept."""
    old._put(old.prefix + "cache", b"no session")
    old.add()
    old.add_raw(b"\xff\xff")
    old.add_raw(msgspec.msgpack.encode({"a": 1, 7: 2, "cafe": 3}))
    printed = migrate(site, "--json", status=1)
    assert msgspec.json.decode(printed) == {
        "session": "session_gs",
        "dry_run": False,
        "sessions": {"empty": 1, "refused (pickle: malformed)": 1, "taken over": 1},
        "dropped": {"7": 1},
        "problems": [],
    }


# Pickles --------------------------------------------------------------------------------------

KEPT: dict[str, Any] = {
    "at": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
    "day": dt.date(2026, 1, 2),
    "span": dt.timedelta(days=2),
    "price": Decimal("9.50"),
    "id": UUID(int=7),
    "html": Markup("<b>"),
    "set": {1, 2},
    "bytes": b"\x00\xff",
}


class Planted:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._how = function, arguments

    def __reduce__(self) -> Any:
        return self._how


def test_pickles_of_plain_values(site: Site, old: Old) -> None:
    more = {
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(list, a=[Decimal(1)]),
        "counter": Counter("aab"),
        "array": bytearray(b"abc"),
    }
    contents = {"_permanent": True, **KEPT, **more}
    sids = [old.add_pickle(contents, protocol) for protocol in (2, 4, 5)]
    assert "refused (pickle: operation" in migrate(site, status=1)
    assert visit(site, sids[0]).run(dict) == {}
    assert migrate(site, "--pickle") == "session_gs: 3 taken over\n"
    plain = {"ordered": {"b": 1, "a": 2}, "default": {"a": [Decimal(1)]}, "array": b"abc"}
    for sid in sids:
        values = visit(site, sid).run(dict)
        assert values == {"_permanent": True, **KEPT, **plain, "counter": {"a": 2, "b": 1}}
        assert {type(values[name]) for name in ("ordered", "default", "counter")} == {dict}


def test_planted_pickles(site: Site, old: Old, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    planted: dict[str, Any] = {
        "system": Planted(os.system, f"touch {witness}"),
        "eval": Planted(eval, f"open({str(witness)!r}, 'w')"),
        "open": Planted(open, str(witness), "w"),
        "getattr": Planted(getattr, Decimal(1), "real"),
        "exit": Planted(os._exit, 0),
    }
    sids = [old.add_pickle({"a": value}) for value in planted.values()]
    bombs = [
        b"\x80\x04}\x8c\x01acbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x7f\x85Rs.",  # memory
        b"\x80\x04cbuiltins\nint\n\x8c\x011\x85R" + b"]" * 5000 + b"a" * 4999 + b".",  # deep
        b"\x80\x04cdatetime\ndatetime\n}\x8c\x01aNsb.",  # sets an attribute of a class
        b"\x80\x04cdecimal\nDecimal\n\x8c\x011\x85R.",  # no dict
        b"\x80\x04cdecimal\nDecimal",  # truncated
    ]
    sids += [old.add_raw(bomb) for bomb in bombs]
    good = old.add_pickle({"price": Decimal(1)})
    for words in ([], ["--pickle"]):
        printed = migrate(site, *words, status=1)
        assert not witness.exists()
    assert printed.startswith("session_gs: 1 taken over, "), printed
    for reason in (
        "names posix.system", "names builtins.eval", "names io.open", "names builtins.getattr",
        "names posix._exit", "needs too much memory", "not a dict",
    ):  # fmt: skip
        assert f"1 refused (pickle: {reason})" in printed
    assert visit(site, good).run(dict) == {"price": Decimal(1)}
    for sid in sids:
        assert visit(site, sid).run(dict) == {}


# Checks ---------------------------------------------------------------------------------------


def test_a_check_that_finds_nothing_wrong(site: Site, old: Old, tmp_path: Path) -> None:
    for number in range(5):
        old.add(a=number)
    printed = migrate(site, "--check", "--sample", "3")
    assert "3 to be taken over" in printed
    assert "the old cookie is session, read until 2100-01-02T00:00:00Z" in printed
    assert site.happened(SessionImported) == []


def test_a_check_of_losses(site: Site, old: Old) -> None:
    old.add_pickle({"price": Decimal("12345.67")})
    old.add_raw(msgspec.msgpack.encode({"a": "geheim", 7: "geheim"}))
    printed = migrate(site, "--check", status=1)
    assert "1 refused (pickle: operation" in printed
    assert "session[7] can't be kept in 1 session" in printed
    assert "geheim" not in printed
    assert "12345" not in printed
    assert "refused" not in migrate(site, "--check", "--pickle", status=1)


def test_a_check_without_old_sessions(site: Site) -> None:
    assert "no old sessions found" in migrate(site, "--check", status=1)


def test_a_check_of_the_date(make: SiteMaker, old: Old) -> None:
    old.add(a=1)
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=5)
    site = make(config={**old.config, "SESSION_IMPORT_UNTIL": soon})
    assert "users who come back in between must log in again" in migrate(site, "--check", status=1)


# Where old sessions are -----------------------------------------------------------------------


def test_another_url(make: SiteMaker, old: Old, tmp_path: Path) -> None:
    sid = old.add(a=1)
    keys = {"redis": "SESSION_REDIS", "mongodb": "SESSION_MONGODB"}
    kind = old.config["SESSION_TYPE"]
    if kind in keys:
        url = old.config[keys[kind]]
        elsewhere = {keys[kind]: f"{kind}://127.0.0.1:1"}
    else:
        url = str(old.config["SESSION_SQLALCHEMY"].url)
        elsewhere = {"SESSION_SQLALCHEMY": sa.create_engine("sqlite://")}
    site = make(config={**old.config, **elsewhere}, store_timeout=0.3)
    assert "the old sessions can't be listed" in run(site, "--yes").stderr
    other = {"redis": "mongodb", "mongodb": "redis", "sqlalchemy": "nothing"}[kind]
    wrong = run(site, "--yes", "--url", f"{other}://user:geheim@127.0.0.1:1/0")
    assert (wrong.exit_code, wrong.stderr.count("--url")) == (1, 1), wrong.stderr
    assert "geheim" not in wrong.output
    assert migrate(site, "--url", url) == "session_gs: 1 taken over\n"
    right = make(config=old.config, store=site.store)
    assert visit(right, sid).run(lambda session: session["a"]) == 1


def test_files_cannot_be_listed(make: SiteMaker, tmp_path: Path) -> None:
    files = OldFiles(tmp_path / "old")
    files.add(a=1)
    site = make(config=files.config)
    result = run(site)  # it doesn't ask first
    assert "they can't be listed" in result.stderr
    assert result.stdout == ""
    assert "allowed: --url with redis" in run(site, "--yes", "--url", "redis://localhost").stderr


def test_without_an_import(make: SiteMaker) -> None:
    result = run(make(), "--yes")
    assert result.exit_code == 1
    assert "set SESSION_TYPE" in result.stderr


def test_migrate_asks_for_confirmation(site: Site, old: Old) -> None:
    old.add(a=1)
    assert run(site).exit_code == 1
    assert site.happened(SessionImported) == []


def test_another_url_beside_the_server_of_the_new_sessions() -> None:
    """Reading from there writes where the settings say, and nothing there."""
    here, elsewhere = (redis_server().url.rsplit("/", 1)[0] + f"/{n}" for n in (0, 1))
    prefix, sid = f"test-{secrets.token_hex(6)}:", secrets.token_urlsafe(32)
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=KEY,
        SESSION_TYPE="redis",
        SESSION_REDIS=here,
        SESSION_KEY_PREFIX=prefix,
        SESSION_IMPORT_UNTIL=UNTIL,
    )
    ext = Session(app)
    words = ["migrate", "--from", "flask-session", "--yes", "--url", elsewhere]
    with Redis.from_url(elsewhere) as client, Redis.from_url(here) as ours:
        client.set(prefix + sid, b'{"a": 1}', ex=3600)
        result = app.test_cli_runner().invoke(gsession, words)
        assert (result.exit_code, result.stdout) == (0, "session_gs: 1 taken over\n")
        assert list(client.scan_iter(f"{prefix}*")) == [(prefix + sid).encode()]
        client.delete(prefix + sid)
        records = list(ours.scan_iter(f"{prefix}*"))
        ours.delete(*records)
        assert len(records) == 2  # the session and the mark
    ext.close(app)
