"""Rotates the token when Flask-Login or Flask-Security authenticates a user.

Each step of authentication gives the session a new token, without grace. So an attacker who planted
or copied the old one gains nothing from the step. Source: OWASP ASVS 5.0, 7.2.4.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flask import Flask, Response, g, request
from flask import session as flask_session

from .config import csrf_field, remember_cookie
from .errors import SignInRefused, TooManySessions
from .request.lifecycle import Lifecycle
from .request.ownership import LOGIN, bind, unbind
from .request.session import SessionData, life_of

# Flask-Security sets these keys at each step of authentication, even without a signal: the time of
# the last verification, and the user who still has to enter a second factor.
_STEPS = ("fs_paa", "tf_user_id")
# Flask-Login sets these keys at a sign-in.
_SIGNED_IN = ("_user_id", "_fresh", "_id")
# An attribute of the request: Flask-Login asked for the removal of its remember-me cookie.
FORGOTTEN = "_gsession_remember_me_ended"


def rotate_at_sign_in(app: Flask) -> None:
    """Connect to Flask-Login's signals, if it is installed."""
    try:
        import flask_login.signals as signals  # type: ignore[import-untyped]  # it ships no types
    except ImportError:
        return
    signals.user_logged_in.connect(_signed_in, app)
    signals.user_login_confirmed.connect(_confirmed, app)
    signals.user_loaded_from_cookie.connect(_loaded_from_cookie, app)
    signals.user_logged_out.connect(_signed_out, app)
    signals.session_protected.connect(_signed_out, app)


def rotate_after_a_step(life: Lifecycle) -> None:
    """Rotate if the user has passed a step of Flask-Security. Called before a save."""
    if life.opened:
        values = life.values
        if any(key in values and values.has_changed(key) for key in _STEPS):
            life.rotate_soon(grace=0)


def forget_remembered(app: Flask, response: Response) -> None:
    """Delete the remember-me cookie: this request called ``logout_user``.

    Flask-Login notes this in the session until its ``after_request`` function runs. If the session
    has ended by then, the note is lost, and the cookie would sign the user in again.
    """
    cookie = remember_cookie(app)
    start = f"{cookie['key']}="
    if not any(line.startswith(start) for line in response.headers.getlist("Set-Cookie")):
        response.delete_cookie(**cookie)


def _session() -> SessionData | None:
    session = flask_session._get_current_object()  # type: ignore[attr-defined]  # a proxy
    return session if isinstance(session, SessionData) else None


def _loaded_from_cookie(sender: Flask, **_: Any) -> None:
    session = _session()
    if session is not None:
        _rotate(session, _SIGNED_IN, remembered=True)


def _signed_in(sender: Flask, **_: Any) -> None:
    _pass_a_step(sender, _SIGNED_IN)


def _confirmed(sender: Flask, **_: Any) -> None:
    # Only the session identifies the user, and an old token isn't enough for that.
    _pass_a_step(sender, ())


def _pass_a_step(app: Flask, signed_in: Collection[str]) -> None:
    session = _session()
    if session is not None:
        _rotate(session, signed_in)
        if life_of(session).repository.settings.renew_csrf:
            # Flask-WTF caches the signed form of the token in g.
            name = csrf_field(app)
            session.pop(name, None)
            g.pop(name, None)


def _rotate(session: SessionData, signed_in: Collection[str], *, remembered: bool = False) -> None:
    session.accessed = True
    life = life_of(session)
    user_id = session.get(LOGIN) if signed_in else None
    if user_id is not None and life.presented().handle is None:
        try:
            bind(life, user_id, remembered=remembered, signed_in=signed_in)
        except (SignInRefused, TooManySessions):
            session.remove(*signed_in)
            g.pop("_login_user", None)  # where Flask-Login keeps the user of the request
            raise
    life.rotate_soon(0, signed_in)


def _signed_out(sender: Flask, **_: Any) -> None:
    session = _session()
    if session is not None and LOGIN not in session:
        unbind(life_of(session))
    if session is not None and session.get("_remember") == "clear":
        vars(request)[FORGOTTEN] = True
