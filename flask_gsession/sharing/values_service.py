"""Selected values of sessions over gRPC, for services that must not see the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from flask import Flask

from ..errors import (
    GSessionError,
    RotationRefused,
    SessionConflict,
    SessionEnded,
    StoreError,
    ValueLost,
)
from ..extension import Session
from ..opening import SessionPeek
from ..protocol import gsession_pb2 as pb
from ..protocol.methods import methods_of
from ..protocol.values import NoMessage, of_value, to_value
from .grants import Grant
from .server import Denied, Refused, Service
from .verify import Verifier, cookie_header, find_presented, interface_of

Status = grpc.StatusCode
_MOST_KEYS = 1000


class ValuesService(Service):
    """Answers ``Verify``, ``Get``, ``Put`` and ``Revoke`` for the sessions of ``ext`` on ``app``.

    A service may read the keys in its grant's ``read``, and set or remove those in ``write``. Its
    changes are merged with parallel requests as usual. ``user``: the session key with the user's
    id.
    """

    methods = methods_of("Values")

    def __init__(self, app: Flask, ext: Session, user: str | None = None) -> None:
        self._app = app
        self._ext = ext
        self._interface = interface_of(ext, app)
        self._verifier = Verifier(ext, user)
        self._calls: dict[str, Callable[[Any, Grant], Any]] = {
            "Verify": self._verify,
            "Get": self._get,
            "Put": self._put,
            "Revoke": self._revoke,
        }

    def answer(self, name: str, request: Any, grant: Grant) -> Any:
        with self._app.app_context():
            try:
                return self._calls[name](request, grant)
            except SessionEnded:
                raise _no_session() from None
            except SessionConflict as error:
                raise Refused(Status.ABORTED, error.description) from None
            except RotationRefused as error:
                raise Refused(Status.FAILED_PRECONDITION, str(error)) from None
            except StoreError:
                raise
            except GSessionError as error:  # a value's size, type or schema
                raise Refused(Status.INVALID_ARGUMENT, str(error)) from None

    def _verify(self, request: Any, grant: Grant) -> Any:
        if not grant.verify:
            raise Denied("the grant `verify`")
        identity = self._verifier.identify_token(self._app, request.cookie)
        if identity is None:
            return pb.VerifyReply(active=False)
        end = int(identity.session.expires_at.timestamp())
        return pb.VerifyReply(active=True, user=identity.user, expires_at=end)

    def _get(self, request: Any, grant: Grant) -> Any:
        _require([*request.keys], grant.read, "reading")
        session = self._find(request.cookie)
        found = {}
        for key in request.keys:
            try:
                if key in session:
                    found[key] = to_value(session[key])
            except (KeyError, ValueLost):
                continue
            except NoMessage as error:
                raise Refused(Status.FAILED_PRECONDITION, f"{key[:60]}: {error}") from None
        return pb.GetReply(values=found, found=True)

    def _put(self, request: Any, grant: Grant) -> Any:
        _require([*request.changes, *request.removals], grant.write, "writing")
        if set(request.changes) & set(request.removals):
            raise Refused(Status.INVALID_ARGUMENT, "a key is both set and removed")
        try:
            changes = {key: of_value(value) for key, value in request.changes.items()}
        except NoMessage as error:
            raise Refused(Status.INVALID_ARGUMENT, str(error)) from None
        handle = self._find(request.cookie).handle
        if changes or request.removals:
            with self._ext.open(handle) as session:
                session.update(changes)
                session.remove(*request.removals)
        return pb.PutReply(stored=True)

    def _revoke(self, request: Any, grant: Grant) -> Any:
        if not grant.revoke:
            raise Denied("the grant `revoke`")
        try:
            handle = self._find(request.cookie).handle
            with self._ext.open(handle) as session:
                session.destroy()
        except (Refused, SessionEnded):
            return pb.RevokeReply(ended=False)
        return pb.RevokeReply(ended=True)

    def _find(self, token: str) -> SessionPeek:
        cookies = cookie_header(self._interface, self._app, token)
        loaded = find_presented(self._interface, self._app, cookies)
        if loaded is None:
            raise _no_session()
        return SessionPeek(self._interface.repository, loaded)


def _no_session() -> Refused:
    return Refused(Status.NOT_FOUND, "no session: unknown, ended or expired")


def _require(keys: Sequence[str], granted: frozenset[str], what: str) -> None:
    """Raises ``Denied`` for the first key that isn't granted, and ``Refused`` for too many."""
    for key in keys:
        if key not in granted:
            raise Denied(f"{what} {key[:60]!r}")
    if len(keys) > _MOST_KEYS:
        raise Refused(Status.INVALID_ARGUMENT, f"more than {_MOST_KEYS} keys")
