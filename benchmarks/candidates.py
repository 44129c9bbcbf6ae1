"""The candidates: one small app each, with the same views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, session

from benchmarks.backends.base import Backend, Bare
from benchmarks.payloads import BROWSER_COOKIE_LIMIT
from benchmarks.views import add_views
from benchmarks.visitor import Visitor

NONE = "no session"
COOKIE = "Flask cookie"
THEIRS = "Flask-Session"
OURS = "Flask-GSession"
FLOOR = "bare driver"

CANDIDATES = (NONE, COOKIE, THEIRS, OURS, FLOOR)


def seeded_visitors(backend: Backend, size: int) -> dict[str, Visitor]:
    """Returns a visitor per candidate, each with a session of `size` bytes on `backend`.

    Flask's cookie session is left out where a browser would drop so large a cookie.
    """
    visitors = {NONE: sessionless(size)}
    # Text of this kind shrinks in Flask's cookie by less than half: don't even try beyond that.
    if size < 2 * BROWSER_COOKIE_LIMIT:
        cookie = with_session(size)
        if cookie.cookie_bytes <= BROWSER_COOKIE_LIMIT:
            visitors[COOKIE] = cookie
    visitors[THEIRS] = with_session(size, backend.flask_session)
    visitors[OURS] = with_session(size, backend.ours)
    visitors[FLOOR] = on_bare_driver(backend.floor())
    return visitors


def sessionless(size: int) -> Visitor:
    """The same views on a plain dict."""
    return _seeded(_new_app({}), size)


def with_session(size: int, install: Callable[[Flask], None] | None = None) -> Visitor:
    """The views on ``flask.session``; `install` puts an extension behind it."""
    app = _new_app(session)
    app.secret_key = "a benchmark's secret key, of a sensible length"
    if install is not None:
        install(app)
    return _seeded(app, size)


def on_bare_driver(bare: Bare) -> Visitor:
    """The views send the driver's commands themselves and have no session.

    A session on that driver can't add less to a request than this does. Its untouched view sends
    nothing, so it equals the sessionless app, and shows the noise.
    """
    app = Flask("bench")

    @app.get("/untouched")
    def untouched() -> str:
        return "ok"

    @app.get("/read")
    def read() -> str:
        bare.read()
        return "ok"

    @app.get("/write", endpoint="write")
    @app.get("/counter", endpoint="counter")
    def write() -> str:
        bare.write()
        return "ok"

    return Visitor(app)


def _new_app(values: Any) -> Flask:
    app = Flask("bench")
    add_views(app, values)
    return app


def _seeded(app: Flask, size: int) -> Visitor:
    """Fills the session and makes sure that it is really there before it is timed."""
    visitor = Visitor(app)
    visitor.visit(f"/seed/{size}")
    if visitor.visit("/read") != "seeded":
        raise RuntimeError("what was written to the session cannot be read back")
    written = visitor.visit("/write")
    if visitor.visit("/read") != written:
        raise RuntimeError("a change of the session cannot be read back")
    return visitor
