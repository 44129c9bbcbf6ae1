"""Identifies a visitor by the session cookie, for all services in this folder. Read-only."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from flask import Flask, Request

from ..errors import (
    SessionEnded,
    SettingError,
    StoreUnavailable,
    UnreadableRecord,
    ValueLost,
)
from ..events import logger
from ..extension import NAME, Session
from ..interface import GSessionInterface
from ..opening import SessionPeek
from ..processes import process
from ..repository.repository import Loaded
from ..users.revoking import is_member
from ..users.rosters import LOGIN

USER_HEADER = "X-Session-User"

_LONGEST = 1000  # characters of a value in a header; proxies limit all headers to a few thousand
_PLAIN = "".join(set(string.punctuation) - {"%"})  # unescaped in a header


class Identity:
    """A signed-in visitor: the ``user``, and their ``session``."""

    __slots__ = ("session", "user")

    def __init__(self, user: str, session: SessionPeek) -> None:
        self.user = user
        self.session = session

    def __repr__(self) -> str:
        return f"<Identity session={self.session.handle!r}>"


class Verifier:
    """Identifies visitors by their cookies, in an application context of the application of
    ``ext``.

    ``user``: the session key with the user's id. By default, it is the user that the session is
    bound to, or else Flask-Login's key. ``values``: further keys that services may see. ``renew``:
    whether a check counts as use of the session and restarts its idle timeout; otherwise, a check
    writes nothing. One round trip; with ``renew`` two more, once per ``SESSION_RENEW_INTERVAL``.
    """

    def __init__(
        self,
        ext: Session,
        user: str | None = None,
        values: Iterable[str] = (),
        renew: bool = False,
    ) -> None:
        self._ext = ext
        self._user = user
        self._renew = renew
        self.values = tuple(values)
        #: the header of each allowed value, by its key
        self.header_names = header_names(self.values)

    def identify(self, app: Flask, cookies: str) -> Identity | None:
        """The visitor with this ``Cookie`` header; None if they aren't signed in.

        Raises ``StoreUnavailable``.
        """
        interface = interface_of(self._ext, app)
        loaded = find_presented(interface, app, cookies)
        if loaded is None:
            return None
        session = SessionPeek(interface.repository, loaded)
        owner = loaded.body.owner
        if self._user is not None or owner is None:
            user = session.get(LOGIN if self._user is None else self._user)
        else:
            user = owner.user_id
        if user is None or user == "" or (self._renew and not self._count_as_use(app, loaded)):
            return None
        return Identity(str(user), session)

    def _count_as_use(self, app: Flask, loaded: Loaded) -> bool:
        """Renew the session if that is due. Returns whether it still exists. Logs an outage."""
        repository = interface_of(self._ext, app).repository
        body = loaded.body
        if repository.expiry.due(loaded.record, body.values, body.lifetime) is not None:
            try:
                with self._ext.open(loaded.record.key):
                    pass
            except SessionEnded:
                return False
            except StoreUnavailable as error:
                logger.log(error.log_level, "A session could not be renewed: %s", error)
        return True

    def identify_token(self, app: Flask, token: str) -> Identity | None:
        """Like ``identify``, but with the value of the session cookie."""
        return self.identify(app, cookie_header(interface_of(self._ext, app), app, token))

    def shared(self, identity: Identity) -> dict[str, Any]:
        """The allowed values of the session, as far as they exist."""
        found: dict[str, Any] = {}
        for key in self.values:
            try:
                if key in identity.session:
                    found[key] = identity.session[key]
            except (KeyError, ValueLost):
                continue
        return found

    def headers(self, identity: Identity) -> dict[str, str]:
        """``X-Session-User``, and a header for each allowed value.

        All headers are always present, if necessary empty, so that they replace headers from the
        client. Characters beyond printable ASCII, spaces and ``%`` are percent-encoded.
        """
        shared = self.shared(identity)
        headers = {USER_HEADER: header_text(identity.user)}
        for key, name in self.header_names.items():
            text = header_text(shared[key]) if key in shared else ""
            if len(text) > _LONGEST:
                logger.warning("The value for the header %s is too long, and was left out", name)
                text = ""
            headers[name] = text
        return headers


def interface_of(ext: Session, app: Flask) -> GSessionInterface:
    """The interface of ``ext`` on ``app``. Raises ``SettingError``."""
    interfaces: dict[Session, GSessionInterface] = app.extensions.get(NAME, {})
    if ext not in interfaces:
        raise SettingError("This Session is not on the application: call init_app first")
    return interfaces[ext]


def find_presented(
    interface: GSessionInterface,
    app: Flask,
    cookies: str,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Loaded | None:
    """The session of this ``Cookie`` header, or of ``SESSION_TOKEN_HEADER`` among ``headers``.

    Reads only our cookies and headers. See ``find_of_request``.
    """
    environ = {"HTTP_COOKIE": cookies}
    token = interface.repository.settings.token_header
    for name in () if token is None else (token, f"{token}-Version"):
        if name in headers:
            environ[f"HTTP_{name.upper().replace('-', '_')}"] = headers[name]
    return find_of_request(interface, app, Request(environ))


def find_of_request(interface: GSessionInterface, app: Flask, request: Request) -> Loaded | None:
    """The session of this request's cookie or token header.

    With a near cache, the session may be as old as its bound allows. A refused token is counted and
    logged as in a request to the application. Raises ``StoreUnavailable``.
    """
    process.notice()
    repository = interface.repository
    presented = interface.tokens.present(app, request)
    checked = presented.checked
    if checked is None:
        return None
    if checked.token is None:
        repository.refusals.note(checked.reason, None)
        return None
    key, near = checked.key, repository.near
    try:
        loaded = None
        if near is not None:
            # A client that has seen a version never gets an older one.
            loaded = repository.find_near(
                key, repository.last_seen_version(request, presented.by_header)
            )
        if loaded is None:
            loaded = repository.find(key, True, None if near is None else near.load_near)
    except UnreadableRecord as error:
        repository.refusals.note(error.reason, key, error.detail)
        return None
    if loaded is None:
        return None
    owner, imports = loaded.body.owner, repository.imports
    if owner is not None and not owner.seen and not is_member(repository, loaded):
        repository.refusals.note("revoked", loaded.record.key)
        return None
    if imports is not None and imports.has_ended(repository, loaded.body):
        return None  # an old worker, still with the old library, logged it out
    return loaded


def cookie_header(interface: GSessionInterface, app: Flask, token: str) -> str:
    """The ``Cookie`` header of a client with this token in its session cookie."""
    return f"{interface.get_cookie_name(app)}={token}"


def header_names(keys: Iterable[str]) -> dict[str, str]:
    """The header of each session key: ``X-Session-Role`` for ``role``. Raises ``SettingError``."""
    names: dict[str, str] = {}
    for key in keys:
        name = "X-Session-" + re.sub("[^A-Za-z0-9]+", "-", str(key)).strip("-").title()
        if name == "X-Session-" or name in (USER_HEADER, "X-Session-Passport"):
            raise SettingError(
                f"The session key {key!r} can't be sent: its header would be {name}, which is "
                "reserved. Use another key"
            )
        if name in names.values():
            raise SettingError(
                f"The session key {key!r} and another one would both use the header {name}: pass "
                "only one of them"
            )
        names[key] = name
    return names


def header_text(value: object) -> str:
    """A value as printable ASCII. Types other than text become JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        except (TypeError, ValueError):
            text = str(value)
    return quote(text.encode("utf-8", "surrogatepass"), safe=_PLAIN)
