"""Sessions in Flask's own signed cookies."""

from __future__ import annotations

import re
from typing import Any

from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from itsdangerous import BadData

from ..config import csrf_field
from ..repository.repository import Repository
from ..stores.foreign import Foreign, Together
from ..users.roster import Since
from ..users.rosters import LOGIN
from .contents import RefusedContents
from .source import Contents, OldRecord, encoded

LABEL = "cookie"
#: A CSRF token in the form that Flask-WTF generates.
_RANDOM = re.compile("[0-9a-f]{40}")


class FlaskCookieSource:
    """The sessions in browsers' cookies, read by Flask's own serializer.

    ``interface``: the application's session interface, which may have its own serializer or salt. A
    cookie is identified by its signed content, so copies with differently encoded signatures are
    the same.
    """

    label = LABEL
    together: Together | None = None

    def __init__(self, app: Flask, interface: SecureCookieSessionInterface) -> None:
        self._app = app
        self._interface = interface

    def name_of(self, cookie: str) -> str | None:
        return None if self._open(cookie) is None else cookie.rpartition(".")[0]

    def load(self, name: str, cookie: str) -> OldRecord | None:
        return OldRecord(name, Foreign(cookie.encode(), None), None)

    def contents(self, repository: Repository, old: OldRecord) -> Contents:
        stored: Any = old.stored
        contents = self._open(stored.value.decode())
        if not isinstance(contents, dict):
            raise RefusedContents("no dict")
        return encoded(repository, contents)

    def is_of_one_visitor(self, old: OldRecord) -> bool:
        # A cookie has no id, so cookies with equal values from the same second are equal. A
        # signed-in user's cookie, or one with a random CSRF token, belongs to one visitor.
        stored: Any = old.stored
        contents = self._open(stored.value.decode())
        if not isinstance(contents, dict):
            return False
        token = contents.get(csrf_field(self._app))
        is_random = isinstance(token, str) and _RANDOM.fullmatch(token) is not None
        return is_random or contents.get(LOGIN) is not None

    def since(self, old: OldRecord) -> Since:
        # The time of the sign-in is unknown, so any revocation ends sessions that aren't imported
        # yet.
        return Since(epoch=0)

    def delete(self, name: str) -> None:
        """Does nothing, since the browser has the session."""

    def _open(self, cookie: str) -> Any:
        """The session's contents; None for a cookie that is forged, malformed or too old."""
        serializer = self._interface.get_signing_serializer(self._app)
        if serializer is None:
            return None
        age = int(self._app.permanent_session_lifetime.total_seconds())
        try:
            return serializer.loads(cookie, max_age=age)
        except (BadData, ValueError, TypeError, KeyError, RecursionError):
            return None
