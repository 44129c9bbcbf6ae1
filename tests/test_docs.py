"""The documentation is true: its code runs, and it names everything there is."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import logging
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from flask import Flask, session
from flask.testing import FlaskClient
from flask_login.utils import encode_cookie
from flask_security import login_user
from marshmallow import Schema, fields
from werkzeug.test import TestResponse

import flask_gsession
from flask_gsession import Session, StoreUnavailable, errors, events
from flask_gsession.config import CHECKS, Settings
from flask_gsession.stores import Store
from flask_gsession.stores.base import Clock
from flask_gsession.testing import StoreContract
from flask_gsession.tokens import session_key
from flask_gsession.typed import SessionKey
from flask_gsession.values.merge import POLICIES
from tests.harness.apps import until
from tests.harness.servers import RedisServer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REDIS = "redis://localhost:6379/0"  # the name of the server in the pages

Run = Callable[[str], SimpleNamespace]


def pages() -> dict[str, str]:
    """The text of each page, by its path from the top."""
    paths = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if "_build" not in path.parts
    }


PAGES = pages()


def python_of(page: str) -> str:
    """The Python blocks of a page, each line where it stands in the page."""
    lines = []
    inside = False
    for line in PAGES[page].splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


WITH_CODE = [page for page in PAGES if python_of(page).strip()]


def without_code(page: str) -> str:
    """The text of a page without its blocks of code."""
    text = re.sub(r"^```{list-table}(.*?)^```$", r"\1", PAGES[page], flags=re.M | re.S)
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def rows(page: str) -> list[list[str]]:
    """The rows of all tables on a page: their cells, each on one line."""
    found: list[list[str]] = []
    for line in PAGES[page].splitlines():
        if line.startswith("| "):
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif line.startswith("* - "):
            found.append([line[4:]])
        elif line.startswith("  -") and found:
            found[-1].append(line[4:])
        elif line.startswith("    ") and found:
            found[-1][-1] += f" {line.strip()}"
    return found


def example(name: str) -> ModuleType:
    """A module of docs/examples."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOLDER_STORE = example("folder_store")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Run]:
    """Runs the code of a page in an empty folder, and gives the names that it left."""
    left: list[SimpleNamespace] = []

    def run_page(page: str) -> SimpleNamespace:
        code = python_of(page)
        if REDIS in code:
            server: RedisServer = request.getfixturevalue("own_redis")
            code = code.replace(REDIS, server.url)
        names: dict[str, Any] = {"__name__": "app"}
        exec(compile(code, ROOT / page, "exec", dont_inherit=True), names)
        left.append(SimpleNamespace(**names))
        return left[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "folder_store", FOLDER_STORE)
    yield run_page
    for namespace in left:
        for value in list(vars(namespace).values()):
            if isinstance(value, logging.Logger):
                value.setLevel(logging.NOTSET)
                for handler in value.handlers[:]:
                    value.removeHandler(handler)
                    handler.close()
            if isinstance(value, Flask):
                for ext in value.extensions.get("gsession", {}):
                    ext.close(value)


def visitor(app: Flask, like: FlaskClient | None = None, cookie: str = "session") -> FlaskClient:
    """A browser; with the session cookie of another where one is given."""
    client = app.test_client()
    if like is not None:
        client.set_cookie(cookie, token_of(like, cookie))
    return client


def token_of(client: FlaskClient, cookie: str = "session") -> str:
    found = client.get_cookie(cookie)
    assert found is not None
    return found.value


def before_the_next(
    operation: str, store: Store, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let `act` happen once, just before the store is next asked for `operation`."""
    original = getattr(store, operation)

    def once(*arguments: Any) -> Any:
        monkeypatch.setattr(store, operation, original)
        act()
        return original(*arguments)

    monkeypatch.setattr(store, operation, once)


# -- code blocks


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page: str, run: Run) -> None:
    run(page)


@pytest.mark.parametrize("page", PAGES)
def test_no_python_escapes_the_test(page: str) -> None:
    fences = re.findall(r"^\s*(`{3,}|~{3,}|:{3,})(.*)$", PAGES[page], re.MULTILINE)
    for _, info in fences:
        if "py" in info and "py:" not in info and "{literalinclude}" not in info:
            assert info == "python"
    assert "```python" not in PAGES[page].replace("\n```python\n", "\n")
    ast.parse(python_of(page), page)


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("table.md")])
def test_lines_fit_into_100_characters(page: str) -> None:
    long = [
        line for line in without_code(page).splitlines() if len(line) > 100 and " " in line.strip()
    ]
    assert not long


def test_rows_of_a_table_have_equally_many_cells() -> None:
    """Otherwise Sphinx drops the table."""
    for page, text in PAGES.items():
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", text), page
        for table in re.findall(r"{list-table}$(.*?)^ *(?::::|```)$", text, re.M | re.S):
            rows = re.split(r"^\* -", table, flags=re.M)[1:]
            assert len({len(re.findall(r"^  -", row, re.M)) for row in rows}) == 1, (page, table)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/quickstart.md"])
def test_the_first_application(page: str, run: Run) -> None:
    names = run(page)
    client = visitor(names.app)
    assert client.post("/cart/mug").json == {"items": 1}
    assert client.post("/cart/lamp").json == {"items": 2}
    if page == "docs/index.md":
        return
    assert client.post("/logout").json == {}
    assert client.post("/cart/mug").json == {"items": 1}


def test_quickstart(run: Run) -> None:
    names = run("docs/quickstart.md")
    client = visitor(names.app)
    assert client.get("/").json == {"cart": [], "session": None}
    client.post("/cart/mug")
    client.post("/cart/lamp")
    answer = client.get("/").json
    assert answer["cart"] == ["mug", "lamp"]
    key = f"gsession:{{{answer['session']}}}"
    assert names.client.type(key) == b"string"
    assert 7200 <= names.client.ttl(key) <= 7260
    names.client.connection_pool.disconnect()


def test_log_in(run: Run) -> None:
    names = run("docs/how-to/log-in.md")
    client = visitor(names.app)
    with client.session_transaction() as prepared:
        prepared["cart"] = ["mug"]
    planted = visitor(names.app, like=client)
    assert client.post("/login", data={"name": "ada", "password": "wrong"}).status_code == 401
    assert client.post("/login", data={"name": "ada", "password": "lovelace"}).status_code == 302
    assert client.get("/").json == {"user": "ada", "cart": ["mug"]}
    assert planted.get("/").json == {"user": None, "cart": []}

    copied = visitor(names.app, like=client)
    assert client.post("/admin/enter", data={"password": "wrong"}).status_code == 403
    assert token_of(client) == token_of(copied)
    assert client.post("/admin/enter", data={"password": "lovelace"}).status_code == 302
    assert token_of(client) != token_of(copied)
    assert client.get("/").json == {"user": "ada", "cart": ["mug"]}
    assert copied.get("/").json == {"user": None, "cart": []}
    assert copied.post("/admin/enter", data={"password": "lovelace"}).status_code == 403

    assert client.get_cookie("session").expires is None  # type: ignore[union-attr]
    client.post("/remember-me")
    assert client.get_cookie("session").expires is not None  # type: ignore[union-attr]

    client = visitor(names.app)
    client.post("/kiosk")
    with client.session_transaction() as kiosk:
        life = kiosk.expires_at - kiosk.created_at
        assert timedelta(seconds=300) <= life <= timedelta(seconds=330)


def csrf_field(page: str) -> str:
    """The CSRF token in the first form of a page."""
    found = re.search(r'name="csrf_token"[^>]* value="([^"]+)"', page)
    assert found is not None
    return found[1]


@pytest.fixture
def login_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """The app of docs/examples/login_app.py, saved in an empty folder."""
    shutil.copy(DOCS / "examples" / "login_app.py", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    app: Flask = importlib.import_module("login_app").app
    yield app
    del sys.modules["login_app"]
    for ext in app.extensions["gsession"]:
        ext.close(app)


def test_login_app(login_app: Flask) -> None:
    client = visitor(login_app)

    def send(path: str, browser: FlaskClient = client, **form: str) -> TestResponse:
        data = {**form, "csrf_token": csrf_field(browser.get(path).text)}
        return browser.post(path, data=data, follow_redirects=True)

    assert client.get("/", follow_redirects=True).request.path == "/login"
    assert client.post("/register", data={"name": "ada", "password": "x" * 8}).status_code == 400
    planted = visitor(login_app, like=client)
    assert "visit number 1" in send("/register", name="ada", password="lovelace").text
    assert planted.get("/").status_code == 302
    assert (
        "name is taken"
        in send("/register", visitor(login_app), name="ada", password="12345678").text
    )

    copied = visitor(login_app, like=client)
    assert "visit number 2" in client.get("/").text
    token = csrf_field(client.get("/").text)
    assert client.post("/logout", data={}).status_code == 400
    answer = client.post("/logout", data={"csrf_token": token}, follow_redirects=True)
    assert answer.request.path == "/login"
    with copied.session_transaction() as ended:
        assert not ended

    wrong = send("/login", name="ada", password="lovelorn").text
    assert wrong.count("Wrong name or password.") == 1
    assert "Wrong name or password." in send("/login", name="bob", password="lovelace").text
    elsewhere = "/login?next=https://example.org/"
    answer = send(elsewhere, name="ada", password="lovelace", remember="y")
    assert answer.request.path == "/"
    assert "Hello ada. This is visit number 1." in answer.text
    cookie = client.get_cookie("session")
    assert cookie is not None
    assert cookie.expires is not None


def test_csrf(run: Run) -> None:
    names = run("docs/how-to/csrf.md")
    client = visitor(names.app)
    assert client.post("/mail").status_code == 400
    token = csrf_field(client.get("/mail").text)
    assert client.post("/mail", data={"csrf_token": token}).json == {"saved": True}
    assert client.post("/mail", headers={"X-CSRFToken": token}).json == {"saved": True}
    answer = visitor(names.app).post("/mail", data={"csrf_token": token})
    assert (answer.status_code, "out of date" in answer.text) == (400, True)

    browser = visitor(names.api)
    answer = browser.post("/visit", headers={"X-Session-Token": ""})
    header = {"X-Session-Token": answer.headers["X-Session-Token"]}
    assert browser.post("/visit", headers=header).json == {"visits": 2}
    browser.set_cookie("session", header["X-Session-Token"])
    assert browser.post("/visit").status_code == 400
    # The cookie of a forged request with the header is not looked at.
    assert browser.post("/visit", headers={"X-Session-Token": ""}).json == {"visits": 1}


def test_confirm(run: Run) -> None:
    names = run("docs/how-to/confirm.md")
    names.test_account()
    client = visitor(names.app)
    browser = {"Accept": "text/html"}
    assert client.get("/account", headers=browser).location == "/confirm?next=/account"
    client.post("/login", data={"name": "ada", "password": "lovelace"})
    assert client.get("/account").text == "The account of ada"
    form = {"password": "lovelace"}
    answer = client.post("/confirm", query_string={"next": "/account"}, data=form)
    assert answer.location == "/account"
    assert client.post("/confirm", data={"password": "wrong"}).status_code == 403
    answer = client.post("/account/delete")
    assert (answer.status_code, answer.json["within"]) == (401, 300)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer error=")
    client.post("/passkey")
    assert client.post("/account/delete").status_code == 302


def test_remember_me(run: Run) -> None:
    names = run("docs/how-to/remember-me.md")
    client = visitor(names.app)
    client.post("/login/ada", data={"remember": "yes"})
    assert client.get_cookie("remember_token") is None
    cookie = client.get_cookie("session")
    assert cookie is not None
    assert cookie.expires is not None
    assert client.get("/").json == {"user": "ada"}
    assert client.post("/end-all").json == {"ended": 1}
    assert client.get("/").status_code == 401
    old = visitor(names.app)
    with names.app.app_context():
        old.set_cookie("remember_token", encode_cookie("eve"))
    assert old.get("/").json == {"user": "eve"}
    assert old.get_cookie("remember_token") is None


def test_log_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("docs/how-to/log-out.md")
    client = visitor(names.app)
    client.post("/login/ada")
    thief = visitor(names.app, like=client)
    assert client.get("/").json == {"user": "ada"}
    client.post("/logout")
    assert thief.get("/").json == {"user": None}
    with client.session_transaction() as farewell:
        assert list(farewell) == ["_flashes"]
    client.post("/login/ada")
    assert client.post("/leave").headers["Clear-Site-Data"] == '"cache", "storage"'

    client = visitor(names.app)
    client.post("/account/login/ada")
    assert client.get_cookie("remember_token")
    assert client.post("/account/logout").status_code == 302
    assert not client.get_cookie("remember_token")
    assert not client.get_cookie("session")
    assert client.post("/account/logout").status_code == 401


@pytest.mark.parametrize("kind", ["app", "members"])
def test_log_out_everywhere(kind: str, run: Run) -> None:
    names = run("docs/how-to/log-out-everywhere.md")
    app = getattr(names, kind)
    desk, phone = visitor(app), visitor(app)
    desk.post("/login/ada")
    phone.post("/login/ada")
    assert phone.get_cookie("remember_token") is None
    assert [client.get("/").json for client in (desk, phone)] == [{"user": "ada"}] * 2

    stolen = visitor(app, like=phone)
    assert desk.post("/password").json == {"ended": 1}
    assert desk.get("/").json == {"user": "ada"}
    for client in (phone, stolen):
        assert "ada" not in client.get("/").text
        assert client.post("/password").status_code == 401
    assert phone.post("/login/ada").status_code == 200
    assert phone.get("/").json == {"user": "ada"}


def test_devices(run: Run) -> None:
    app = run("docs/how-to/devices.md").app
    desk, phone, other = visitor(app), visitor(app), visitor(app)
    form = {"name": "ada", "password": "lovelace"}
    assert desk.post("/login", data={**form, "password": "byron"}).status_code == 401
    assert desk.post("/login", data={**form, "name": "x" * 300}).status_code == 401
    assert desk.get("/devices").status_code == 401
    agent = {"User-Agent": "Mozilla/5.0 (X11; Windows) Gecko/20100101 Firefox/128.0"}
    desk.post("/login", data=form, headers=agent)
    phone.post("/login", data=form)
    listed = phone.get("/devices").json
    assert {device["label"]: device["this_one"] for device in listed} == {
        "Firefox on Windows": False,
        None: True,
    }
    (id,) = (device["id"] for device in listed if not device["this_one"])
    assert other.post(f"/devices/{id}/end").status_code == 404
    assert phone.post(f"/devices/{id}/end").status_code == 200
    assert phone.post(f"/devices/{id}/end").status_code == 404
    assert desk.get("/devices").status_code == 401
    phone.post("/logout")
    assert phone.get("/devices").status_code == 401


def test_devices_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    app = run("docs/how-to/devices-page.md").app
    desk, phone = visitor(app), visitor(app)
    asked = desk.get("/devices")
    assert asked.location == "/login?next=/devices"
    for client in (desk, phone):
        form = {"name": "ada", "password": "lovelace"}
        assert client.post(asked.location, data=form).location == "/devices"
    with monkeypatch.context() as later:
        later.setattr("flask_gsession.freshness.confirmed_at", lambda *arguments: None)
        page = desk.get("/devices/end-others", headers={"Accept": "text/html"})
    assert page.location == "/confirm?next=/devices/end-others"
    page = desk.post(page.location, data={"password": "lovelace"})
    page = desk.get(page.location)
    (field,) = re.findall(r'name="(gsession_token)" value="([^"]+)"', page.text)
    assert desk.post("/devices/end-others", data=dict([field])).location == "/devices"
    assert phone.get("/devices").status_code == 303


def test_admin_page(run: Run) -> None:
    app = run("docs/how-to/admin-page.md").app
    ada, eve = visitor(app), visitor(app)
    ada.post("/login/ada")
    eve.post("/login/eve")
    assert ada.get("/admin/sessions").status_code == 403
    assert "1 session of" in eve.get("/admin/sessions?user=ada@example.com").text


@pytest.mark.filterwarnings("ignore:Passing SelectField:DeprecationWarning")
def test_flask_security(run: Run) -> None:
    names = run("docs/how-to/flask-security.md")
    with names.app.app_context():
        names.db.create_all()
        names.datastore.create_user(email="ada@example.com")
        names.datastore.commit()

    @names.app.get("/enter")
    def enter() -> str:
        login_user(names.datastore.find_user(email="ada@example.com"), authn_via=["passkey"])
        return ""

    desk, phone = visitor(names.app), visitor(names.app)
    assert desk.get("/devices").location == "/login?next=/devices"
    for client in (desk, phone):
        client.get("/enter")
    assert desk.get("/devices").text.count("<li>") == 2
    with names.app.app_context():
        user = names.datastore.find_user(email="ada@example.com")
        names.datastore.set_uniquifier(user)
        names.datastore.commit()
        names.db.engine.dispose()
    assert phone.get("/devices").status_code == 303


def test_oidc_logout(run: Run) -> None:
    client = visitor(run("docs/how-to/oidc-logout.md").app)
    refused = client.post("/oidc/backchannel-logout", data={"logout_token": "forged"})
    assert refused.json["error"] == "invalid_request"


def test_limit_sessions(run: Run) -> None:
    app = run("docs/how-to/limit-sessions.md").app
    answers = [visitor(app).post("/login/ada") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 409]
    assert "three devices" in answers[-1].json["error"]


def test_audit_log(run: Run, tmp_path: Path) -> None:
    names = run("docs/how-to/audit-log.md")
    client = visitor(names.app)
    client.post("/login/ada")
    with names.app.app_context():
        (device,) = names.ext.users.devices("ada")
    assert client.post(f"/stolen/{device.id}").json == {"ended": True}
    lines = (tmp_path / "audit.log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["signed_in", "revoked"]
    assert f'device_id="{device.id}"' in lines[1]
    assert 'reason="reported as stolen" by="ada"' in lines[1]


def test_journal(run: Run) -> None:
    names = run("docs/how-to/journal.md")
    visitor(names.app).post("/login/ada")
    sent: list[dict[str, object]] = []
    names.forward(sent.append)
    assert [event["kind"] for event in sent] == ["created", "bound"]
    names.forward(sent.append)
    assert len(sent) == 2


def test_live_updates(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    names = run("docs/how-to/live-updates.md")
    caplog.set_level(logging.INFO)
    client = visitor(names.app)
    assert "/live/live.js" in client.get("/").text
    client.post("/cart/mug")
    before = client.get("/live/state").json["keys"]
    stream = client.get("/live/stream", environ_overrides={"wsgi.multithread": True})
    client.post("/cart/pen")
    assert client.get("/live/state").json["keys"].keys() == before.keys() == {"cart"}
    until(lambda: "changed: ['cart']" in caplog.text)
    stream.close()


def test_sockets(run: Run) -> None:
    names = run("docs/how-to/sockets.md")
    client = visitor(names.app)
    assert not names.socketio.test_client(names.app, flask_test_client=client).is_connected()
    with client.session_transaction() as session:
        session.bind("ada")
    socket = names.socketio.test_client(names.app, flask_test_client=client)
    names.order_sent("ada", 7)
    assert {"name": "order sent", "args": [7], "namespace": "/"} in socket.get_received()
    with client.session_transaction() as session:
        session.destroy()
    until(lambda: not socket.is_connected())


def test_user_values(run: Run) -> None:
    here = run("docs/how-to/user-values.md")
    phone, laptop = visitor(here.app), visitor(here.app)
    phone.post("/cart/mug")
    phone.post("/login", data={"name": "ada"})
    phone.post("/theme/dark")
    laptop.post("/cart/mug")
    laptop.post("/login", data={"name": "ada"})
    assert laptop.get("/cart").json == {"mug": 2}
    assert (laptop.get("/theme").json, phone.get("/cart").json) == ({"theme": "dark"}, {"mug": 2})
    with here.app.app_context():
        assert here.remind("ada") == {"mug": 2}
        here.delete_account("ada")
    assert phone.get("/cart").json == {}


def test_counters_and_carts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("docs/how-to/counters-and-carts.md")

    @names.app.post("/rewrite")
    def rewrite() -> dict[str, Any]:
        session["history"] = ["something else"]
        return {}

    store = names.ext.store(names.app)
    one = visitor(names.app)
    assert one.post("/tickets/take").json == {"ticket": 1}
    other = visitor(names.app, like=one)
    before_the_next("save", store, lambda: other.post("/tickets/take"), monkeypatch)
    assert one.post("/tickets/take").json == {"ticket": 3}

    for first, second in [
        ("/click", "/click"),
        ("/see/mug", "/see/lamp"),
        ("/cart/mug/1", "/cart/lamp/2"),
    ]:
        before_the_next("save", store, lambda path=first: other.post(path), monkeypatch)
        assert one.post(second).status_code == 200
    with one.session_transaction() as stored:
        assert stored["clicks"] == 2
        assert stored["seen"] == {"mug", "lamp"}
        assert stored["history"] == ["mug", "lamp"]
        assert stored["cart"] == {"mug": 1, "lamp": 2}

    before_the_next("save", store, lambda: other.post("/see/cup"), monkeypatch)
    answer = one.post("/rewrite")
    assert answer.status_code == 409
    assert "Reload" in answer.json["error"]
    assert names.highest(1, 5, 3) == 5
    assert names.highest(1, flask_gsession.MISSING, 3) == 3


def test_locks(run: Run) -> None:
    names = run("docs/how-to/locks.md")

    @names.app.post("/both")
    @flask_gsession.session_lock
    def both() -> Any:
        return visitor(names.app, like=client).post("/pay-later").json

    client = visitor(names.app)
    client.post("/cart/5")
    for _ in range(2):
        assert client.post("/pay").json == {"receipt": "receipt 1"}
    assert names.charged == [5]
    assert client.post("/both").json == {"error": "your payment is on its way"}
    assert client.post("/pay-later").json == {"receipt": "receipt 2"}


def test_values(run: Run) -> None:
    names = run("docs/how-to/values.md")
    client = visitor(names.app)
    client.post("/preferences/shop/theme", data={"value": "dark"})
    client.post("/preferences/shop/sort", data={"value": "price"})
    with client.session_transaction() as stored:
        assert stored["preferences"] == {"shop": {"theme": "dark", "sort": "price"}}
        stored["draft"] = "x"
    assert client.post("/checkout").json == {"theme": "DARK", "city": "London"}
    message = client.post("/wrong").json["error"]
    shown, _, _ = PAGES["docs/how-to/values.md"].partition(" …\n```")
    assert message.startswith(shown.rpartition("```text\n")[2])
    answer = client.post("/profile", data={"name": "Ada"}).json
    assert (answer["removed"], answer["token"]) == (1, "made once")
    assert {"name", "steps", "form_token"} <= set(answer["keys"])


def test_expiring_values(run: Run) -> None:
    names = run("docs/how-to/expiring-values.md")
    client = visitor(names.app)
    assert client.post("/code").json["minutes"] == pytest.approx(10, abs=0.1)
    with client.session_transaction() as stored:
        code = stored["code"]
    assert client.post("/code/wrong").status_code == 403
    assert client.post(f"/code/{code}").status_code == 403  # one try only
    client.post("/code")
    with client.session_transaction() as stored:
        code = stored["code"]
    assert client.post(f"/code/{code}").status_code == 200
    assert client.post(f"/code/{code}").status_code == 403


def test_large_values(run: Run) -> None:
    names = run("docs/how-to/large-values.md")
    client = visitor(names.app)
    assert client.get("/import").status_code == 404
    assert client.post("/import", json=[["a", 1]] * 10_000).json == {"rows": 10_000}
    assert (client.get("/step").json, client.get("/import").json) == (
        {"step": 1},
        {"first": ["a", 1]},
    )
    assert client.get("/photo").status_code == 404
    photo = bytes(range(256)) * 2500
    assert client.put("/photo", data=photo).json == {"bytes": len(photo)}
    whole = client.get("/photo")
    assert (whole.data, whole.content_length) == (photo, len(photo))
    part = client.get("/photo", headers={"Range": "bytes=300000-300009"})
    assert (part.status_code, part.data) == (206, photo[300_000:300_010])
    unchanged = client.get("/photo", headers={"If-None-Match": whole.headers["ETag"]})
    assert (unchanged.status_code, unchanged.data) == (304, b"")
    with closing(sqlite3.connect(Path(names.app.instance_path) / "gsession.sqlite3")) as file, file:
        file.execute("DELETE FROM gsession_frame")
    assert client.get("/photo").status_code == 404


def test_typed_keys(run: Run) -> None:
    names = run("docs/how-to/typed-keys.md")
    client = visitor(names.app)
    assert client.post("/theme/dark").json == {"theme": "dark", "notifications": True}
    answer = client.post("/theme/pink")
    assert answer.status_code == 422
    assert answer.json == {"errors": {"theme": ["Must be one of: light, dark, system."]}}
    client.post("/hello/Ada")
    assert client.post("/hello/Ada").json == {"name": "Ada", "visits": 2}
    assert client.get("/account").status_code == 401
    with client.session_transaction() as stored:
        stored["user_id"] = 5
        stored["address"] = "12 St James's Square, London"
    assert client.get("/account").json == {"user": 5, "theme": "dark"}
    answer = client.post("/contact", json={"mail": "ada", "zone": "Mars/Base"})
    assert list(answer.json["errors"]) == ["mail", "zone"]
    contact = {"mail": "ada@example.org", "zone": "Europe/London"}
    assert client.post("/contact", json=contact).json == {"zone": "Europe/London"}
    answer = client.patch("/api/preferences", json={"notifications": False})
    assert answer.json == client.get("/api/preferences").json
    assert answer.json == {"theme": "dark", "notifications": False}
    with names.shop.test_request_context():
        with pytest.raises(names.ValidationError):
            session["preferences"] = {"theme": "pink"}
        session["preferences"] = {"theme": "dark"}


def test_api_clients(run: Run) -> None:
    names = run("docs/how-to/api-clients.md")
    browser = visitor(names.app)
    browser.post("/visit")
    assert browser.post("/visit").json == {"visits": 2}
    answer = browser.post("/visit", headers={"X-Session-Token": ""})
    assert answer.json == {"visits": 1}
    assert "Set-Cookie" not in answer.headers


def test_encryption(run: Run) -> None:
    names = run("docs/how-to/encryption.md")
    client = visitor(names.app)
    client.post("/iban/GB82-WEST")
    files = list(Path("instance").iterdir())
    assert files
    assert not any(b"GB82-WEST" in file.read_bytes() for file in files)
    assert visitor(names.changed, like=client).get("/iban").json == {"iban": "GB82-WEST"}

    plain = Flask("app")
    plain.secret_key = names.app.secret_key
    ext = Session(plain)
    client = visitor(plain)
    with client.session_transaction() as stored:
        stored["iban"] = "plain"
    with visitor(names.changed, like=client).session_transaction() as refused:
        assert not refused
    with visitor(names.upgraded, like=client).session_transaction() as read:
        assert read["iban"] == "plain"
    ext.close(plain)


def test_outages(run: Run, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("docs/how-to/outages.md")
    client = visitor(names.app)
    assert client.post("/visit").json == {"visits": 1}
    own_redis.kill()
    try:
        answer = client.post("/visit")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert "Your cart is safe" in answer.text
        assert client.get("/health").json == {"alive": True}
    finally:
        own_redis.start()
    assert client.post("/visit").json == {"visits": 1}  # the server keeps nothing on disk

    def fail() -> None:
        raise StoreUnavailable("by the test")

    before_the_next("save", names.ext.store(names.app), fail, monkeypatch)
    assert "Your cart is safe" in client.post("/visit").text
    assert names.dropped == ["store unavailable"]
    client.set_cookie("session", "nonsense")
    names.refused.clear()
    client.post("/visit")
    assert names.refused == ["malformed"]


def test_two_sessions(run: Run) -> None:
    names = run("docs/how-to/two-sessions.md")
    client = visitor(names.app)
    client.post("/theme/dark")
    assert client.get("/admin").status_code == 401
    client.post("/admin/login/ada")
    assert client.get("/admin").json == {"admin": "ada", "theme": "dark"}
    crossed = visitor(names.app)
    crossed.set_cookie("admin_session", token_of(client))
    assert crossed.get("/admin").status_code == 401
    client.post("/admin/logout")
    assert client.get("/admin").status_code == 401
    assert client.get_cookie("session")
    assert not client.get_cookie("admin_session")
    assert names.first is not names.second


def test_outside_requests(run: Run) -> None:
    names = run("docs/how-to/outside-requests.md")
    client = visitor(names.app)
    client.post("/cart/mug")
    assert client.post("/export").status_code == 202
    names.pool.shutdown()
    answer = {"export": "1 items, ready to download"}
    assert client.get("/export").json == answer
    assert client.get("/notifications").json == answer
    handle = session_key(token_of(client).partition(".")[0])
    assert names.is_signed_in(handle) is False
    with names.app.app_context():
        asyncio.run(names.send_message(handle, "Your order has left"))
        assert names.ext.peek(handle)["messages"] == ["Your order has left"]
    names.export("A" * 43)
    with names.app.test_request_context():
        session["cart"] = []
        session.bind("ada")  # type: ignore[attr-defined]  # it is ours
        names.app.session_interface.save_session(names.app, session, names.app.response_class())
    names.notify("ada", "Hello")
    with names.app.app_context():
        (device,) = names.ext.users.devices("ada")
        assert names.ext.peek(device.handle)["messages"] == ["Hello"]


def test_events_page(run: Run) -> None:
    names = run("docs/reference/events.md")
    client = visitor(names.app)
    client.post("/login")
    with client.session_transaction() as stored:
        handle = stored.handle
    client.post("/sudo")
    with client.session_transaction() as stored:
        old, handle = handle, stored.handle
    assert f"{old} is now {handle}" in names.audit
    client.post("/logout")
    assert "SessionCreated" in names.audit
    assert names.audit[-2:] == [f"session {handle} was ended", "SessionDestroyed"]


def test_debugging(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flask_gsession.debug"), "handlers", [])
    names = run("docs/how-to/debugging.md")
    visitor(names.app).post("/cart/mug")
    assert "POST /cart/<sku> -> 200: new" in caplog.text
    assert "['mug']" in caplog.text
    names.SlowSessions.slow.clear()  # the machine may be busy
    slow = {"gsession": {"request": "GET /", "ms": 51, "calls": []}}
    names.SlowSessions().emit(logging.makeLogRecord(slow))
    assert names.SlowSessions.slow == [("GET /", [])]


def test_rate_limits(run: Run) -> None:
    app = run("docs/how-to/rate-limits.md").app

    def sign_in(name: str, password: str, address: str = "192.0.2.1") -> int:
        answer = app.test_client().post(
            "/sign-in",
            data={"name": name, "password": password},
            headers={"X-Forwarded-For": address},
        )
        return int(answer.status_code)

    for person in range(6):  # of one office
        assert sign_in(f"user{person}", "mistyped") == 401
        assert sign_in(f"user{person}", "open sesame") == 200
    guesses = [sign_in(" Ada", "guess", f"192.0.3.{number}") for number in range(12)]
    assert guesses == [401] * 10 + [429] * 2
    guesses = [sign_in(f"name{number}", "guess") for number in range(95)]
    assert guesses == [401] * 94 + [429]
    assert app.test_client().get("/search").headers["RateLimit-Remaining"] == "99"


def test_deployment(run: Run) -> None:
    names = run("docs/how-to/deployment.md")

    @names.app.post("/")
    def write() -> dict[str, Any]:
        session["key"] = 1
        return {}

    cookie = visitor(names.app).post("/", base_url="https://localhost").headers["Set-Cookie"]
    assert cookie.startswith("__Host-session=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax"} <= set(cookie.split("; "))


class TestFolderStore(StoreContract):
    """The example of docs/writing-a-store.md keeps the contract."""

    @pytest.fixture(autouse=True)
    def _in_an_empty_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "sessions"

    def open(self, clock: Clock) -> Store:
        store: Store = FOLDER_STORE.FolderStore(self.folder, clock=clock)
        return store


class TestSlowLoads(StoreContract):
    """The wrapper of docs/writing-a-store.md keeps the contract."""

    @pytest.fixture(autouse=True)
    def _names(self, run: Run, tmp_path: Path) -> None:
        self.names, self.folder = run("docs/writing-a-store.md"), tmp_path / "sessions"

    def open(self, clock: Clock) -> Store:
        store: Store = self.names.SlowLoads(FOLDER_STORE.FolderStore(self.folder, clock=clock))
        return store


def test_the_folder_store_serves_sessions(run: Run) -> None:
    names = run("docs/writing-a-store.md")

    @names.app.post("/")
    def count() -> dict[str, Any]:
        session["visits"] = session.get("visits", 0) + 1
        return {"visits": session["visits"]}

    client = visitor(names.app)
    client.post("/")
    assert client.post("/").json == {"visits": 2}


# -- the reference


SETTING = re.compile(
    r"^:::\{confval\} (?P<key>\w+)\n:type: (?P<type>[^\n]*)\n:default: (?P<default>[^\n]*)\n\n"
    r"Keyword `(?P<keyword>\w+)`\. (?P<text>.*?)\n:::$",
    re.MULTILINE | re.DOTALL,
)
SETTINGS = {found["keyword"]: found for found in SETTING.finditer(PAGES["docs/settings.md"])}


def test_every_setting_is_in_the_reference() -> None:
    assert {name: found["key"] for name, found in SETTINGS.items()} == {
        name: key for name, (key, _) in CHECKS.items()
    }
    assert len(SETTINGS) == PAGES["docs/settings.md"].count("{confval} ")


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.usefixtures("shipped_defaults")
def test_a_setting_has_the_default_that_is_written(name: str) -> None:
    written = re.match(r"`(.*?)`", SETTINGS[name]["default"])
    assert written is not None
    default = getattr(Settings(), name)
    if name == "conflict":
        assert POLICIES[ast.literal_eval(written[1])] is default
    elif name == "debug":
        assert written[1] == "app.debug"
    elif written[1].startswith("timedelta"):
        assert eval(written[1], {"timedelta": timedelta}).total_seconds() == default
    else:
        assert ast.literal_eval(written[1]) == default


@pytest.mark.parametrize("name", CHECKS)
def test_a_setting_allows_the_documented_values(name: str) -> None:
    check = CHECKS[name][1]
    words = {"ten years": "316224000", "one day": "86400", "one hour": "3600"}
    text = re.sub("|".join(words), lambda found: words[found[0]], SETTINGS[name]["type"])
    bounds = re.search(r"([\d.,]*\d) to ([\d.,]*\d)", text)
    if bounds is not None:
        low, high = (ast.literal_eval(bound.replace(",", "")) for bound in bounds.groups())
        assert (check(low), check(high)) == (low, high)
        for beyond in (low - 1 if type(low) is int else low / 2, high + 1):
            with pytest.raises(ValueError, match=re.escape(f"{low:g}")):
                check(beyond)
    for word in re.findall(r"`\"([\w-]+)\"`", text):
        check({"key": word} if name == "merge_policies" else word)


def test_every_policy_is_in_the_pages() -> None:
    for page in ("docs/settings.md", "docs/how-to/counters-and-carts.md"):
        for name in POLICIES:
            assert f'`"{name}"`' in PAGES[page]


DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|py:data):: flask_gsession\.([\w.]+)$", re.MULTILINE)


def documented() -> list[object]:
    """The names with an entry in the reference."""
    found: list[object] = []
    for page, text in PAGES.items():
        if page.startswith("docs/reference/"):
            for path in DIRECTIVE.findall(text):
                module, _, name = f"flask_gsession.{path}".rpartition(".")
                if module == "flask_gsession" and not hasattr(flask_gsession, name):
                    continue  # a module of its own
                found.append(getattr(importlib.import_module(module), name))
    return found


def subclasses(module: ModuleType, base: type) -> list[type]:
    """The public classes of a module that derive from `base`, and `base` if it is one of them."""
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


@pytest.mark.parametrize("name", flask_gsession.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    value = getattr(flask_gsession, name)
    assert any(entry is value for entry in documented())


@pytest.mark.parametrize(
    "value",
    [*subclasses(events, events.Event), *subclasses(errors, Exception), *POLICIES.values()],
    ids=lambda value: value.__name__,
)
def test_every_event_error_and_policy_is_in_the_reference(value: object) -> None:
    assert any(entry is value for entry in documented())


@pytest.mark.parametrize("owner", [flask_gsession.Session, flask_gsession.SessionData])
def test_every_public_method_states_its_purpose(owner: type) -> None:
    for name, value in vars(owner).items():
        if not name.startswith("_") and (callable(value) or isinstance(value, property)):
            assert value.__doc__, f"{owner.__name__}.{name}"


def test_every_reason_of_a_refusal_is_named() -> None:
    """The reasons that the code gives are those that `SessionRefused` names."""
    said = set(re.findall(r'``"([^"]+)"``', events.SessionRefused.__doc__ or ""))
    package = Path(flask_gsession.__file__).parent
    source = "".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py"))
    given = re.findall(
        r'(?:Checked\(None, |UnreadableRecord\(\s*|Absence\(\s*|refusals\.note\()"([^"]+)"', source
    )
    assert set(given) == said


def test_every_reason_of_a_conflict_is_named() -> None:
    said = set(re.findall(r'``"([^"]+)"``', events.SessionConflicted.__doc__ or ""))
    package = Path(flask_gsession.__file__).parent
    source = "".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py"))
    assert set(re.findall(r'\bconflict[(,]\s*"([^"]+)"', source)) == said


def test_the_architecture_page_names_every_file() -> None:
    """A file that is renamed, or new at the top, changes the map of the house as well."""
    package = Path(flask_gsession.__file__).parent
    table = [row[0] for row in rows("docs/architecture.md")]
    picture = (DOCS / "images/request-path.svg").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", " ".join(table)))
    shown = set(re.findall(r"\w+\.py", picture + PAGES["docs/architecture.md"]))
    files = {file.name for file in package.rglob("*.py")}
    folders = {f"{file.name}/" for file in package.rglob("*") if file.is_dir()}
    assert named | shown <= files | folders
    room = {file.name for file in (*package.glob("*.py"), *package.glob("request/*.py"))}
    assert room - {"__init__.py"} <= named


GSESSION = """
    Id SetId SetIdFunc Data Size Contains Set SetMap Remove RemoveAll Get GetVar IsDirty Close
    RegenerateId MustId MustGet MustSet MustSetMap MustContains MustData MustSize MustRemove
    MustRegenerateId New SetStorage GetStorage SetTTL GetTTL GetSize GetSession SetSession UpdateTTL
    StorageFile StorageMemory StorageRedis StorageRedisHashTable
"""


@pytest.mark.parametrize("name", GSESSION.split())
def test_the_whole_of_gsession_is_in_its_table(name: str) -> None:
    theirs = " ".join(row[0] for row in rows("docs/gsession.md"))
    assert re.search(rf"\b{name}\b", theirs)


def anchors(page: str) -> set[str]:
    """The anchors that a link to a heading of the page may have after the ``#``."""
    titles = re.findall(r"^#{1,3} (.*)$", without_code(page), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.strip().lower()) for title in titles)
    return {title.replace(" ", "-") for title in words}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = without_code(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


def test_the_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES["README.md"])
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_readme_names_commands_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake (\w+)", PAGES["README.md"].replace("and make.", ""))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


# Troubleshooting --------------------------------------------------------------------------------


def messages() -> list[str]:
    """The texts in the source, each with * for its placeholders."""
    found = []
    for path in Path(flask_gsession.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [getattr(part, "value", None) for part in parts]
            if isinstance(node, ast.JoinedStr) or isinstance(texts[0], str):
                found.append("".join(text if isinstance(text, str) else "*" for text in texts))
    return found


def symptoms() -> list[str]:
    """The first column of the tables on troubleshooting."""
    cells = [row[0] for row in rows("docs/troubleshooting.md")]
    return [cell for cell in cells if cell not in ("Symptom", "Log line", "---")]


def test_troubleshooting_quotes_real_messages() -> None:
    known = messages()
    quoted = [quote for row in symptoms() for quote in re.findall(r'"([^"]+)"', row)]
    assert len(quoted) > 6
    for quote in quoted:
        pattern = ".*".join(re.escape(part.strip()) for part in quote.split("…"))
        assert any(re.search(pattern, message) for message in known), quote
    names = {name for row in symptoms() for name in re.findall(r"`([^`]+)`", row)}
    for name in names - {"memory://", "http://", "expired", "database is locked", "/metrics"}:
        reason = name in known
        assert reason or issubclass(getattr(errors, name), Exception), name


def test_a_locked_file_reads_as_troubleshooting_says(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Flask(__name__)
    app.secret_key = "k" * 32
    Session(app, store=sqlite_url, store_timeout=0.1)
    app.add_url_rule("/", view_func=lambda: session.update(a=time.time()) or "stored")
    client = app.test_client()
    assert client.get("/").status_code == 200
    path = sqlite_url.removeprefix("sqlite://")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert client.get("/").status_code == 503
    assert "A session could not be saved: sqlite: database is locked" in caplog.messages
    assert any("`database is locked`" in row for row in symptoms())


def test_the_rescue_of_a_typed_value() -> None:
    """On the page about upgrading."""

    class Item(Schema):
        price = fields.Int()
        subtotal = fields.Function(lambda item: item["price"] * 2)

    cart = SessionKey("cart", Schema.from_dict({"items": fields.List(fields.Nested(Item))}))
    page = (DOCS / "upgrading.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def rescue_cart.*?)```", page, re.DOTALL)
    known = {"session": session, "cart": cart}
    exec(code, known)
    app = Flask(__name__)
    app.secret_key = "k" * 32
    Session(app, store="memory://")
    with app.test_request_context():
        session["cart"] = {"items": [{"price": 2, "subtotal": 4}]}
        assert cart.get(None) is None
        known["rescue_cart"]()  # type: ignore[operator]
        assert cart.get(None) == {"items": [{"price": 2}]}
