"""Lists and ends the sessions of Flask-Security users.

Flask-Security identifies a user by an ``fs_uniquifier``, and changes it to end all sessions of the
user: when the password changes or is reset, and when access is reset. At the sign-in, Flask-Login's
signal binds a session to it. When it changes, this module ends the sessions of the old one in the
store.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flask import Flask, current_app, has_request_context
from flask_security import signals

from ..errors import SessionEnded, SettingError
from ..extension import NAME, Session
from ..interface import session_of_request
from ..request.session import SessionData

#: The key in ``app.extensions``.
_DONE = "gsession_flask_security"
_MOST_TAGS, _LONGEST_TAG = 10, 100
#: The signals of a change of a factor, and the reason for the audit log.
_FACTORS = {
    "tf_profile_changed": "second factor changed",
    "tf_disabled": "second factor removed",
    "us_profile_changed": "factor changed",
    "wan_registered": "passkey added",
    "wan_deleted": "passkey removed",
}


class ActiveSessions:
    """Ends a user's sessions in the store when Flask-Security ends them.

    ``app``: the application, after ``Session(app)`` and ``Security(app, …)``; or call ``init_app``
    later. ``factors``: whether a change of a second factor, a passkey or a way of signing in ends
    the user's other sessions, too.

    A change of a user's ``fs_uniquifier`` ends the user's other sessions: a changed password, a
    reset, ``reset_user_access``. ``deactivate_user``, ``toggle_active`` and ``delete_user`` end all
    of them. If the store fails, these methods raise ``RevocationUnfinished`` (503), but
    Flask-Security refuses the old sessions anyway. A sign-in notes in the session's tags how the
    user authenticated. Costs as much as ``ext.users.revoke_others``. Source: OWASP ASVS 7.4.2,
    7.4.3.
    """

    def __init__(self, app: Flask | None = None, *, factors: bool = False) -> None:
        self._factors = factors
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Connect to Flask-Security's signals and its datastore. Raises ``SettingError``."""
        if "security" not in app.extensions or NAME not in app.extensions:
            raise SettingError(
                "ActiveSessions(app) needs Session(app) and Security(app, datastore) before it"
            )
        if app.extensions.setdefault(_DONE, self) is not self:
            raise SettingError("The application has ActiveSessions already: create it once")
        signals.user_authenticated.connect(_signed_in, app)
        if self._factors:
            for name, reason in _FACTORS.items():
                receiver = functools.partial(_changed_factor, reason=reason)
                getattr(signals, name).connect(receiver, app, weak=False)
        datastore = app.extensions["security"].datastore
        for method in ("set_uniquifier", "deactivate_user", "toggle_active", "delete_user"):
            _follow(datastore, method)


def _follow(datastore: Any, method: str) -> None:
    """End sessions after each call of this method of the datastore."""
    original: Callable[..., Any] = getattr(datastore, method)

    @functools.wraps(original)
    def followed(user: Any, *arguments: Any, **more: Any) -> Any:
        before = getattr(user, "fs_uniquifier", None)
        answer = original(user, *arguments, **more)
        if before and _DONE in current_app.extensions:
            if method == "set_uniquifier":
                if before != user.fs_uniquifier:
                    _end_sessions(str(before), "fs_uniquifier changed", but_this=True)
            elif method == "delete_user" or not user.active:
                _end_sessions(str(before), "account disabled")
        return answer

    setattr(datastore, method, followed)


def _end_sessions(user_id: str, reason: str, *, but_this: bool = False) -> None:
    # The database changed first, so the old sessions are refused even if this fails.
    users = _ext().users
    session = _session()
    if but_this and session is not None and session.owner == user_id:
        try:
            users.revoke_others(user_id, reason=reason)
        except SessionEnded:
            users.revoke_all(user_id, reason=reason)
    else:
        users.revoke_all(user_id, reason=reason)


def _signed_in(app: Flask, user: Any, authn_via: Any = None, **_: Any) -> None:
    session = _session()
    if session is not None and authn_via:
        tags = [str(via)[:_LONGEST_TAG] for via in authn_via][:_MOST_TAGS]
        session.bind(user.get_id(), tags=tags)


def _changed_factor(app: Flask, user: Any, reason: str, **_: Any) -> None:
    session = _session()
    user_id = user.get_id()
    # In the middle of a sign-in, there is no session to keep yet.
    if session is not None and session.owner == user_id and not session.new:
        _end_sessions(user_id, reason, but_this=True)


def _ext() -> Session:
    interfaces: dict[Session, Any] = current_app.extensions[NAME]
    return next(iter(interfaces))


def _session() -> SessionData | None:
    session = session_of_request() if has_request_context() else None
    return session if isinstance(session, SessionData) else None
