"""Rotates the token when Flask-Login or Flask-Security authenticates a user.

Each step of authentication gives the session a new token, without grace. So an attacker who planted
or copied the old token gains nothing from the step. Source: OWASP ASVS 5.0, 7.2.4.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flask import Flask, Response, current_app, g, has_request_context, request
from flask import session as flask_session

from .config import csrf_field, remember_cookie
from .remember import (
    forget,
    is_remember_in_session,
    prepare_user_load,
    remember,
    take_remember_request,
    warn_of_duration,
)
from .request.confirming import SIGN_IN, note_confirmation, report_confirmation
from .request.lifecycle import CONFIRMED, Lifecycle
from .request.own_session import rotate_soon
from .request.ownership import bind, unbind
from .request.session import SessionData, lifecycle_of
from .users.rosters import LOGIN
from .values.marks import split

# Flask-Security sets these keys at each step of authentication, even if it sends no signal: the
# time of the last verification, and the user who still has to enter a second factor.
_VERIFIED = "fs_paa"
_STEPS = (_VERIFIED, "tf_user_id")
# Flask-Login sets these keys at a sign-in.
_SIGNED_IN = ("_user_id", "_fresh", "_id")
# A request attribute: Flask-Login wants its remember-me cookie deleted.
FORGOTTEN = "_gsession_remember_me_ended"


def rotate_at_sign_in(app: Flask, *, remembers: bool) -> None:
    """Connect to Flask-Login's signals, if it is installed. ``remembers``: see ``remember``."""
    try:
        import flask_login.signals as signals  # type: ignore[import-untyped]  # it ships no types
    except ImportError:
        return
    signals.user_logged_in.connect(_signed_in, app)
    signals.user_login_confirmed.connect(_confirmed, app)
    signals.user_loaded_from_cookie.connect(_loaded_from_cookie, app)
    signals.user_logged_out.connect(_signed_out, app)
    signals.session_protected.connect(_protected, app)
    if remembers:
        signals.user_accessed.connect(_accessed, app)


def load_user() -> None:
    """Let Flask-Login, if it is in use, load the user and check the session now."""
    if hasattr(current_app, "login_manager"):
        from flask_login import current_user

        bool(current_user)


def freshen(session: SessionData) -> None:
    """Update Flask-Login's keys after ``session.confirm``, as its ``confirm_login`` does.

    Otherwise, its session protection would take an updated browser for another browser at each
    request.
    """
    if not has_request_context():
        return
    app: Any = current_app
    manager = getattr(app, "login_manager", None)
    if manager is not None and LOGIN in session:
        session["_fresh"] = True
        session["_id"] = manager._session_identifier_generator()
    _renew_csrf_token(app, session)


def rotate_after_a_step(session: SessionData, life: Lifecycle) -> None:
    """Rotate if the user has passed a step of Flask-Security. Call it before a save."""
    if life.opened:
        values = life.values
        passed = [key for key in _STEPS if key in values and values.has_changed(key)]
        if passed:
            rotate_soon(life, 0, confirms=_VERIFIED in passed)
        if _VERIFIED in passed:
            note_confirmation(session, life, SIGN_IN)


def forget_remembered(app: Flask, response: Response) -> None:
    """Delete the remember-me cookie, because this request called ``logout_user``.

    Flask-Login notes this in the session until its ``after_request`` function runs. If the session
    ends before that, the note is lost, and the cookie would sign the user in again.
    """
    cookie = remember_cookie(app)
    start = f"{cookie['key']}="
    if not any(line.startswith(start) for line in response.headers.getlist("Set-Cookie")):
        response.delete_cookie(**cookie)


def _session() -> SessionData | None:
    session = flask_session._get_current_object()  # type: ignore[attr-defined]  # a proxy
    return session if isinstance(session, SessionData) else None


def _accessed(sender: Flask, **_: Any) -> None:
    session = _session()
    if session is not None and prepare_user_load(session):
        vars(request)[FORGOTTEN] = True


def _loaded_from_cookie(sender: Flask, **_: Any) -> None:
    session = _session()
    if session is not None:
        _rotate(session, _SIGNED_IN, remembered=True)
        if is_remember_in_session(lifecycle_of(session)):
            remember(session)


def _signed_in(sender: Flask, **_: Any) -> None:
    session = _session()
    if session is not None:
        fresh = session.get("_fresh") is True  # False after login_user(fresh=False)
        wanted = seconds = None
        if is_remember_in_session(lifecycle_of(session)):
            wanted, seconds = take_remember_request(session)
        else:
            warn_of_duration(sender, session)
        again = _rotate(session, _SIGNED_IN, remembered=bool(wanted), fresh=fresh)
        if wanted:
            remember(session, seconds)
        elif wanted is not None:
            forget(session)
        if fresh:  # even if the session is already bound to this user
            life = lifecycle_of(session)
            life.wish(sign_in=True)
            if again:
                report_confirmation(life, SIGN_IN)
        _renew_csrf_token(sender, session)


def _confirmed(sender: Flask, **_: Any) -> None:
    session = _session()
    if session is not None:
        session.accessed = True
        life = lifecycle_of(session)
        # Only the session identifies the user, and an old token doesn't suffice for that.
        rotate_soon(life, 0, confirms=True)
        note_confirmation(session, life, SIGN_IN)
        _renew_csrf_token(sender, session)


def _renew_csrf_token(app: Flask, session: SessionData) -> None:
    if lifecycle_of(session).repository.settings.renew_csrf:
        # Flask-WTF caches the token's signed form in g.
        name = csrf_field(app)
        session.pop(name, None)
        g.pop(name, None)


def _rotate(
    session: SessionData,
    signed_in: Collection[str],
    *,
    remembered: bool = False,
    fresh: bool = False,
) -> bool:
    """Bind and rotate. Returns whether the same user signed in again, with a password."""
    again = False
    session.accessed = True
    life = lifecycle_of(session)
    user_id = session.get(LOGIN) if signed_in else None
    if user_id is not None and life.presented().handle is None:
        try:
            again = bind(life, user_id, remembered=remembered, signed_in=signed_in, fresh=fresh)
        except BaseException:
            # The sign-in was refused or failed. Undo it, or the save would store it without a
            # rotation.
            _undo(session, signed_in)
            raise
    rotate_soon(life, 0, signed_in)
    return again


def _undo(session: SessionData, signed_in: Collection[str]) -> None:
    """Restore the sign-in from before the request, if there was one."""
    life = lifecycle_of(session)
    stored, codec = life.values.stored, life.repository.codec
    for key in signed_in:
        raw = stored.get(key)
        if raw is None:
            session.pop(key, None)
        else:
            session[key] = codec.decode(split(raw)[1])
    if life.wishes.binding is not None:
        life.wish(binding=None)
    g.pop("_login_user", None)  # Flask-Login's cache of the current user


def _signed_out(sender: Flask, **_: Any) -> None:
    session = _session()
    if session is not None:
        session.pop(CONFIRMED, None)
        _end_login(session)


def _protected(sender: Flask, **_: Any) -> None:
    """Called by Flask-Login for a session that another browser uses, or without an ``_id``."""
    session = _session()
    if session is not None:
        if "_id" in session or session.get("_remember") == "clear":
            session.pop(CONFIRMED, None)
        _end_login(session)


def _end_login(session: SessionData) -> None:
    if LOGIN not in session:
        unbind(lifecycle_of(session))
        forget(session)
    if session.get("_remember") == "clear":
        vars(request)[FORGOTTEN] = True
