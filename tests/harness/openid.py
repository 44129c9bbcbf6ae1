"""An OpenID provider with back-channel logout, from Authlib's server side, over real HTTP."""

from __future__ import annotations

import secrets
import time
from types import SimpleNamespace
from typing import Any

import requests
from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749 import grants
from authlib.oidc.core import UserInfo
from authlib.oidc.core.grants import OpenIDCode
from flask import Flask, Response, jsonify, redirect, request
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

EVENT = "http://schemas.openid.net/event/backchannel-logout"
CLIENT, SECRET = "shop", "the secret of the shop"


class Client(SimpleNamespace):
    """The one client of the provider."""

    client_id = CLIENT
    id_token_signed_response_alg = "RS256"

    def get_client_id(self) -> str:
        return CLIENT

    def get_allowed_scope(self, scope: str) -> str:
        return scope

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return redirect_uri.endswith(("/callback", "/authorize"))

    def check_client_secret(self, client_secret: str) -> bool:
        return client_secret == SECRET

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return True

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == "authorization_code"


class Code(SimpleNamespace):
    """An authorization code. ``user``: whom it is for, and by which session."""

    def get_redirect_uri(self) -> Any:
        return self.redirect_uri

    def get_scope(self) -> Any:
        return self.scope

    def get_nonce(self) -> Any:
        return self.nonce

    def get_auth_time(self) -> None:
        return None

    get_acr = get_amr = get_auth_time


class Provider:
    """The provider. ``sessions``: of each browser, the subject and the ``sid``.

    ``sends_sid``: whether ID tokens have a ``sid``. ``fetches``: how often the keys were fetched.
    """

    def __init__(self) -> None:
        self.app = Flask("provider")
        self.address = ""
        self.keys = [RSAKey.generate_key(2048, {"kid": "first", "use": "sig"})]
        self.sends_sid = True
        self.fetches = 0
        self.down = False
        self.codes: dict[str, Code] = {}
        self._routes()

    def _routes(self) -> None:
        provider, app = self, self.app

        class CodeGrant(grants.AuthorizationCodeGrant):  # type: ignore[misc]  # it ships no types
            TOKEN_ENDPOINT_AUTH_METHODS = ("client_secret_basic", "client_secret_post")

            def save_authorization_code(self, code: str, request: Any) -> None:
                payload = request.payload
                provider.codes[code] = Code(
                    redirect_uri=payload.redirect_uri,
                    scope=payload.scope,
                    nonce=payload.data.get("nonce"),
                    user=request.user,
                )

            def query_authorization_code(self, code: str, client: Any) -> Any:
                return provider.codes.get(code)

            def delete_authorization_code(self, authorization_code: Any) -> None:
                provider.codes = {
                    k: v for k, v in provider.codes.items() if v != authorization_code
                }

            def authenticate_user(self, authorization_code: Any) -> Any:
                return authorization_code.user

        class IDToken(OpenIDCode):  # type: ignore[misc]  # it ships no types
            def exists_nonce(self, nonce: str, request: Any) -> bool:
                return False

            def resolve_client_private_key(self, client: Any) -> Any:
                return provider.keys[0]

            def get_client_claims(self, client: Any) -> dict[str, Any]:
                return {"iss": provider.address}

            def get_encode_header(self, client: Any) -> dict[str, Any]:
                return {"alg": "RS256", "kid": provider.keys[0].kid}

            def generate_user_info(self, user: Any, scope: str) -> Any:
                sub, sid = user
                return UserInfo(sub=sub, **({"sid": sid} if provider.sends_sid else {}))

        server = AuthorizationServer(app, lambda client_id: Client(), lambda token, request: None)
        server.register_grant(CodeGrant, [IDToken()])

        @app.get("/authorize")
        def authorize() -> Any:
            user = request.args["user"], request.args["sid"]
            return server.create_authorization_response(
                grant_user=user, grant=server.get_consent_grant(end_user=user)
            )

        @app.post("/token")
        def token() -> Any:
            return server.create_token_response()

        @app.get("/jwks")
        def jwks() -> Any:
            provider.fetches += 1
            if provider.down:
                return Response("down", 500)
            return jsonify(KeySet(list(provider.keys)).as_dict(private=False))

        @app.get("/moved")
        def moved() -> Any:
            return redirect("/jwks")

        @app.get("/.well-known/openid-configuration")
        def configuration() -> Any:
            at = provider.address
            return {
                "issuer": at,
                "authorization_endpoint": f"{at}/authorize",
                "token_endpoint": f"{at}/token",
                "jwks_uri": f"{at}/jwks",
                "id_token_signing_alg_values_supported": ["RS256"],
            }

    def claims(self, now: float | None = None, **claims: Any) -> dict[str, Any]:
        """The claims of a logout token. None takes one away."""
        at = int(time.time() if now is None else now)
        given = {
            "iss": self.address,
            "aud": CLIENT,
            "iat": at,
            "exp": at + 120,
            "jti": secrets.token_urlsafe(12),
            "events": {EVENT: {}},
            **claims,
        }
        return {name: value for name, value in given.items() if value is not None}

    def sign(self, claims: dict[str, Any], key: Any = None, **header: Any) -> str:
        key = key or self.keys[0]
        header = {"alg": "RS256", "typ": "logout+jwt", "kid": key.kid, **header}
        header = {name: value for name, value in header.items() if value is not None}
        return jwt.encode(header, claims, key, [header["alg"]])

    def log_out(self, url: str, **claims: Any) -> requests.Response:
        """Call the client's page, as the provider does when a user logs out."""
        return requests.post(
            url, data={"logout_token": self.sign(self.claims(**claims))}, timeout=30
        )
