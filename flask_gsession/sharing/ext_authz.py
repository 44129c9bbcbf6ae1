"""Envoy's gRPC check of each request (``envoy.service.auth.v3.Authorization``)."""

from __future__ import annotations

import re
from typing import Any

from flask import Flask

try:
    from envoy.config.core.v3 import base_pb2 as base
    from envoy.service.auth.v3 import external_auth_pb2 as auth
except ImportError as error:
    raise ImportError(
        f"flask_gsession.sharing.ext_authz needs the package {error.name}: install the extra, "
        "flask-gsession[envoy]"
    ) from None

from ..errors import StoreUnavailable
from ..extension import Session
from ..protocol.methods import describe
from .grants import Grant
from .server import Denied, Service
from .verify import Verifier

# Codes of google.rpc.Code, and HTTP statuses.
_OK, _UNAVAILABLE, _UNAUTHENTICATED = 0, 14, 16
_OURS = re.compile("x[-_]session[-_]", re.IGNORECASE)
_REPLACE = base.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


class ExtAuthzService(Service):
    """Answers Envoy, which needs the grant ``verify``. It gets the session keys in ``read``."""

    methods = describe(auth.DESCRIPTOR.services_by_name["Authorization"])
    strict = False  # newer versions of Envoy send more fields

    def __init__(self, app: Flask, ext: Session, user: str | None = None) -> None:
        self._app = app
        self._ext = ext
        self._user = user
        self._verifiers: dict[Grant, Verifier] = {}

    def answer(self, name: str, request: Any, grant: Grant) -> Any:
        if not grant.verify:
            raise Denied("the grant `verify`")
        verifier = self._verifiers.get(grant)
        if verifier is None:
            verifier = Verifier(self._ext, self._user, sorted(grant.read))
            self._verifiers[grant] = verifier
        received = request.attributes.request.http.headers
        cookies = received.get("cookie", "")
        try:
            with self._app.app_context():
                identity = verifier.identify(self._app, cookies)
                headers = {} if identity is None else verifier.headers(identity)
        except StoreUnavailable as error:
            return _denied(_UNAVAILABLE, 503, {"retry-after": str(error.retry_after)})
        if identity is None:
            return _denied(_UNAUTHENTICATED, 401, {"www-authenticate": "Cookie"})
        ours = {name.lower(): text for name, text in headers.items()}
        # Including names with underscores, which a WSGI application takes for the same header.
        spoofed = {name for name in received if _OURS.match(name)} - ours.keys()
        absent = [name for name, text in ours.items() if not text]
        reply = auth.CheckResponse()
        reply.status.code = _OK
        reply.ok_response.headers_to_remove.extend([*absent, *sorted(spoofed)])
        reply.ok_response.headers.extend(_option(name, text) for name, text in ours.items() if text)
        return reply


def _option(name: str, text: str) -> Any:
    option = base.HeaderValueOption(append_action=_REPLACE)
    option.header.key, option.header.value = name.lower(), text
    return option


def _denied(code: int, status: int, headers: dict[str, str]) -> Any:
    reply = auth.CheckResponse()
    reply.status.code = code
    reply.denied_response.status.code = status  # Envoy's enum of HTTP statuses
    reply.denied_response.headers.extend(_option(*header) for header in headers.items())
    return reply
