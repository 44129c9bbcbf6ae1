"""Real applications on Flask-Session 0.5 and 0.8, and ours beside them and after them."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
import redis
import requests
import sqlalchemy
from cachelib.file import FileSystemCache

from flask_gsession.events import ImportRefused, SessionImported
from flask_gsession.testing import FakeClock
from tests.harness.apps import Site, SiteMaker, Visitor
from tests.harness.servers import mongo_server, redis_server, with_database

from .old import UNTIL, OldApp

#: Version, type, whether ids are signed, and another setting. 0.5 has no type `cachelib`.
OLD_APPS: list[tuple[str, str, dict[str, Any]]] = [
    ("0.5", "redis", {}),
    ("0.5", "mongodb", {"SESSION_USE_SIGNER": True}),
    ("0.5", "sqlalchemy", {"SESSION_SQLALCHEMY_TABLE": "old_sessions"}),
    ("0.5", "filesystem", {"SESSION_USE_SIGNER": True}),
    ("0.8", "redis", {"SESSION_USE_SIGNER": True}),
    ("0.8", "mongodb", {"SESSION_MONGODB_COLLECT": "old_sessions"}),
    ("0.8", "sqlalchemy", {"SESSION_SERIALIZATION_FORMAT": "json"}),
    ("0.8", "filesystem", {"SESSION_ID_LENGTH": 48}),
    ("0.8", "cachelib", {}),
]
VALUES = {
    "_user_id": "7",
    "_fresh": True,
    "cart": [{"sku": "mug", "n": 2}],
    "price": 9.5,
    "n": None,
}


class Old:
    """A running application on Flask-Session, and the settings for ours."""

    def __init__(self, app: OldApp, version: str, kind: str, config: dict[str, Any]) -> None:
        self.app, self.version, self.kind, self.config = app, version, kind, config
        self.keeps_pickles = version == "0.5" or kind in ("filesystem", "cachelib")

    def visit(self, site: Site, browser: requests.Session) -> Visitor:
        """The same browser at our application."""
        visitor = site.visitor()
        for cookie in browser.cookies:
            visitor.set_cookie(cookie.name, str(cookie.value))
        return visitor


@pytest.fixture(scope="module", params=OLD_APPS, ids=lambda given: f"{given[0]}-{given[1]}")
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    """An application on each version and type in turn."""
    version, kind, more = request.param
    name = f"test_{secrets.token_hex(6)}"
    folder = str(tmp_path_factory.mktemp("old"))
    urls = {
        "redis": lambda: redis_server().url,
        "mongodb": lambda: mongo_server().url,
        "sqlalchemy": lambda: f"sqlite:///{folder}/old.db",
    }
    url = urls[kind]() if kind in urls else folder
    config = {"SESSION_KEY_PREFIX": f"{name}:", "SESSION_MONGODB_DB": name, **more}
    clients: dict[str, Callable[[], dict[str, Any]]] = {
        "redis": lambda: {"SESSION_REDIS": redis.Redis.from_url(url)},
        "mongodb": lambda: {"SESSION_MONGODB": pymongo.MongoClient(url)},
        "sqlalchemy": lambda: {"SESSION_SQLALCHEMY": sqlalchemy.create_engine(url)},
        "filesystem": lambda: {"SESSION_FILE_DIR": folder},
        "cachelib": lambda: {"SESSION_CACHELIB": FileSystemCache(folder, threshold=0)},
    }
    with OldApp(version, kind, url, **config) as app:
        client = clients[kind]()
        ours = {"SESSION_TYPE": kind, "SESSION_IMPORT_UNTIL": UNTIL, **config, **client}
        yield Old(app, version, kind, ours)
    if kind == "redis":
        with ours["SESSION_REDIS"] as server:
            for key in server.scan_iter(f"{name}:*", count=1000):
                server.unlink(key)
    elif kind == "mongodb":
        ours["SESSION_MONGODB"].drop_database(name)
        ours["SESSION_MONGODB"].close()
    elif kind == "sqlalchemy":
        ours["SESSION_SQLALCHEMY"].dispose()


@pytest.fixture
def make(old: Old, tmp_path: Path) -> Iterator[SiteMaker]:
    """Makes applications of ours, whose store is of the old one's kind where we have that."""
    urls = {
        "redis": lambda: redis_server().url,
        "mongodb": lambda: with_database(mongo_server().url, old.config["SESSION_MONGODB_DB"]),
    }
    url = urls.get(old.kind, lambda: f"sqlite:///{tmp_path}/new.sqlite3")()
    clock = FakeClock()
    clock.advance(time.time() - clock())
    with SiteMaker(url, f"{secrets.token_hex(4)}:", clock) as maker:
        yield maker


def test_everybody_stays_signed_in(old: Old, make: SiteMaker) -> None:
    browser = old.app.browser(**VALUES)
    site = make(config=old.config)
    visitor = old.visit(site, browser)
    assert visitor.run(dict) == {**VALUES, "_permanent": True}
    assert visitor.run(lambda session: session.permanent) is True
    assert old.app.values(browser) == VALUES
    visitor.run(lambda session: session.destroy())
    assert old.app.values(browser) == {}
    assert old.visit(site, browser).run(dict) == {}
    assert len(site.happened(SessionImported)) == 1


def test_rolling_back_and_forward_again(old: Old, make: SiteMaker) -> None:
    browser = old.app.browser(cart=["mug"])
    site = make(config=old.config)
    visitor = old.visit(site, browser)
    visitor.run(lambda session: session["cart"].append("pen"))
    old.app.ask(browser, "/set", json={"seen": "old"})
    assert old.app.values(browser) == {"cart": ["mug"], "seen": "old"}
    assert visitor.run(lambda session: session["cart"]) == ["mug", "pen"]
    assert visitor.run(lambda session: "seen" in session) is False


def test_parallel_clients(old: Old, make: SiteMaker) -> None:
    """Each of four browsers sends four first requests at once."""
    browsers = [old.app.browser(name=number) for number in range(4)]
    site = make(config=old.config)
    found: list[tuple[int, str, str | None]] = []

    def first_request(number: int) -> None:
        visitor = old.visit(site, browsers[number])
        name, handle = visitor.run(lambda session: (session["name"], session.handle))
        assert name == number
        found.append((number, handle, visitor.cookie))

    threads = [threading.Thread(target=first_request, args=(n % 4,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 16
    assert len(set(found)) == 4


def test_a_logout_at_an_old_worker_while_it_is_watched(old: Old, make: SiteMaker) -> None:
    browser = old.app.browser(_user_id="7")
    site = make(config={**old.config, "SESSION_IMPORT_WATCH": True})
    unwatched = make(config=old.config, store=site.store)
    visitor, late = old.visit(site, browser), old.visit(site, browser)
    assert visitor.run(lambda session: session["_user_id"]) == "7"
    only_ours = visitor.another_tab()
    beside = unwatched.visitor(visitor.cookie)
    old.app.ask(browser, "/logout")
    assert beside.run(lambda session: session["_user_id"]) == "7"  # the limit without watching
    assert visitor.run(dict) == {}
    assert visitor.get_cookie("session") is None
    assert visitor.cookie is None
    assert late.run(dict) == {}
    assert only_ours.run(dict) == {}
    assert beside.run(dict) == {}


def test_an_old_worker_that_writes_back(old: Old, make: SiteMaker) -> None:
    """A request that had loaded the old record before the logout stores it again."""
    browser = old.app.browser(_user_id="7")
    site = make(config=old.config)
    cookies = requests.Session()
    cookies.cookies.update(browser.cookies)
    slow = threading.Thread(target=old.app.ask, args=(browser, "/slow"))
    slow.start()
    old.app.ask(requests.Session(), "/release")
    old.visit(site, cookies).run(lambda session: session.destroy())
    assert old.visit(site, cookies).run(dict) == {}
    old.app.ask(requests.Session(), "/release?go=1")
    slow.join(30)
    assert old.app.values(cookies) == {"_user_id": "7", "slow": True}  # the limit: old workers
    assert old.visit(site, cookies).run(dict) == {}


@pytest.mark.parametrize(
    "name", ["datetime", "decimal", "uuid", "tuple", "bytes", "set", "number keys"]
)
def test_values_of_other_types(
    old: Old, make: SiteMaker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pickle that names a class is left where it is. Plain data comes as Flask-Session has it."""
    browser = old.app.browser(_user_id="7")
    old.app.ask(browser, f"/special/{name}")
    site = make(config=old.config)
    visitor = old.visit(site, browser)
    plain: dict[str, Any] = {
        "tuple": (1, "two"), "bytes": b"\x00\xff", "set": {1, 2}, "number keys": {1: "one"},
    }  # fmt: skip
    if old.keeps_pickles and name in ("datetime", "decimal", "uuid"):
        assert visitor.run(dict) == {}
        assert visitor.get_cookie("session") is not None
        assert len(site.happened(ImportRefused)) == 1
        assert "flask gsession migrate" in caplog.text
        visitor.run(dict)
        assert caplog.text.count("was not taken over") == 1
        return
    values = visitor.run(dict)
    assert values.pop("_user_id") == "7"
    if old.keeps_pickles:
        assert values == {name: plain[name], "_permanent": True}
    else:
        assert name in values
        assert old.visit(site, browser).cookie is None


def test_the_store_follows_from_flask_sessions_settings(old: Old, tmp_path: Path) -> None:
    from flask import Flask, session

    from flask_gsession import Session, SettingError

    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SECRET_KEY="a key for tests", **old.config)
    if old.kind not in ("redis", "mongodb"):
        with pytest.raises(SettingError, match="Set SESSION_STORE to the URL"):
            Session(app)
        return
    ext = Session(app)
    app.add_url_rule("/", view_func=lambda: dict(session))
    browser = old.app.browser(_user_id="7")
    client = app.test_client()
    for cookie in browser.cookies:
        client.set_cookie(cookie.name, str(cookie.value))
    assert client.get("/").json == {"_user_id": "7", "_permanent": True}
    ext.close(app)
