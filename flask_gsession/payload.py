"""The payload of a record: all values of one session, as the store keeps them.

::

    byte 0      format version, 1
    byte 1      0 plain, 1 sealed with AES-GCM
    plain:      4 first characters of the session key, 4 bytes CRC-32 of the whole session key and
                the body, then the body
    sealed:     4 bytes key id, 12 bytes nonce, ciphertext and tag of the body

    body:       4 bytes length of the index, the index, the encoded values one after the other
    index:      MessagePack array: keys, lengths of the values, what the session says of itself

The index lets one value be found without looking at the others. The check in front (or the
AES-GCM tag) binds the payload to its own record: another session's payload, a truncated or a
foreign one does not open. It is no protection against those who may write to the store;
encryption is. New fields go at the index's end, so that older payloads stay readable. The body of
a pointer is the key of its successor.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, NamedTuple
from zlib import crc32

from msgspec import DecodeError, Meta, Struct
from msgspec.msgpack import Decoder, Encoder

from .codec import is_valid_text
from .encryption import Cipher
from .errors import SessionTooLarge, UnreadableRecord, UnsupportedType

FORMAT = 1
_PLAIN, _SEALED = bytes((FORMAT, 0)), bytes((FORMAT, 1))
_CHECK_BYTES = 8
_BODY = 2 + _CHECK_BYTES


class Body(NamedTuple):
    """What a payload holds: the encoded values by key, and the session's own idle lifetime.

    ``lifetime`` is in milliseconds; None means the application's setting.
    """

    values: dict[str, bytes]
    lifetime: int | None = None


class _Index(Struct, array_like=True, frozen=True):
    keys: list[str]
    lengths: list[Annotated[int, Meta(ge=1)]]
    lifetime: int | None = None


class PayloadFormat:
    """Packs bodies into payloads and back, within the limits on size and number of keys.

    ``allow_plain`` lets payloads be read that were written before encryption was turned on.
    """

    def __init__(
        self, *, max_bytes: int, max_keys: int, cipher: Cipher | None, allow_plain: bool = False
    ) -> None:
        self._max_bytes = max_bytes
        self._max_keys = max_keys
        self._cipher = cipher
        self._allow_plain = cipher is None or allow_plain
        self._encode = Encoder().encode
        self._decode = Decoder(_Index).decode

    def pack(self, session_key: str, body: Body) -> bytes:
        """The payload of ``body`` under ``session_key``.

        Raises ``SessionTooLarge`` or ``UnsupportedType`` (a key that is not valid text).
        """
        values = body.values
        if len(values) > self._max_keys:
            raise SessionTooLarge(
                "session", f"{len(values)} keys; SESSION_MAX_KEYS allows {self._max_keys}"
            )
        parts = list(values.values())
        try:
            index = self._encode(_Index(list(values), [len(part) for part in parts], body.lifetime))
        except UnicodeEncodeError:
            bad = next(key for key in values if not is_valid_text(key))
            raise UnsupportedType(
                f"session[{ascii(bad)[:60]}]", "a key that holds lone surrogates is not valid text"
            ) from None
        encoded = b"".join((len(index).to_bytes(4, "big"), index, *parts))
        if len(encoded) > self._max_bytes:
            largest = max(values, key=lambda key: len(key) + len(values[key]))
            raise SessionTooLarge(
                "session",
                f"{len(encoded)} bytes; SESSION_MAX_BYTES allows {self._max_bytes}; "
                f"the largest key is {ascii(largest)[:60]}",
            )
        return self._bind(session_key, encoded)

    def unpack(self, session_key: str, payload: bytes) -> Body:
        """The body of ``payload``, its values still encoded. Raises ``UnreadableRecord``."""
        body, start = self._unbind(session_key, payload)
        end = start + 4 + int.from_bytes(body[start : start + 4], "big")
        try:
            index = self._decode(body[start + 4 : end])
        except (DecodeError, ValueError, RecursionError):
            raise UnreadableRecord("corrupt", "the index is none") from None
        ends = list(accumulate(index.lengths, initial=end))
        parts = map(body.__getitem__, map(slice, ends, ends[1:]))
        values = dict(zip(index.keys, parts, strict=False))
        if not len(values) == len(index.keys) == len(index.lengths) or ends[-1] != len(body):
            raise UnreadableRecord("corrupt", "the index does not fit the values")
        return Body(values, index.lifetime)

    def pack_pointer(self, session_key: str, successor: str) -> bytes:
        """The payload of a pointer from ``session_key`` to ``successor``."""
        return self._bind(session_key, successor.encode("ascii"))

    def check_pointer(self, session_key: str, successor: str, payload: bytes) -> None:
        """Raises ``UnreadableRecord`` unless the pointer is this key's own, to that successor."""
        body, start = self._unbind(session_key, payload)
        if body[start:] != successor.encode("utf-8", "replace"):
            raise UnreadableRecord("corrupt", "a pointer to somewhere else")

    def _bind(self, session_key: str, body: bytes) -> bytes:
        own = session_key.encode("ascii")
        if self._cipher is not None:
            return _SEALED + self._cipher.seal(body, own, _SEALED)
        return b"".join((_PLAIN, _check(own, body), body))

    def _unbind(self, session_key: str, payload: bytes) -> tuple[bytes, int]:
        """The bytes that hold the body, and where in them it starts."""
        header = payload[:2]
        own = session_key.encode("ascii")
        if header == _PLAIN:
            if not self._allow_plain:
                raise UnreadableRecord("corrupt", "not encrypted; SESSION_ENCRYPTION_KEYS is set")
            if _check(own, memoryview(payload)[_BODY:]) != payload[2:_BODY]:
                raise UnreadableRecord("corrupt", "not this session's own record, or altered")
            return payload, _BODY
        if header == _SEALED:
            if self._cipher is None:
                raise UnreadableRecord("unknown encryption key", "SESSION_ENCRYPTION_KEYS is unset")
            return self._cipher.open(payload[2:], own, header), 0
        if len(header) == 2 and header[0] > FORMAT:
            raise UnreadableRecord("newer format", f"version {header[0]}; this one reads {FORMAT}")
        raise UnreadableRecord("corrupt", "no record of this library")


def _check(own: bytes, body: bytes | memoryview) -> bytes:
    return own[:4] + crc32(body, crc32(own)).to_bytes(4, "big")
