"""Passports: signed statements about a visitor, for services that can't call the application.

A passport is a JWT (RFC 7519) that is valid for at most 60 seconds, signed with ES256. Its keys are
published as a JWK set (RFC 7517). It can't be revoked: a logout takes effect when it expires.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flask import Blueprint, Response, current_app, jsonify, request

try:
    from joserfc import jwt
    from joserfc.errors import JoseError
    from joserfc.jwk import ECKey, KeySet
except ImportError as error:
    raise ImportError(
        f"flask_gsession.sharing.passport needs the package {error.name}: install the extra, "
        "flask-gsession[passports]"
    ) from None

from ..errors import PassportRefused, SettingError, StoreUnavailable
from ..extension import Session
from ..processes import process
from ..stores.base import Clock
from .verify import Identity, Verifier

LONGEST = 60  # seconds
_ALGORITHM = "ES256"
_CURVE = "P-256"
_FETCH_AGAIN = 10.0  # seconds between two fetches of the keys

Keys = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class Passports:
    """Issues passports.

    ``keys``: paths of PEM files with EC keys on P-256, the current one first. Older keys stay
    published, so their passports are accepted until they expire. ``issuer``: the ``iss`` claim,
    usually the URL of the application. ``audience``: the services that may accept the passports.
    ``lifetime``: seconds, at most 60.
    """

    def __init__(
        self,
        keys: str | Iterable[str],
        issuer: str,
        audience: str | Iterable[str],
        lifetime: int = LONGEST,
        clock: Clock = time.time,
    ) -> None:
        if type(lifetime) is not int or not 1 <= lifetime <= LONGEST:
            raise SettingError(f"A passport is valid for 1 to {LONGEST} seconds, not {lifetime!r}")
        paths = [keys] if isinstance(keys, str) else list(keys)
        if not paths:
            raise SettingError("Passports need the path of a key")
        loaded = [_key(path) for path in paths]
        self._current = loaded[0]
        self._issuer = issuer
        self._audience = audience if isinstance(audience, str) else list(audience)
        self._lifetime = lifetime
        self._clock = clock
        self._published = KeySet([*loaded]).as_dict(private=False)

    def issue(self, identity: Identity, values: Mapping[str, Any] | None = None) -> str:
        """A passport for ``identity``, with ``values``. It never outlives the session."""
        now = int(self._clock())
        end = min(now + self._lifetime, int(identity.session.expires_at.timestamp()))
        claims: dict[str, Any] = {
            "iss": self._issuer,
            "sub": identity.user,
            "aud": self._audience,
            "iat": now,
            "exp": end,
            "jti": secrets.token_urlsafe(16),
        }
        if values:
            claims["values"] = {key: value for key, value in values.items() if _is_json(value)}
        return jwt.encode({"alg": _ALGORITHM, "kid": self._current.kid}, claims, self._current)

    def published(self) -> dict[str, Any]:
        """The public keys, as a JWK set."""
        return self._published  # type: ignore[return-value]  # a typed dict


def passport_blueprint(
    ext: Session,
    passports: Passports,
    *,
    url: str = "/session/passport",
    keys_url: str = "/.well-known/jwks.json",
    user: str | None = None,
    values: Iterable[str] = (),
) -> Blueprint:
    """A blueprint with a page that gives the visitor a passport, and one with the public keys.

    The first responds 200 with JSON, 401 if the visitor isn't signed in, and 503 if the store
    doesn't answer. One round trip; none for the keys.
    """
    verifier = Verifier(ext, user, values)
    blueprint = Blueprint("gsession_passport", __name__)

    @blueprint.get(url)
    def passport() -> Response:
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy
        try:
            identity = verifier.identify(app, request.environ.get("HTTP_COOKIE", ""))
        except StoreUnavailable as error:
            response = jsonify(error="store unavailable")
            response.status_code = 503
            response.headers["Retry-After"] = str(error.retry_after)
        else:
            if identity is None:
                response = jsonify(error="not signed in")
                response.status_code = 401
                response.headers["WWW-Authenticate"] = "Cookie"
            else:
                response = jsonify(passport=passports.issue(identity, verifier.shared(identity)))
        response.headers.update({"Cache-Control": "no-store", "Vary": "Cookie"})
        return response

    @blueprint.get(keys_url)
    def keys() -> Response:
        response = jsonify(passports.published())
        response.headers["Cache-Control"] = "public, max-age=300"
        return response

    return blueprint


class Passport(NamedTuple):
    """The contents of an accepted passport. ``expires_at``: seconds since 1970."""

    user: str
    values: dict[str, Any]
    expires_at: int


class PassportReader:
    """Checks passports, in a service that doesn't call the application.

    ``keys``: the JWK set, or a function that fetches it. For a passport with an unknown key, the
    function is called again, at most every ten seconds. ``issuer`` and ``audience``: the required
    claims. ``leeway``: how many seconds clocks may differ. Each reader accepts a passport only
    once; with ``once=False``, repeatedly until it expires.
    """

    def __init__(
        self,
        keys: Keys,
        issuer: str,
        audience: str,
        *,
        leeway: int = 5,
        once: bool = True,
        clock: Clock = time.time,
    ) -> None:
        self._source = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway
        self._once = once
        self._clock = clock
        self._seen: dict[str, int] = {}  # oldest first
        self._keys: KeySet | None = None
        self._fetched_at = -_FETCH_AGAIN
        if not callable(keys):
            self._keys = KeySet.import_key_set(dict(keys))  # type: ignore[arg-type]  # a JWK set
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._fetching = threading.RLock()  # held during a fetch, which may read one itself

    def read(self, text: str) -> Passport:
        """The contents of a passport. Raises ``PassportRefused``, and errors of fetching keys."""
        process.notice()
        try:
            claims = self._decode(text).claims
        except (JoseError, ValueError):
            raise PassportRefused("not signed by a known key") from None
        now = self._clock()
        issued, end, jti, user = (claims.get(name) for name in ("iat", "exp", "jti", "sub"))
        if (
            type(issued) is not int
            or type(end) is not int
            or not isinstance(jti, str)
            or not isinstance(user, str)
            or not end - issued <= LONGEST
        ):
            raise PassportRefused("not a passport")
        if claims.get("iss") != self._issuer:
            raise PassportRefused("another issuer")
        audience = claims.get("aud")
        if self._audience not in (audience if isinstance(audience, list) else [audience]):
            raise PassportRefused("another audience")
        if issued > now + self._leeway:
            raise PassportRefused("from the future")
        if end <= now - self._leeway:
            raise PassportRefused("expired")
        if self._once:
            self._note(jti, end, now)
        values = claims.get("values")
        return Passport(user, values if isinstance(values, dict) else {}, end)

    def _note(self, jti: str, end: int, now: float) -> None:
        with self._lock:
            if jti in self._seen:
                raise PassportRefused("replayed")
            self._seen[jti] = end
            while self._seen:
                oldest = next(iter(self._seen))
                if self._seen[oldest] > now - self._leeway:
                    break
                del self._seen[oldest]

    def _decode(self, text: str) -> Any:
        keys = self._keys
        try:
            return _decoded(text, keys)
        except (JoseError, ValueError):
            later = self._keys_after(keys)
            if later is keys:
                raise
            return _decoded(text, later)

    def _keys_after(self, known: KeySet | None) -> KeySet | None:
        """Later keys than ``known``: fetches them, unless they were just fetched."""
        source = self._source
        if not callable(source):
            return known
        with self._fetching:  # the fetch of another thread may bring the key
            if self._keys is known and time.monotonic() - self._fetched_at >= _FETCH_AGAIN:
                self._fetched_at = time.monotonic()
                self._keys = KeySet.import_key_set(dict(source()))  # type: ignore[arg-type]  # a JWK set
            return self._keys


def _decoded(text: str, keys: KeySet | None) -> Any:
    if keys is None:
        raise ValueError("no keys yet")
    return jwt.decode(text, keys, [_ALGORITHM])


def _key(path: str) -> ECKey:
    try:
        key = ECKey.import_key(Path(path).read_bytes(), {"use": "sig", "alg": _ALGORITHM})
    except (OSError, ValueError, JoseError) as error:
        raise SettingError(
            f"The passport key {path} can't be read ({type(error).__name__}): it must be a PEM "
            "file with an EC key, such as `openssl ecparam -name prime256v1 -genkey` makes"
        ) from None
    if key.curve_name != _CURVE or not key.is_private:
        raise SettingError(f"The passport key {path} isn't a private key on the curve {_CURVE}")
    key.ensure_kid()
    return key


def _is_json(value: object) -> bool:
    """Whether JSON represents the value exactly; other values are left out."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    return value is None or type(value) in (str, bool, int, float)
