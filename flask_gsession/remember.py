"""``SESSION_REMEMBER = "session"``: turns Flask-Login's remember-me into a permanent session.

So there is only one cookie, which ends with its session. If Flask-Login wants to remember a user,
the session becomes permanent, and Flask-Login's cookie is neither sent nor read. Each old cookie is
converted only once, since it can be copied, and names neither a time nor a device. A mark in the
store records that it was converted.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from flask import Flask, Response, current_app, request
from werkzeug.datastructures import ImmutableMultiDict

from .config import remember_cookie, remember_warning
from .errors import KeyTaken
from .events import logger
from .moving.mark import mark_key
from .request.lifecycle import CONFIRMED, Lifecycle
from .request.ownership import seen_at
from .request.session import SessionData, lifecycle_of
from .users.rosters import LOGIN, checked_user_id

# Flask-Login's notes in the session for its ``after_request`` function.
_WISH, _SECONDS = "_remember", "_remember_seconds"
# Our own note: the session is permanent because the user wanted to be remembered.
_REMEMBERED = "_remembered"
_FROM_BEFORE = "flask-login remember-me"


def is_remember_in_session(life: Lifecycle) -> bool:
    """Whether ``SESSION_REMEMBER`` is ``"session"``."""
    return life.repository.settings.remember == "session"


def take_remember_request(session: SessionData) -> tuple[bool, Any]:
    """Take the arguments of ``login_user``: whether to remember the user, and for how long."""
    return session.pop(_WISH, None) == "set", session.pop(_SECONDS, None)


def warn_of_duration(app: Flask, session: SessionData) -> None:
    """Warn once if Flask-Login's cookie, which stays in use, outlives the sessions."""
    repository = lifecycle_of(session).repository
    if session.get(_WISH) == "set" and not repository.warned_of_remember:
        repository.warned_of_remember = True
        text = remember_warning(app, repository.settings)
        if text is not None:
            logger.warning("%s", text)


def remember(session: SessionData, seconds: float | timedelta | None = None) -> None:
    """Make the session permanent, with an idle timeout of ``seconds`` if given."""
    session.permanent = True
    session[_REMEMBERED] = True
    if seconds is not None:
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        longest = lifecycle_of(session).repository.settings.absolute_timeout
        session.set_lifetime(min(max(seconds, 1), longest))


def forget(session: SessionData) -> None:
    """Undo ``remember``: the user signed out, or signed in without being remembered."""
    if session.pop(_REMEMBERED, None):
        settings = lifecycle_of(session).repository.settings
        session.permanent = settings.permanent
        session.set_lifetime(min(settings.idle_timeout, settings.absolute_timeout))


def prepare_user_load(session: SessionData) -> bool:
    """Called before Flask-Login loads the user. Returns whether to delete its cookie.

    If the cookie must not be converted, hides it from Flask-Login. Two round trips for a cookie
    that may be converted.
    """
    life = lifecycle_of(session)
    if session.get(_REMEMBERED) and session.get("_fresh") and _was_away(life):
        # Same as for a cookie that signs the user in to a new session.
        session["_fresh"] = False
        session.pop(CONFIRMED, None)
    app: Any = current_app
    name = remember_cookie(app)["key"]
    cookie = request.cookies.get(name)
    if cookie is None:
        return False
    # After the response, or in a socket handler, no response can carry the token of a sign-in.
    waits = life.is_late or request.routing_exception is not None
    if waits or session.get(LOGIN) is not None or not _converts(life, cookie):
        # Flask-Login notes this in the session, which would create one for each visitor.
        others = ((key, value) for key, value in request.cookies.items(multi=True) if key != name)
        vars(request)["cookies"] = ImmutableMultiDict(others)
    return not waits


def _was_away(life: Lifecycle) -> bool:
    seen = seen_at(life)
    settings = life.repository.settings
    away = settings.idle_timeout + settings.seen_interval
    return seen is not None and life.repository.now() > seen + away * 1000


def _converts(life: Lifecycle, cookie: str) -> bool:
    """Whether this cookie may sign its user in now, for the first and only time."""
    from flask_login.utils import decode_cookie  # type: ignore[import-untyped]  # it ships none

    repository = life.repository
    until = repository.settings.remember_until
    if until is None or repository.now() >= until * 1000:
        return False
    try:
        user_id = checked_user_id(decode_cookie(cookie))
    except ValueError:  # not signed by the application, or without a user
        return False
    if repository.rosters.look(user_id).roster.epoch:
        logger.info("Refused a remember-me cookie: its user's sessions were revoked")
        return False
    key, end = mark_key(_FROM_BEFORE, user_id), repository.settings.remember_end
    try:
        repository.store.create(repository.other_records.draft(key, b"", end))
    except KeyTaken:
        logger.info("Refused a remember-me cookie: it was converted before")
        return False
    return True


def drop_cookie(app: Flask, response: Response) -> None:
    """Remove Flask-Login's cookie from the response, also if it refreshes it at each request."""
    start = f"{remember_cookie(app)['key']}="
    lines = response.headers.getlist("Set-Cookie")
    kept = [line for line in lines if not line.startswith(start)]
    if len(kept) < len(lines):
        response.headers.setlist("Set-Cookie", kept)
