"""G1: a request that does not touch the session costs nothing, and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flask
import pytest
from flask import Flask, render_template_string
from werkzeug.test import TestResponse

from flask_gsession import Session
from flask_gsession.events import SessionRefused
from tests.harness.apps import Site, SiteMaker, Visitor


@pytest.fixture
def site(make_site: SiteMaker, tmp_path: Path) -> Site:
    site = make_site()
    site.app.static_folder = str(tmp_path)
    (tmp_path / "style.css").write_text("body {}")
    return site


def visit_without_touching(visitor: Visitor) -> dict[str, TestResponse]:
    """Make requests of every kind that don't use the session. Yields each with its response."""
    return {
        "view": visitor.get("/untouched"),
        "view with the proxy at hand": visitor.ask(lambda session: None),
        "static file": visitor.get("/static/style.css"),
        "missing static file": visitor.get("/static/missing.css"),
        "404": visitor.get("/nowhere"),
        "405": visitor.delete("/untouched"),
        "OPTIONS": visitor.options("/untouched"),
        "HEAD": visitor.head("/untouched"),
        "template": visitor.ask(lambda session: flask.Response(render_template_string("hello"))),
        "stream": visitor.ask(lambda session: flask.Response(iter(["a", "b"]))),
        "failing view": visitor.ask(lambda session: 1 // 0),
        "abort": visitor.ask(lambda session: flask.abort(418)),
    }


STATUS = {
    "missing static file": 404,
    "404": 404,
    "405": 405,
    "failing view": 500,
    "abort": 418,
}


def assert_nothing_in(responses: dict[str, TestResponse]) -> None:
    for name, response in responses.items():
        assert response.status_code == STATUS.get(name, 200), name
        assert "Set-Cookie" not in response.headers, name
        assert "Vary" not in response.headers, name
        assert "no-store" not in response.headers.get("Cache-Control", ""), name
        response.close()


def test_untouched_costs_nothing_without_a_cookie(site: Site) -> None:
    with site.counted() as count:
        assert_nothing_in(visit_without_touching(site.visitor()))
    assert (count.calls, count.trips) == ([], 0)
    assert not site.stored()


def test_untouched_costs_nothing_with_a_session(site: Site) -> None:
    visitor = site.visitor()
    visitor.run(lambda session: session.update(name="Ada"))
    stored, cookie = site.stored(), visitor.cookie
    site.clock.advance(300)  # a touched session would be renewed now
    with site.counted() as count:
        assert_nothing_in(visit_without_touching(visitor))
    assert (count.calls, count.trips) == ([], 0)
    assert (site.stored(), visitor.cookie) == (stored, cookie)


def test_untouched_costs_nothing_with_a_cookie_of_nobody(site: Site) -> None:
    visitor = site.visitor("x" * 43 + "." + "y" * 22)
    with site.counted() as count:
        assert_nothing_in(visit_without_touching(visitor))
    assert (count.calls, count.trips) == ([], 0)
    assert not site.happened(SessionRefused)


READS = {
    "get": lambda session: session.get("key"),
    "contains": lambda session: "key" in session,
    "len": len,
    "bool": bool,
    "list": list,
    "dict": dict,
    "equal": lambda session: session == {},
    "pop with a default": lambda session: session.pop("key", None),
    "new": lambda session: session.new,
    "permanent": lambda session: session.permanent,
    "modified": lambda session: session.modified,
    "handle": lambda session: session.handle,
    "size": lambda session: session.size,
    "flashes": lambda session: flask.get_flashed_messages(),
    "clear": lambda session: session.clear(),
    "destroy": lambda session: session.destroy(),
    "rotate": lambda session: session.rotate(),
    "reload": lambda session: session.reload(),
    "remove": lambda session: session.remove("key"),
}


def test_an_anonymous_read_costs_no_command(site: Site) -> None:
    with site.counted() as count:
        for name, read in READS.items():
            response = site.visitor().ask(read)
            assert response.status_code == 200, name
            assert "Set-Cookie" not in response.headers, name
    assert (count.calls, count.trips) == ([], 0)
    assert not site.stored()


def test_any_read_answers_for_this_cookie_only(site: Site) -> None:
    visitor = site.visitor()
    for read in ("get", "contains", "len", "bool", "list", "new", "permanent", "handle"):
        assert visitor.ask(READS[read]).headers["Vary"] == "Cookie", read
    visitor.run(lambda session: session.update(key=1))
    for read in ("get", "contains", "len", "bool", "list", "new", "permanent", "handle"):
        response = visitor.ask(READS[read])
        assert response.headers["Vary"] == "Cookie", read
        assert "Set-Cookie" not in response.headers, read


def test_vary_keeps_the_names_of_the_view(site: Site) -> None:
    def view(session: Any) -> flask.Response:
        session.get("key")
        return flask.Response("", headers={"Vary": "Accept-Language"})

    assert site.visitor().ask(view).headers["Vary"] == "Accept-Language, Cookie"


WRITES_OF_NOTHING = {
    "set and pop": lambda session: (session.update(key=1), session.pop("key")),
    "set and clear": lambda session: (session.update(key=1), session.clear()),
    "set and destroy": lambda session: (session.update(key=1), session.destroy()),
    "set and reload": lambda session: (session.update(key=1), session.reload()),
    "setdefault and remove": lambda session: (session.setdefault("key", []), session.remove("key")),
    "empty update": lambda session: session.update({}),
    "empty set_many": lambda session: session.set_many({}),
    "permanent": lambda session: setattr(session, "permanent", True),
    "not permanent": lambda session: setattr(session, "permanent", False),
    "modified": lambda session: setattr(session, "modified", True),
    "lifetime": lambda session: session.set_lifetime(600),
    "rotation": lambda session: session.rotate(),
}


def test_a_session_without_content_does_not_exist(site: Site) -> None:
    for name, write in WRITES_OF_NOTHING.items():
        visitor = site.visitor()
        with site.counted() as count:
            response = visitor.ask(write)
        assert response.status_code == 200, name
        assert "Set-Cookie" not in response.headers, name
        assert (count.calls, count.trips) == ([], 0), name
        assert visitor.run(lambda session: session.new), name
    assert not site.stored()


def test_a_falsy_value_is_content(site: Site) -> None:
    for value in (None, False, 0, "", (), {}, []):
        visitor = site.visitor()
        visitor.run(lambda session, value=value: session.update({"": value}))
        assert visitor.run(dict) == {"": value}
    assert len(site.stored()) == 7


def test_the_default_store_makes_no_file_before_there_is_a_session(tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path / "instance"))
    app.secret_key = "a key for tests"
    ext = Session(app)

    @app.get("/<action>")
    def view(action: str) -> str:
        if action == "read":
            flask.session.get("key")
        if action == "write":
            flask.session["key"] = 1
        return ""

    for page in ("/read", "/untouched", "/"):
        app.test_client().get(page)
    assert not (tmp_path / "instance").exists()
    app.test_client().get("/write")
    assert (tmp_path / "instance" / "gsession.sqlite3").exists()
    ext.close(app)
