"""OAuth 2.0 token introspection (RFC 7662) of session cookies, for other services."""

from __future__ import annotations

import hmac
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

from ..errors import SettingError, StoreUnavailable
from ..events import AccessDenied, logger
from ..extension import Session
from .grants import Grant, Grants, GrantsFile
from .verify import Verifier, interface_of

_HEADERS = {"Cache-Control": "no-store", "Pragma": "no-cache"}


def introspection_blueprint(
    ext: Session, grants: str | Grants, *, url: str = "/session/introspect", user: str | None = None
) -> Blueprint:
    """A blueprint with the page ``url``, which responds as RFC 7662 specifies.

    ``grants``: the grants, or the path of their file, which may be replaced. A service needs
    ``verify = true`` and a token. It sends the token with HTTP Basic, as the password of its name,
    or as a bearer token. The response holds the session keys in its ``read``. Responds 503 if the
    store doesn't answer. One round trip.
    """
    known = GrantsFile(grants) if isinstance(grants, str) else grants
    by_token = (known.current if isinstance(known, GrantsFile) else known).by_token
    if not any(grant.verify for grant in by_token.values()):
        raise SettingError("No service in the grants has both verify = true and a token_sha256")
    verifiers = {grant: Verifier(ext, user, grant.read) for grant in by_token.values()}
    blueprint = Blueprint("gsession_introspection", __name__)

    @blueprint.post(url)
    def introspect() -> Response:
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        events = interface_of(ext, app).repository.events
        grant = _caller(known)
        if grant is None:
            events.emit(AccessDenied, "", "introspection: unknown service")
            logger.warning("Refused an introspection by an unknown service")
            response = _answer({"error": "invalid_client"}, 401)
            response.headers["WWW-Authenticate"] = 'Basic realm="introspection"'
            return response
        if not grant.verify:
            events.emit(AccessDenied, grant.service, "introspection: the grant `verify`")
            logger.warning("Refused an introspection by the service %s", grant.service)
            return _answer({"error": "access_denied"}, 403)
        token = request.form.get("token")
        if not token or len(request.form.getlist("token")) > 1:
            return _answer({"error": "invalid_request"}, 400)
        verifier = verifiers.get(grant)
        if verifier is None:  # the file was replaced
            verifier = verifiers[grant] = Verifier(ext, user, grant.read)
        try:
            identity = verifier.identify_token(app, token)
        except StoreUnavailable as error:
            response = _answer({"error": "temporarily_unavailable"}, 503)
            response.headers["Retry-After"] = str(error.retry_after)
            return response
        if identity is None:
            return _answer({"active": False}, 200)
        session = identity.session
        answer: dict[str, Any] = {
            "active": True,
            "sub": identity.user,
            "exp": int(session.expires_at.timestamp()),
            "iat": int(session.created_at.timestamp()),
            "token_type": "session",
        }
        confirmed = session.confirmed_at()
        if confirmed is not None:
            answer["auth_time"] = int(confirmed.timestamp())  # RFC 9470, 6.2
        if verifier.values:
            answer["values"] = verifier.shared(identity)
        return _answer(answer, 200)

    return blueprint


def _answer(body: dict[str, Any], status: int) -> Response:
    response = jsonify(body)
    response.status_code = status
    response.headers.update(_HEADERS)
    return response


def _caller(grants: Grants | GrantsFile) -> Grant | None:
    """The calling service, looked up by the digest of its token."""
    given = request.authorization
    if given is None:
        return None
    if given.type == "bearer" and given.token:
        return grants.of([], given.token)
    if given.type == "basic" and given.password:
        grant = grants.of([], given.password)
        name = (given.username or "").encode()
        if grant is not None and hmac.compare_digest(grant.service.encode(), name):
            return grant
    return None
