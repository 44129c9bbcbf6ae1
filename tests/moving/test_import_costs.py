"""How many round trips a take-over costs, counted at the servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask import Flask, session
from flask_login import LoginManager
from redis import Redis

from flask_gsession import Session
from flask_gsession.moving.cachelib_cache import CacheFiles
from flask_gsession.stores.support import count_round_trips
from tests.harness.apps import SiteMaker, Visitor

from .old import KEY, UNTIL, OldFiles


@pytest.fixture
def old(tmp_path: Path) -> OldFiles:
    return OldFiles(tmp_path / "old")


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls of the old store while the block runs."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for operation in ("load", "delete"):
            real = getattr(CacheFiles, operation)

            def called(self: Any, name: str, real: Any = real, operation: str = operation) -> Any:
                calls.append(operation)
                return real(self, name)

            patch.setattr(CacheFiles, operation, called)
        yield calls


@pytest.mark.parametrize("watch", [False, True])
def test_round_trips_of_an_import(
    make_site: SiteMaker, old: OldFiles, monkeypatch: pytest.MonkeyPatch, watch: bool
) -> None:
    site = make_site(config=old.config, import_watch=watch)
    sid = old.add(cart=1)

    def cost(visitor: Visitor, view: Any = dict) -> tuple[list[str], list[str]]:
        with reads(monkeypatch) as calls, site.counted() as count:
            visitor.run(view)
        assert count.trips == len(count.calls)
        return calls, list(count.calls)

    known = site.visitor()
    known.run(lambda session: session.update(a=1))  # connections, an index, scripts
    known.run(lambda session: session.destroy())
    watched = ["load"] if watch else []
    visitor, late = site.visitor(), site.visitor()
    for each in (visitor, late):
        each.set_cookie("session", sid)
    assert cost(visitor) == (["load"], ["load", "create", "create"])  # four in all
    assert cost(visitor) == (watched, ["load"])
    assert cost(late) == (["load"], ["load", "load"])
    assert cost(late) == (watched, ["load"])
    logout = cost(visitor, lambda session: session.destroy())
    assert logout == ([*watched, "delete"], ["load", "delete"])
    late.set_cookie("session", sid)
    assert cost(late) == (["load"], ["load", "load", "load"])  # ours, the mark, its session
    assert cost(late) == ([], ["load"])
    assert late.get_cookie("session") is None


def test_a_session_of_a_known_user_costs_two_more(
    make_site: SiteMaker, old: OldFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(config=old.config)
    LoginManager(site.app)
    visitor = site.visitor()
    visitor.set_cookie("session", old.add(_user_id="7"))
    with reads(monkeypatch) as calls, site.counted() as count:
        visitor.run(dict)
    assert (calls, count.calls) == (["load"], ["load", "create", "create", "load", "create"])


@pytest.mark.usefixtures("redis_url")
def test_round_trips_of_an_import_within_one_redis(store_prefix: str, redis_client: Redis) -> None:
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=KEY,
        SESSION_TYPE="redis",
        SESSION_REDIS=redis_client,
        SESSION_KEY_PREFIX=store_prefix,
        SESSION_IMPORT_UNTIL=UNTIL,
    )
    ext = Session(app)
    app.add_url_rule("/", "look", lambda: dict(session))
    app.add_url_rule("/out", "out", lambda: session.destroy() or "")
    name = f"{store_prefix}{'a' * 43}"
    redis_client.set(name, msgspec.msgpack.encode({"a": 1, "_permanent": True}), ex=60)
    client, late = app.test_client(), app.test_client()
    for each in (client, late):
        each.set_cookie("session", "a" * 43)

    def trips(each: Any, path: str = "/") -> int:
        with count_round_trips() as counted:
            assert each.get(path).status_code == 200
        return counted.count or 0

    trips(app.test_client())
    redis_client.script_flush()
    assert trips(client) == 2 + 2  # and each script is sent once to a server that has not seen it
    assert trips(client) == 1
    assert trips(late) == 2  # both at once, then the session
    assert trips(client, "/out") == 3 + 1  # the session, the old record, the session; a script
    assert not redis_client.exists(name)
    redis_client.set(name, msgspec.msgpack.encode({"a": 1}), ex=60)
    fresh = app.test_client()
    fresh.set_cookie("session", "a" * 43)
    assert trips(fresh) == 2
    assert fresh.get_cookie("session") is None
    redis_client.set(f"{store_prefix}{'b' * 43}", msgspec.json.encode({"b": 2}), ex=60)
    fresh.set_cookie("session", "b" * 43)
    assert trips(fresh) == 2
    ext.close(app)


@pytest.mark.usefixtures("redis_url")
def test_two_imports_at_once_on_one_redis(store_prefix: str, redis_client: Redis) -> None:
    """Another request is faster, between the two round trips of the first."""
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=KEY,
        SESSION_TYPE="redis",
        SESSION_REDIS=redis_client,
        SESSION_KEY_PREFIX=store_prefix,
        SESSION_IMPORT_UNTIL=UNTIL,
    )
    ext = Session(app)
    app.add_url_rule("/", view_func=lambda: str(session.handle))
    values = {"photo": "x" * 40_000}
    redis_client.set(f"{store_prefix}{'a' * 43}", msgspec.msgpack.encode(values), ex=60)
    first, second = app.test_client(), app.test_client()
    for each in (first, second):
        each.set_cookie("session", "a" * 43)
    imports: Any = app.extensions["gsession"][ext].repository.imports
    together = imports._sources[0].together
    real, handles = together.create_both, []

    def create_both(*records: Any) -> Any:
        together.create_both = real
        handles.append(second.get("/").text)
        return real(*records)

    together.create_both = create_both
    handles.append(first.get("/").text)
    assert len(set(handles)) == 1
    assert len(list(redis_client.scan_iter(f"{store_prefix}blob:*"))) == 1
    assert len(list(redis_client.scan_iter(f"{store_prefix}{{*}}"))) == 2  # session and mark
    ext.close(app)


def test_nothing_is_asked_without_an_import(make_site: SiteMaker) -> None:
    site = make_site()
    visitor = site.visitor()
    visitor.set_cookie("session_old", "a" * 43)
    with site.counted() as count:
        assert visitor.run(dict) == {}
    assert count.trips == 0
