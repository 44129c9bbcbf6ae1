"""Watching at run time, several imports in one application, and accounts with few rights."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from flask import Flask, session
from flask.cli import ScriptInfo
from pymongo import MongoClient
from redis import Redis

from flask_gsession import Session
from flask_gsession.cli import gsession
from flask_gsession.errors import StoreUnavailable
from flask_gsession.moving.cachelib_cache import CacheFiles
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.topologies import MongoAuthTLS, RedisACL

from .old import KEY, UNTIL, OldFiles

pytest_plugins = ["tests.harness.topologies"]

SID = "a" * 43
VALUES = msgspec.msgpack.encode({"cart": 1})


def plain(session: Any) -> dict[str, Any]:
    return {key: value for key, value in session.items() if key != "_permanent"}


@pytest.fixture
def old(tmp_path: Path) -> OldFiles:
    return OldFiles(tmp_path / "old")


def test_an_outage_of_the_old_store_while_it_is_watched(
    make_site: SiteMaker, old: OldFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never mistaken for a logout at an old worker."""
    site = make_site(config=old.config, import_watch=True, breaker_failures=0)
    sid = old.add(cart=1)
    imported, late = site.visitor(), site.visitor()
    for each in (imported, late):
        each.set_cookie("session", sid)
    imported.run(dict)

    def outage(*_: Any) -> None:
        raise StoreUnavailable("simulated")

    def look_or_log_out(visitor: Visitor) -> None:
        for view in (dict, lambda session: session.destroy()):
            response = visitor.ask(view)
            assert (response.status_code, response.headers.getlist("Set-Cookie")) == (503, [])

    for operations in (("load", "delete"), ("load",), ("delete",)):
        with monkeypatch.context() as patch:
            for operation in operations:
                patch.setattr(CacheFiles, operation, outage)
            if "load" in operations:
                look_or_log_out(imported)
                look_or_log_out(late)
            else:  # the old record can be read, but not removed
                assert imported.ask(lambda session: session.destroy()).status_code == 503
        assert imported.run(dict) == late.run(dict) == {"cart": 1}
        assert imported.get_cookie("session") is not None
    old.remove(sid)
    assert imported.run(dict) == {}
    assert imported.cookie is None
    assert imported.get_cookie("session") is None


@pytest.fixture
def earlier(tmp_path: Path, clock: FakeClock) -> Iterator[Site]:
    """An application of ours, with another cookie."""
    with SiteMaker(f"sqlite:///{tmp_path}/earlier.sqlite3", "old:", clock) as make:
        yield make(config={"SECRET_KEY": KEY, "SESSION_COOKIE_NAME": "admin"})


def test_two_sessions_that_import(make_site: SiteMaker, old: OldFiles, earlier: Site) -> None:
    """Each from its own old store and cookie: a logout in one leaves the other alone."""
    site = make_site(config=old.config)
    boss = earlier.visitor()
    boss.run(lambda session: session.update(name="mira"))
    second = Session(
        site.app,
        store=site.store,
        clock=site.clock,
        cookie_name="admin_new",
        imports=[{"store": earlier.url, "key_prefix": "old:"}],
        import_until=UNTIL,
        import_cookie_name="admin",
    )
    visitor = site.visitor()
    visitor.set_cookie("session", old.add(cart=1))
    assert boss.cookie is not None
    visitor.set_cookie("admin", boss.cookie)

    def both(session: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return plain(session), plain(second.session)

    assert visitor.run(both) == ({"cart": 1}, {"name": "mira"})
    assert visitor.run(both) == ({"cart": 1}, {"name": "mira"})
    visitor.run(lambda session: second.session.destroy())
    assert visitor.get_cookie("admin") is None
    assert visitor.get_cookie("session") is not None
    assert boss.run(plain) == {}
    assert visitor.run(both) == ({"cart": 1}, {})


@pytest.mark.parametrize("source", ["flask-session", "cookie"])
def test_encrypted_and_beside_a_header(make_site: SiteMaker, old: OldFiles, source: str) -> None:
    """A request with a token in its header takes nothing over."""
    config: dict[str, Any] = {**old.config, "SESSION_IMPORT": [source]}
    site = make_site(config=config, encryption_keys=[b"k" * 32], token_header="X-Session")
    serializer = Flask.session_interface.get_signing_serializer(site.app)
    assert serializer is not None
    cookie = old.add(cart=1) if source == "flask-session" else str(serializer.dumps({"cart": 1}))
    other = site.visitor()
    other.run(lambda session: session.update(a=1))
    for header in (other.cookie, "unknown"):
        visitor = site.visitor()
        visitor.set_cookie("session", cookie)
        with site.visit(plain) as page:
            visitor.get(page.path, headers={"X-Session": str(header)})
        assert page.result == ({"a": 1} if header == other.cookie else {})
        assert visitor.get_cookie("session") is not None
    assert visitor.run(dict) == {"cart": 1}
    visitor.run(lambda session: session.update(b=2))
    assert visitor.run(dict) == {"cart": 1, "b": 2}
    visitor.run(lambda session: session.destroy())
    visitor.set_cookie("session", cookie)
    assert visitor.run(dict) == {}


# An account with few rights, or a server that is down, for each kind of old store ---------------


def application(tmp_path: Path, timeout: float = 5, **config: Any) -> Flask:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SECRET_KEY=KEY, SESSION_IMPORT_UNTIL=UNTIL, **config)
    app.config.setdefault("SESSION_STORE", f"sqlite:///{tmp_path}/new.sqlite3")
    Session(app, store_timeout=timeout, breaker_failures=0)
    app.add_url_rule("/", "look", lambda: dict(session))
    app.add_url_rule("/out", "out", lambda: session.destroy() or "")
    return app


def statuses(app: Flask, *paths: str) -> list[int]:
    """The answers to a browser with the old cookie, which stays until one is a success."""
    client = app.test_client()
    client.set_cookie("session", SID)
    found = [client.get(path).status_code for path in paths]
    if 200 not in found:
        assert client.get_cookie("session") is not None
    return found


def migrate(app: Flask, *words: str) -> tuple[int, str]:
    info = ScriptInfo(create_app=lambda: app)
    command = ["migrate", "--from", "flask-session", *words]
    result = CliRunner().invoke(gsession, command, obj=info)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_old_stores_that_are_down(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for config in (
        {"SESSION_TYPE": "redis", "SESSION_REDIS": "redis://127.0.0.1:1/0"},
        {"SESSION_TYPE": "mongodb", "SESSION_MONGODB": "mongodb://127.0.0.1:1"},
        {"SESSION_TYPE": "sqlalchemy", "SESSION_SQLALCHEMY": down(tmp_path)},
    ):
        app = application(tmp_path, 0.2, **config)
        assert statuses(app, "/out") == [503], config
        status, said = migrate(app, "--check")
        assert (status, "the old sessions can't be listed" in said) == (1, True), said


def down(tmp_path: Path) -> Any:
    import sqlalchemy as sa

    return sa.create_engine(f"sqlite:///{tmp_path}/no/such/folder")


def test_redis_accounts(redis_acl: RedisACL, tmp_path: Path) -> None:
    with Redis.from_url(redis_acl.admin_url) as admin:
        admin.set(f"session:{SID}", VALUES, ex=600)
    app = application(tmp_path, SESSION_TYPE="redis", SESSION_REDIS=redis_acl.url)
    redis_acl.allow("~other:* +@all")
    assert statuses(app, "/", "/out") == [503, 503]
    status, said = migrate(app, "--check")
    assert status == 1
    assert "NOPERM" in said or "permission" in said, said
    redis_acl.allow("~session:* +get +pttl +eval +evalsha")
    assert statuses(app, "/", "/out", "/") == [200, 503, 200], "it can be read, but not removed"
    redis_acl.allow("~session:* +get +pttl +eval +evalsha +scan")
    said = migrate(app, "--check")[1]
    assert "1 already" in said, said
    redis_acl.allow("~session:* +get +pttl +eval +evalsha +del")
    assert statuses(app, "/", "/out") == [200, 200]


def test_mongodb_accounts(mongo_auth_tls: MongoAuthTLS, tmp_path: Path) -> None:
    name = mongo_auth_tls.DATABASE
    with MongoClient[Any](mongo_auth_tls.url) as admin:
        end = datetime.now(UTC) + timedelta(hours=1)
        admin[name].old.insert_one({"id": f"session:{SID}", "val": VALUES, "expiration": end})
    config = {"SESSION_MONGODB_DB": name, "SESSION_MONGODB_COLLECT": "old"}
    for rights, answers, says in (
        (["insert"], [503, 503], "the user lacks a permission on the collection"),
        (["find"], [200, 503], "1 already"),
        (["find", "remove"], [200, 200], "no old sessions found"),
    ):
        url = mongo_auth_tls.url_of_rights(rights, "old")
        app = application(tmp_path, SESSION_TYPE="mongodb", SESSION_MONGODB=url, **config)
        assert statuses(app, "/", "/out") == answers
        said = migrate(app, "--check")[1]
        assert says in said, said
