"""A page for proxies that authenticate visitors: nginx, Traefik, Caddy, HAProxy and Envoy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Blueprint, Response, current_app, request

from ..errors import StoreUnavailable
from ..extension import Session
from .verify import Verifier

if TYPE_CHECKING:
    from .passport import Passports

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_NO_STORE = {"Cache-Control": "no-store", "Vary": "Cookie"}


def verify_blueprint(
    ext: Session,
    *,
    url: str = "/session/verify",
    user: str | None = None,
    values: Iterable[str] = (),
    renew: bool = False,
    passports: Passports | None = None,
) -> Blueprint:
    """A blueprint with the page ``url``, for the proxy in front of other services.

    It responds 200 with ``X-Session-User`` and a header for each of the session keys ``values``;
    401 if the visitor isn't signed in; 503 with ``Retry-After`` if the store doesn't answer. It
    reads only the session cookie. The page doesn't count as use of the session, unless you set
    ``renew``. ``user``: the session key with the user's id. ``passports``: adds
    ``X-Session-Passport``. One round trip.
    """
    verifier = Verifier(ext, user, values, renew)
    blueprint = Blueprint("gsession_verify", __name__)
    absent = dict.fromkeys(("X-Session-User", *verifier.header_names.values()), "")
    if passports is not None:
        absent["X-Session-Passport"] = ""

    # Flask's default for OPTIONS would respond 200 to every visitor. Envoy sends the original
    # request's method, and appends its path.
    @blueprint.route(url, methods=_METHODS, provide_automatic_options=False)
    @blueprint.route(f"{url}/<path:of>", methods=_METHODS, provide_automatic_options=False)
    def verify(of: str = "") -> Response:
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        try:
            identity = verifier.identify(app, request.environ.get("HTTP_COOKIE", ""))
        except StoreUnavailable as error:
            wait = {"Retry-After": str(error.retry_after)}
            return Response(status=503, headers={**_NO_STORE, **absent, **wait})
        if identity is None:
            challenge = {"WWW-Authenticate": "Cookie"}
            return Response(status=401, headers={**_NO_STORE, **absent, **challenge})
        headers = verifier.headers(identity)
        if passports is not None:
            headers["X-Session-Passport"] = passports.issue(identity, verifier.shared(identity))
        return Response(status=200, headers={**_NO_STORE, **headers})

    return blueprint
