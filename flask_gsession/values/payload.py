"""The payload of a record: all values of one session, as the store keeps them.

::

    byte 0      format version, 2; 3 if a value is a reference; 4 if the session has an owner
    byte 1      0 plain, 2 sealed with AES-GCM
    plain:      first 4 characters of the session key, 4 bytes CRC-32 of the session key, of the
                byte 3 or 4 in these formats, and of the body; then the body
    sealed:     4 bytes key id, 12 bytes nonce, ciphertext and tag of the body; also authenticated
                are bytes 0 and 1, the session key, and the times that never change: created_at and
                absolute_expires_at, for a pointer also the end of its grace

    body:       MessagePack array: a map of the keys to the encoded values, each of them a binary
                string; the session's own idle lifetime; whether any value has a mark; the end of
                debugging for this session; whether any value is a reference; the owner; the origin;
                what edge nodes have settled; the joins

So one value can be decoded without the others. The checksum or the AES-GCM tag binds the payload
to its record: the payload of another session, or a truncated one, is refused. The checksum doesn't
protect against an attacker who can write to the store; encryption does. New fields go at the end of
the array, so that older payloads stay readable. The body of a pointer is the key of its successor.
Versions before the first release sealed without the times, with a 1 in byte 1. Such a payload is
refused, since an attacker with access to the store could extend its life.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any
from zlib import crc32

from msgspec import Meta, Struct
from msgspec.msgpack import Decoder, Encoder

from ..errors import SessionTooLarge, UnreadableRecord, UnsupportedType
from .codec import OF_DATA, check_damage, is_valid_text
from .encryption import Cipher
from .marks import END_OF_TIME
from .references import length_of

FORMAT, _WITH_REFERENCES, _OWNED, NEWEST = 2, 3, 4, 4
# Payloads without references or owner use the formats that older versions can read.
_FORMATS = (FORMAT, _WITH_REFERENCES, _OWNED)
_PLAIN = {number: bytes((number, 0)) for number in _FORMATS}
_SEALED = {number: bytes((number, 2)) for number in _FORMATS}
_SEALED_WITHOUT_TIMES = (b"\2\1", b"\3\1")
_FORMAT_OF_PLAIN = {header: number for number, header in _PLAIN.items()}
_SEALED_HEADERS = frozenset(_SEALED.values())
NOT_ENCRYPTED = "not encrypted"
#: The upper limit for all stores, since MongoDB refuses documents of 16 MiB.
MOST_BYTES = 15 * 1024 * 1024
_CHECK_BYTES = 8
_BODY = 2 + _CHECK_BYTES


_Milliseconds = Annotated[int, Meta(ge=0, lt=END_OF_TIME)]


class Owner(Struct, array_like=True, frozen=True, omit_defaults=True):
    """The user that a session is bound to, and the session's place in the user's roster.

    ``seen``: when it was last entered in the roster, in seconds; 0 if it must be looked up there
    before it is used. ``until``: the roster takes it to end no later, in seconds.
    ``predecessor``: the session that it was rotated from, which may be the one in the roster.
    ``signed_in``: when the user signed in, in seconds, rounded up; 0 if a cookie did it instead.
    """

    user_id: str
    device_id: str
    seen: _Milliseconds
    until: _Milliseconds
    predecessor: str | None = None
    signed_in: _Milliseconds = 0

    def __repr__(self) -> str:
        return f"<Owner device={self.device_id!r}>"


class Origin(Struct, array_like=True, frozen=True):
    """The old session that this one was made from; see ``moving.mark``.

    ``label``: of the source. ``mark``: the key of the mark. ``sealed``: the old record's name,
    which only the secret key opens. ``expires_at``: the old record's end then, in milliseconds.
    """

    label: str
    mark: str
    nonce: bytes
    sealed: bytes
    expires_at: int | None

    def __repr__(self) -> str:
        return f"<Origin {self.label}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("label", self.label)]


class Join(Struct, array_like=True, frozen=True, omit_defaults=True):
    """A visitor's values that are to join, or have joined, the values of a user: see ``joins``.

    In a session that has values for a user under these ``keys``: ``id`` stays the same through
    rotations, ``revision`` grows with each save. In a user's record: the revision that has joined,
    and its ``values``; no values and ``CLOSED`` once the sign-in is complete. ``ends_at``, in
    milliseconds: when it can be forgotten.
    """

    id: bytes
    revision: _Milliseconds
    values: dict[str, Annotated[bytes, Meta(min_length=1)]] = {}  # never changed
    ends_at: _Milliseconds = 0
    keys: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Join revision={self.revision}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("revision", self.revision)]


#: The revision of a join that is closed: no session has a later one.
CLOSED = END_OF_TIME - 1


class Body(Struct, array_like=True, gc=False):
    """The contents of a payload: the encoded values by key, and the session's own idle lifetime.

    ``lifetime`` is in milliseconds; None means the application's setting. ``marked``: whether any
    value has a mark (see ``marks``); if not, it takes no byte. ``debug_until``: the end of
    debugging for this session, in milliseconds since 1970. ``has_large``: whether any value is a
    reference to a large value (see ``references``). ``owner``: the user that the session is bound
    to. ``origin``: of a session that was imported from another library or store. ``settled``: by
    edge node, the number of the last change that it settled here. ``joins``:
    what is to join a user's values at the sign-in; in a user's record, what has.
    """

    values: dict[str, Annotated[bytes, Meta(min_length=1)]]
    lifetime: _Milliseconds | None = None
    marked: bool = False
    debug_until: _Milliseconds | None = None
    has_large: bool = False
    owner: Owner | None = None
    origin: Origin | None = None
    settled: dict[str, _Milliseconds] | None = None
    joins: tuple[Join, ...] = ()

    def __repr__(self) -> str:
        size = sum(map(len, self.values.values()))
        return f"<Body: {len(self.values)} keys, {size} bytes>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("keys", len(self.values))]


class PayloadFormat:
    """Packs bodies into payloads and back, within the limits on size and number of keys.

    ``allow_plain`` accepts payloads that were written before encryption was turned on.
    """

    def __init__(
        self, *, max_bytes: int, max_keys: int, cipher: Cipher | None, allow_plain: bool = False
    ) -> None:
        self._max_bytes = max_bytes
        self._max_keys = max_keys
        self._cipher = cipher
        self._allow_plain = cipher is None or allow_plain
        self._encode = Encoder().encode
        self._decode = Decoder(Body).decode

    def pack(
        self,
        session_key: str,
        body: Body,
        *times: int,
        before: Mapping[str, bytes] | None = None,
    ) -> bytes:
        """The payload of ``body`` under ``session_key``. Raises as ``check`` does.

        ``times``: its record's created_at and absolute_expires_at, which never change.
        """
        number = FORMAT
        if body.owner is not None:
            number = _OWNED
        elif body.has_large:
            number = _WITH_REFERENCES
        return self._bind(session_key, self.check(body, before), times, number)

    def check(self, body: Body, before: Mapping[str, bytes] | None = None) -> bytes:
        """Encode the body, if it is within the limits or no larger than the values ``before``.

        Those are stored already, and a limit may have been lowered since. Raises
        ``SessionTooLarge``, or ``UnsupportedType`` for a key that isn't valid text.
        """
        values = body.values
        if len(values) > self._max_keys and (before is None or len(values) > len(before)):
            raise SessionTooLarge(
                "session", f"{len(values)} keys; SESSION_MAX_KEYS allows {self._max_keys}"
            )
        try:
            if body.origin is not None or body.settled is not None or body.joins:
                encoded = self._encode(body)
            elif body.owner is not None:
                known = values, body.lifetime, body.marked, body.debug_until
                encoded = self._encode((*known, body.has_large, body.owner))
            elif body.has_large:
                encoded = self._encode((values, body.lifetime, body.marked, body.debug_until, True))
            elif body.debug_until is not None:
                encoded = self._encode((values, body.lifetime, body.marked, body.debug_until))
            elif body.marked:
                encoded = self._encode((values, body.lifetime, True))
            else:
                encoded = self._encode((values, body.lifetime))
        except UnicodeEncodeError:
            bad = next(key for key in values if not is_valid_text(key))
            raise UnsupportedType(
                f"session[{ascii(bad)[:60]}]", "a key that holds lone surrogates is not valid text"
            ) from None
        if len(encoded) > self._max_bytes and (
            before is None or len(encoded) > MOST_BYTES or _size(values) > _size(before)
        ):
            largest = max(values, key=lambda key: len(key) + len(values[key]))
            raise SessionTooLarge(
                "session",
                f"{len(encoded)} bytes; SESSION_MAX_BYTES allows {self._max_bytes}; "
                f"the largest key is {ascii(largest)[:60]}",
            )
        return encoded

    def unpack(self, session_key: str, payload: bytes, *times: int) -> Body:
        """The body of ``payload``, with its values still encoded. Raises ``UnreadableRecord``."""
        body = self._unbind(session_key, payload, times)
        try:
            return self._decode(body)
        except OF_DATA as error:
            check_damage(self._decode, body, error)

    def bind_again(
        self, session_key: str, payload: bytes, before: tuple[int, ...], after: tuple[int, ...]
    ) -> bytes:
        """The same payload for a record with other times. Raises ``UnreadableRecord``."""
        body = self._unbind(session_key, payload, before)
        return self._bind(session_key, body, after, payload[0])

    def pack_pointer(self, session_key: str, successor: str, *times: int) -> bytes:
        """The payload of a pointer from ``session_key`` to ``successor``.

        ``times``: created_at, absolute_expires_at and, since no pointer is ever renewed,
        idle_expires_at.
        """
        return self._bind(session_key, successor.encode("ascii"), times)

    def pack_other(self, key: str, content: bytes, *times: int) -> bytes:
        """The payload of a record that is no session's, such as a user's roster."""
        return self._bind(key, content, times)

    def unpack_other(self, key: str, payload: bytes, *times: int) -> bytes:
        """The content of such a payload. Raises ``UnreadableRecord``.

        A damaged format number isn't taken for a newer format, which others may need.
        """
        try:
            return self._unbind(key, payload, times)
        except UnreadableRecord as error:
            if error.reason == "newer format" and self._fits(key.encode("ascii"), payload, times):
                raise UnreadableRecord("corrupt", "damaged format number") from None
            raise

    def check_pointer(self, session_key: str, successor: str, payload: bytes, *times: int) -> None:
        """Raises ``UnreadableRecord`` unless it is a pointer from this key to ``successor``."""
        if self._unbind(session_key, payload, times) != successor.encode("utf-8", "replace"):
            raise UnreadableRecord("corrupt", "pointer mismatch")

    def _bind(
        self, session_key: str, body: bytes, times: tuple[int, ...], number: int = FORMAT
    ) -> bytes:
        own = session_key.encode()
        if self._cipher is None:
            return _PLAIN[number] + _check(own, body, number) + body
        header = _SEALED[number]
        return header + self._cipher.seal(body, own, header + _as_text(times))

    def _unbind(self, session_key: str, payload: bytes, times: tuple[int, ...]) -> bytes:
        """The bytes of the body. Raises ``UnreadableRecord`` unless they belong to this session."""
        header, own = payload[:2], session_key.encode()
        number = _FORMAT_OF_PLAIN.get(header)
        if number is not None and self._allow_plain:
            body = payload[_BODY:]
            if _check(own, body, number) != payload[2:_BODY]:
                raise UnreadableRecord("corrupt", "checksum mismatch")
            return body
        return self._open(header, own, payload, times)

    def _open(self, header: bytes, own: bytes, payload: bytes, times: tuple[int, ...]) -> bytes:
        if header in _FORMAT_OF_PLAIN:
            raise UnreadableRecord("corrupt", f"{NOT_ENCRYPTED}; SESSION_ENCRYPTION_KEYS is set")
        if header in _SEALED_HEADERS:
            if self._cipher is None:
                raise UnreadableRecord("unknown encryption key", "SESSION_ENCRYPTION_KEYS is unset")
            return self._cipher.open(payload[2:], own, header + _as_text(times))
        if header in _SEALED_WITHOUT_TIMES:
            raise UnreadableRecord(
                "corrupt", "sealed by a version before the first release, without its times"
            )
        if len(header) == 2 and header[0] > NEWEST:
            raise UnreadableRecord("newer format", f"version {header[0]}; this one reads {NEWEST}")
        if len(header) == 2 and header[0] == 1:
            raise UnreadableRecord("corrupt", "format 1, of a version before the first release")
        raise UnreadableRecord("corrupt", "malformed payload")

    def _fits(self, own: bytes, payload: bytes, times: tuple[int, ...]) -> bool:
        """Whether all of it but the format number, which the checks cover, is of a known format."""
        if payload[1:2] == b"\0":
            body = payload[_BODY:]
            return payload[2:_BODY] in [_check(own, body, number) for number in _FORMATS]
        if payload[1:2] == b"\2" and self._cipher is not None:
            for header in _SEALED_HEADERS:
                with suppress(UnreadableRecord):
                    self._cipher.open(payload[2:], own, header + _as_text(times))
                    return True
        return False


def _size(values: Mapping[str, bytes]) -> int:
    """The bytes of these keys and values, including large values."""
    return sum(len(key.encode()) + length_of(raw) for key, raw in values.items())


def _as_text(times: tuple[int, ...]) -> bytes:
    return b"".join(b"%d " % time for time in times)


def _check(own: bytes, body: bytes, number: int) -> bytes:
    start = crc32(own)
    if number != FORMAT:  # formats differ in one bit, so the checksum covers the format
        start = crc32(bytes((number,)), start)
    return own[:4] + crc32(body, start).to_bytes(4, "big")
