"""Checks logout tokens of an OpenID provider, and keeps the provider's keys.

Source: OpenID Connect Back-Channel Logout 1.0 (with errata set 1), sections 2.4 and 2.6.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

try:
    from joserfc import jwt
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry
    from joserfc.jws import JWSRegistry
except ImportError as error:
    raise ImportError(
        f"flask_gsession.contrib.oidc needs the package {error.name}: install the extra, "
        "flask-gsession[oidc]"
    ) from None

from ..errors import GSessionError, SettingError
from ..events import logger
from ..processes import process
from ..values.codec import is_valid_text

#: The possible algorithms. None with a shared secret: an attacker could use the public key as one.
ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"),
    *("EdDSA", "Ed25519"),
)
_EVENT = "http://schemas.openid.net/event/backchannel-logout"
_TYPES = ("jwt", "logout+jwt", "application/logout+jwt")
_LONGEST_TOKEN = 16_384  # characters
_LONGEST_NAME = 255  # characters of a sid, sub or jti
_MOST_KEYS = 50
_MOST_BYTES = 512 * 1024
_SKEW = 60  # seconds
_OLDEST = 3600  # seconds since a token was issued
_FETCH_TIMEOUT = 5.0
_FETCH_AGAIN = 10.0  # seconds between two fetches because of an unknown key
_KEYS_AGE = 3600.0  # seconds after which the keys are fetched again

Keys = str | Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class TokenRefused(GSessionError):
    """A logout token is invalid. The message says why, without quoting the token."""


class KeysUnavailable(GSessionError):
    """The provider's keys can't be fetched, so a token can't be checked."""


class LogoutToken(NamedTuple):
    """The contents of a valid token. ``expires_at``: in seconds; later, it is refused anyway."""

    jti: str
    sid: str | None
    sub: str | None
    expires_at: int


class ProviderKeys:
    """The public keys of a provider: given, or fetched from its ``jwks_uri``."""

    def __init__(self, source: Keys) -> None:
        self._fetch: Callable[[], Mapping[str, Any]] | None = None
        self._keys: list[tuple[str | None, Any]] = []
        self._start()
        process.register(self._start)
        self._fetched_at = self._tried_at = -_KEYS_AGE
        if isinstance(source, str):
            parts = urlsplit(source)
            local = parts.hostname in ("localhost", "127.0.0.1", "::1")
            if parts.scheme != "https" and not (parts.scheme == "http" and local):
                raise SettingError(
                    f"keys is {source!r}; allowed: an https:// URL, a JWK set, or a function"
                )
            self._fetch = lambda: _fetched(source)
        elif callable(source):
            self._fetch = source
        else:
            try:
                self._keys = _imported(source)
            except (JoseError, ValueError, TypeError) as error:
                raise SettingError(f"keys is not a JWK set with public keys: {error}") from None

    def _start(self) -> None:
        self._fetching = threading.RLock()  # held during a fetch, which may check a token itself

    def candidates(self, kid: str | None) -> list[Any]:
        """The keys that may have signed a token. Raises ``KeysUnavailable``."""
        process.notice()
        # With a known key, no thread waits for another one's fetch.
        if self._must_fetch(kid) and not (self._named(kid) and self._was_just_tried()):
            with self._fetching:
                if self._must_fetch(kid):
                    self._refresh(must=not self._keys)
        return self._named(kid)

    def _must_fetch(self, kid: str | None) -> bool:
        age = time.monotonic() - self._fetched_at
        is_old = age >= _KEYS_AGE or (age >= _FETCH_AGAIN and not self._named(kid))
        return is_old and self._fetch is not None

    def _was_just_tried(self) -> bool:
        return time.monotonic() - self._tried_at < _FETCH_AGAIN

    def _named(self, kid: str | None) -> list[Any]:
        return [key for name, key in self._keys if kid is None or name in (None, kid)]

    def _refresh(self, *, must: bool) -> None:
        if self._was_just_tried():
            if must:
                raise KeysUnavailable("the keys of the OpenID provider could not be fetched")
            return
        self._tried_at = time.monotonic()
        assert self._fetch is not None
        try:
            self._keys = _imported(self._fetch())
        except Exception as error:  # from the network, or from the application's function
            logger.error("The keys of the OpenID provider can't be fetched: %r", error)
            if must:
                raise KeysUnavailable(
                    "the keys of the OpenID provider could not be fetched"
                ) from error
        else:
            self._fetched_at = time.monotonic()


class TokenReader:
    """Reads the logout tokens of one provider for one client."""

    def __init__(
        self, issuer: str, client_id: str, keys: Keys, algorithms: Collection[str]
    ) -> None:
        wrong = [name for name in algorithms if name not in ALGORITHMS]
        if isinstance(algorithms, str) or wrong or not algorithms:
            raise SettingError(
                f"algorithms is {algorithms!r}; allowed: a list of {', '.join(ALGORITHMS)}"
            )
        for name, value in (("issuer", issuer), ("client_id", client_id)):
            if not isinstance(value, str) or not value:
                raise SettingError(f"{name} is {value!r}; it must be the text from the provider")
        self.issuer = issuer
        self._client_id = client_id
        self._algorithms = list(algorithms)
        self._keys = ProviderKeys(keys)

    def read(self, text: str, now: float) -> LogoutToken:
        """Check a token. Raises ``TokenRefused`` and ``KeysUnavailable``."""
        claims = self._verified(text)
        if claims.get("iss") != self.issuer:
            raise TokenRefused("iss is another issuer")
        audience = claims.get("aud")
        if self._client_id not in (audience if isinstance(audience, list) else [audience]):
            raise TokenRefused("aud is another client")
        issued, end = _time(claims, "iat"), _time(claims, "exp")
        if issued > now + _SKEW:
            raise TokenRefused("iat is in the future")
        last = min(end, issued + _OLDEST) + _SKEW
        if last <= now:
            raise TokenRefused("the token has expired")
        events = claims.get("events")
        if not isinstance(events, dict) or not isinstance(events.get(_EVENT), dict):
            raise TokenRefused("events has no back-channel logout")
        if "nonce" in claims:
            raise TokenRefused("nonce must be absent: this is not a logout token")
        jti, sid, sub = (_name(claims, name) for name in ("jti", "sid", "sub"))
        if jti is None:
            raise TokenRefused("jti is missing")
        if sid is None and sub is None:
            raise TokenRefused("sid and sub are missing")
        return LogoutToken(jti, sid, sub, last)

    def _verified(self, text: str) -> dict[str, Any]:
        """The claims of a token with a valid signature."""
        if len(text) > _LONGEST_TOKEN:
            raise TokenRefused("the token is too long")
        header = _header(text)
        algorithm, kind = header.get("alg"), header.get("typ", "JWT")
        if algorithm not in self._algorithms:
            raise TokenRefused("alg is not allowed")
        if not isinstance(kind, str) or kind.lower() not in _TYPES:
            raise TokenRefused("typ is for another kind of token")
        kid = header.get("kid")
        if not (kid is None or isinstance(kid, str)) or "crit" in header:
            raise TokenRefused("the header is not supported")
        registry = JWSRegistry(algorithms=[algorithm], strict_check_header=False)
        for key in self._keys.candidates(kid):
            try:
                claims = jwt.decode(text, key, [algorithm], registry=registry).claims
            except (JoseError, ValueError, TypeError):
                continue
            if isinstance(claims, dict):
                return claims
        raise TokenRefused("not signed by a key of the provider")


def _header(text: str) -> dict[str, Any]:
    part = text.partition(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, RecursionError):
        raise TokenRefused("malformed token") from None
    if text.count(".") != 2 or not isinstance(header, dict):
        raise TokenRefused("malformed token")
    return header


def _time(claims: Mapping[str, Any], name: str) -> int:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**40:
        raise TokenRefused(f"{name} must be a time in seconds")
    return int(value)


def _name(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    if value is None:
        return None
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= _LONGEST_NAME
        or not is_valid_text(value)
    ):
        raise TokenRefused(f"{name} must be 1 to {_LONGEST_NAME} characters of valid text")
    return value


def _imported(source: Mapping[str, Any]) -> list[tuple[str | None, Any]]:
    """The public keys of a JWK set for signatures, by their ids. Skips keys of other kinds."""
    keys: list[tuple[str | None, Any]] = []
    entries = source["keys"] if isinstance(source.get("keys"), list) else None
    if not entries:
        raise ValueError('a JWK set is a dict with a list "keys"')
    for entry in entries[:_MOST_KEYS]:
        if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC", "OKP"):
            continue
        if entry.get("use", "sig") != "sig":
            continue
        try:
            key = JWKRegistry.import_key(entry)
        except (JoseError, ValueError, TypeError, KeyError):
            continue  # on a curve that isn't supported
        kid = entry.get("kid")
        keys.append((kid if isinstance(kid, str) else None, key))
    if not keys:
        raise ValueError("the JWK set has no key for signatures")
    return keys


def _fetched(url: str) -> Mapping[str, Any]:
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    with _OPENER.open(request, timeout=_FETCH_TIMEOUT) as response:
        content = response.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError("the JWK set is too large")
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("the JWK set is not a JSON object")
    return found


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, since only the configured URL may provide the keys."""

    def redirect_request(self, *_: Any) -> None:
        """Return None: the redirect becomes an ``HTTPError``."""


_OPENER = urllib.request.build_opener(_NoRedirects)
