"""The mark of an import, which maps an old session to its new one. It outlives both.

It is a separate record instead of a pointer, since a delete follows pointers and removes them. Its
key is derived from the old record's name. It holds the new session's key and a nonce. The token is
an HMAC of the old name and the nonce under the secret key. So every request with the old cookie can
get the same token again, but an attacker can't compute it from the stored data.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from binascii import b2a_base64
from collections.abc import Sequence
from itertools import count

import msgspec
from msgspec import Struct

from ..errors import UnreadableRecord
from ..repository.repository import Repository
from ..stores.base import KEY_LENGTH, Record
from ..tokens import Token, session_key
from ..values.payload import Origin

#: The last character of a mark's key. Digests never end with it, so no session has such a key.
ENDING = "_"
_NONCE_BYTES = 16


class Mark(Struct, array_like=True, frozen=True):
    """``session``: the key that the new session was created under.

    ``ended``: the old cookie is invalid, even if that session lives. ``answered``: when a request
    with the old cookie was last about to set our cookie, in milliseconds. See ``shared_cookies``.
    """

    session: str
    nonce: bytes
    ended: bool = False
    answered: int = 0

    def __repr__(self) -> str:
        return f"<Mark session={self.session!r}>"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("session", self.session)]

    def pack(self) -> bytes:
        """The content of its record."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def of(cls, content: bytes) -> Mark:
        """The mark in the content of a record. Raises ``UnreadableRecord``."""
        try:
            return msgspec.msgpack.decode(content, type=cls)
        except msgspec.DecodeError:
            raise UnreadableRecord("corrupt", "malformed mark of an import") from None


def read_mark(repository: Repository, record: Record | None) -> Mark | None:
    """The mark in a record, unless that is missing or has expired."""
    if record is None or repository.now() >= record.idle_expires_at:
        return None
    return Mark.of(repository.other_records.read(record))


def mark_key(label: str, name: str) -> str:
    """The key of the mark for the old record ``name`` of the source ``label``."""
    digest = hashlib.sha256(f"flask-gsession import 1 {label}\0{name}".encode()).digest()
    text = b2a_base64(digest, newline=False).translate(_URL_SAFE).decode()
    return text[: KEY_LENGTH - 1] + ENDING


def new_nonce() -> bytes:
    return secrets.token_bytes(_NONCE_BYTES)


def token_of(secret_key: str | bytes, label: str, name: str, nonce: bytes) -> Token:
    """The token of the session that was made from this old record."""
    mac = _mac(secret_key, f"token {label}\0{name}\0".encode() + nonce)
    return Token(b2a_base64(mac[:32], newline=False).translate(_URL_SAFE, b"=").decode())


def token_for(
    secret_keys: Sequence[str | bytes], label: str, name: str, mark: Mark
) -> Token | None:
    """The token that belongs to a mark; None if its secret key is gone."""
    for key in secret_keys:
        token = token_of(key, label, name, mark.nonce)
        if hmac.compare_digest(session_key(token), mark.session):
            return token
    return None


def seal_origin(
    secret_key: str | bytes, label: str, name: str, nonce: bytes, expires_at: int | None
) -> Origin:
    """The origin of a session, with its old id encrypted, because that is a secret."""
    plain = name.encode()
    pad = _pad(secret_key, nonce, len(plain))
    mixed = bytes(a ^ b for a, b in zip(plain, pad, strict=True))
    return Origin(label, mark_key(label, name), nonce, mixed, expires_at)


def open_origin(secret_keys: Sequence[str | bytes], origin: Origin) -> str | None:
    """The name of the old record; None if the secret key that encrypted it is gone."""
    for key in secret_keys:
        pad = _pad(key, origin.nonce, len(origin.sealed))
        plain = bytes(a ^ b for a, b in zip(origin.sealed, pad, strict=True))
        name = plain.decode("utf-8", "replace")
        if mark_key(origin.label, name) == origin.mark:
            return name
    return None


_URL_SAFE = bytes.maketrans(b"+/", b"-_")


def _pad(secret_key: str | bytes, nonce: bytes, length: int) -> bytes:
    pad = b""
    for number in count():
        if len(pad) >= length:
            return pad[:length]
        pad += _mac(secret_key, b"name %d " % number + nonce)
    raise AssertionError("not reached")


def _mac(secret_key: str | bytes, message: bytes) -> bytes:
    secret = secret_key.encode() if isinstance(secret_key, str) else secret_key
    return hmac.digest(secret, b"flask-gsession import 1 " + message, "sha512")
