"""Session tokens: make, sign, check, digest.

A token is 256 random bits, base64url without padding. Only its signed form leaves the server, in
the cookie or the token header; only its SHA-256 reaches a store. Source: OWASP Session Management
Cheat Sheet (entropy, content); RFC 2104 (HMAC); RFC 4648 section 5 (base64url).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from binascii import b2a_base64
from collections.abc import Callable, Iterable, Sequence
from hmac import compare_digest
from typing import Any

from msgspec import Struct

TOKEN_BYTES = 32
#: How many cookies with one name we check at most. Browsers keep fewer per site (Chromium 180), so
#: an attacker can't crowd ours out. Takes about a millisecond per secret key.
MAX_SIGNATURES = 200
#: How many sessions a logout ends at most if a request has several of our tokens. Each costs a
#: round trip.
MAX_REFUSED = 8
_SIGNATURE_BYTES = 16
_SIGNATURE_LENGTH = 22  # characters
_MAX_TOKEN_LENGTH = 200  # characters
_MOST_KNOWN = 4096  # cached signatures; about 1.5 megabytes
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_SHA256 = hashlib.sha256()
_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,200}", re.ASCII)


class Token(str):
    """A token whose ``repr`` hides it, since some tools print the variables of a traceback."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<session token>"


def new_token(nbytes: int = TOKEN_BYTES) -> Token:
    """A new token with ``nbytes`` bytes of entropy from the system's generator."""
    return Token(secrets.token_urlsafe(nbytes))


def is_token(text: object) -> bool:
    """Whether ``text`` can be a token: 22 to 200 characters of the base64url alphabet."""
    return isinstance(text, str) and _TOKEN.fullmatch(text) is not None


def session_key(token: str) -> str:
    """The store's key for a token: its SHA-256, base64url, 43 characters.

    It is also the session's public handle: it can't be converted back to the token.
    """
    return _as_text(_digest(token))


def _digest(token: str) -> bytes:
    digest = _SHA256.copy()  # faster than creating one
    digest.update(token.encode())
    return digest.digest()


def _as_text(digest: bytes) -> str:
    return b2a_base64(digest).translate(_URL_SAFE, b"=\n").decode()


def _derive(secret_key: str | bytes, label: bytes) -> bytes:
    secret = secret_key.encode() if isinstance(secret_key, str) else secret_key
    return hmac.digest(secret, label, "sha256")


class _Mac:
    """HMAC-SHA256 of tokens under one key, with the key's two blocks hashed once (RFC 2104).

    The module ``hmac`` hashes them for each message, which takes longer than everything else.
    """

    def __init__(self, key: bytes) -> None:
        block = key.ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def signature(self, token: str) -> str:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(token.encode())
        outer.update(inner.digest())
        return _as_text(outer.digest()[:_SIGNATURE_BYTES])


class Checked(Struct, frozen=True, gc=False):
    """The result of checking a token: the ``token`` and ``key``, or the ``reason`` for its refusal.

    ``refused``: several tokens that we signed. None of them is used, and a logout ends all their
    sessions.
    """

    token: str | None
    reason: str = ""
    outdated: bool = False  # signed with a fallback key, so the cookie needs a new signature
    refused: tuple[str, ...] = ()
    key: str = ""  # the session's key

    @property
    def signed(self) -> tuple[str, ...]:
        """All tokens that we signed, used or not."""
        return self.refused if self.token is None else (self.token,)

    def __repr__(self) -> str:
        return f"Checked(reason={self.reason!r}, outdated={self.outdated})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("reason", self.reason), ("outdated", self.outdated)]


class TokenSigner:
    """Signs tokens with the application's secret keys, the current one first.

    ``purpose`` (the cookie's name) goes into the derived keys. So a token from one cookie is
    invalid in another cookie, and so is anything else that the application signs.

    Caches valid signatures, which saves one hash for a visitor's next request. It caches no tokens,
    and a signature is useless without its token.
    """

    def __init__(self, secret_keys: Sequence[str | bytes], purpose: str) -> None:
        label = f"flask-gsession token 1 {purpose}".encode()
        self._macs = [_Mac(_derive(key, label)) for key in secret_keys]
        #: by the digest of a recently checked token: its signature, and its session's key
        self._known: dict[bytes, tuple[str, str]] = {}

    def sign(self, token: str) -> str:
        """The signed form of the token, which is sent to the client."""
        return f"{token}.{self._macs[0].signature(token)}"

    def check(self, presented: str) -> Checked:
        """The token in ``presented``, if one of our keys signed it. Compares in constant time."""
        token, _, signature = presented.rpartition(".")
        if (
            len(signature) != _SIGNATURE_LENGTH
            or not 0 < len(token) <= _MAX_TOKEN_LENGTH
            or not presented.isascii()
        ):
            return Checked(None, "malformed")
        digest = _digest(token)
        known = self._known.get(digest)
        if known is not None and compare_digest(known[0], signature):
            return Checked(token, key=known[1])
        return self._check_by_hash(token, signature, digest)

    def _check_by_hash(self, token: str, signature: str, digest: bytes) -> Checked:
        for mac in self._macs:
            if compare_digest(mac.signature(token), signature):
                key, current = _as_text(digest), mac is self._macs[0]
                if current:
                    if len(self._known) >= _MOST_KNOWN:
                        self._known.clear()
                    self._known[digest] = signature, key
                return Checked(token, outdated=not current, key=key)
        return Checked(None, "bad signature")

    def check_all(self, presented: Iterable[str]) -> Checked:
        """Check the values of all cookies of one name.

        Ignores cookies that we didn't sign: another application on the host, or a sibling domain,
        may have set them, and they must not lock the visitor out. Refuses two different tokens that
        we signed, since one may have been planted.
        """
        ours, refused, signatures = None, Checked(None, "malformed"), 0
        tokens: dict[str, None] = {}  # each once, in order
        for value in presented:
            checked = self.check(value)
            if checked.reason == "malformed":
                continue
            signatures += 1
            if signatures > MAX_SIGNATURES:
                return Checked(None, "too many cookies")
            if checked.token is None:
                refused = checked
                continue
            tokens[checked.token] = None
            if len(tokens) == MAX_REFUSED:
                break
            if ours is None or ours.outdated:
                ours = checked  # perhaps the same token, signed with the current key
        if len(tokens) > 1:
            return Checked(None, "two cookies", refused=tuple(tokens))
        return refused if ours is None else ours


TokenFactory = Callable[[], str]
