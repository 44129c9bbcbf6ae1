"""The envelope: binds the content of a record to its key, and encrypts it if keys are set.

::

    byte 0      format version, 2; 3 if a value is a reference; 4 if the session has an owner
    byte 1      0 plain, 2 sealed with AES-GCM
    plain:      first 4 characters of the record's key; 4 bytes CRC-32 of the key, the format
                version if it is 3 or 4, and the content; then the content
    sealed:     4 bytes key id, 12 bytes nonce, ciphertext and tag of the content; the tag also
                covers bytes 0 and 1, the record's key, and the times that never change:
                created_at and absolute_expires_at, for a pointer also the end of its grace

The checksum or the AES-GCM tag binds the payload to its record: the payload of another session, or
a truncated one, is refused. The checksum doesn't protect against an attacker who can write to the
store; encryption does. The content is a session's body (see ``payload``), the key of a pointer's
successor, or the content of a record of another kind, such as a roster.

Versions before the first release sealed without the times, with a 1 in byte 1. Such a payload is
refused, since an attacker with access to the store could extend its life.
"""

from __future__ import annotations

from contextlib import suppress
from zlib import crc32

from ..errors import UnreadableRecord
from .encryption import Cipher

# Payloads without references or owner use the formats that older versions can read.
FORMAT, WITH_REFERENCES, OWNED, NEWEST = 2, 3, 4, 4
_FORMATS = (FORMAT, WITH_REFERENCES, OWNED)
_PLAIN = {number: bytes((number, 0)) for number in _FORMATS}
_SEALED = {number: bytes((number, 2)) for number in _FORMATS}
_SEALED_WITHOUT_TIMES = (b"\2\1", b"\3\1")
#: The bytes that the checksum covers besides the key and the content, by the header of a plain
#: payload: the format version, since the versions differ in a single bit.
_COVERED = {header: b"" if n == FORMAT else bytes((n,)) for n, header in _PLAIN.items()}
_SEALED_HEADERS = frozenset(_SEALED.values())
NOT_ENCRYPTED = "not encrypted"
_CONTENT = 10  # the position in a plain payload

#: The record's created_at and absolute_expires_at. For a pointer, which is never renewed, also its
#: idle_expires_at.
Times = tuple[int, ...]


class Envelope:
    """Seals contents into payloads, and opens payloads.

    ``allow_plain`` accepts payloads that were written before encryption was turned on.
    """

    def __init__(self, cipher: Cipher | None, allow_plain: bool = False) -> None:
        self._cipher = cipher
        self._allow_plain = cipher is None or allow_plain

    def seal(self, key: str, content: bytes, times: Times, number: int = FORMAT) -> bytes:
        """The payload of the record under ``key``, in the format ``number``."""
        own = key.encode()
        if self._cipher is not None:
            header = _SEALED[number]
            return header + self._cipher.seal(content, own, header + _as_text(times))
        header = _PLAIN[number]
        checksum = crc32(content, crc32(own + _COVERED[header]))
        return b"".join((header, own[:4], checksum.to_bytes(4, "big"), content))

    def open(self, key: str, payload: bytes, times: Times) -> bytes:
        """The content. Raises ``UnreadableRecord`` unless it belongs to this record."""
        header = payload[:2]
        covered = _COVERED.get(header)
        if covered is None or not self._allow_plain:
            return self._open_sealed(header, key, payload, times)
        own, content = key.encode(), payload[_CONTENT:]
        checksum = crc32(content, crc32(own + covered))
        if payload[2:_CONTENT] != own[:4] + checksum.to_bytes(4, "big"):
            raise UnreadableRecord("corrupt", "checksum mismatch")
        return content

    def open_other(self, key: str, payload: bytes, times: Times) -> bytes:
        """The content of a record that isn't a session. Raises as ``open`` does.

        But a damaged format number counts as corrupt, and not as a newer format.
        """
        try:
            return self.open(key, payload, times)
        except UnreadableRecord as error:
            if error.reason == "newer format" and self._fits(key, payload, times):
                raise UnreadableRecord("corrupt", "damaged format number") from None
            raise

    def seal_again(self, key: str, payload: bytes, before: Times, after: Times) -> bytes:
        """The same payload for a record with other times. Raises ``UnreadableRecord``."""
        return self.seal(key, self.open(key, payload, before), after, payload[0])

    def _open_sealed(self, header: bytes, key: str, payload: bytes, times: Times) -> bytes:
        """Decrypt the content, or raise the reason why that isn't possible."""
        if header in _COVERED:
            raise UnreadableRecord("corrupt", f"{NOT_ENCRYPTED}; SESSION_ENCRYPTION_KEYS is set")
        if header in _SEALED_HEADERS:
            if self._cipher is None:
                raise UnreadableRecord("unknown encryption key", "SESSION_ENCRYPTION_KEYS is unset")
            return self._cipher.open(payload[2:], key.encode(), header + _as_text(times))
        if header in _SEALED_WITHOUT_TIMES:
            raise UnreadableRecord(
                "corrupt", "sealed by a version before the first release, without its times"
            )
        if len(header) == 2 and header[0] > NEWEST:
            raise UnreadableRecord("newer format", f"version {header[0]}; this one reads {NEWEST}")
        if len(header) == 2 and header[0] == 1:
            raise UnreadableRecord("corrupt", "format 1, of a version before the first release")
        raise UnreadableRecord("corrupt", "malformed payload")

    def _fits(self, key: str, payload: bytes, times: Times) -> bool:
        """Whether the payload would be valid with a known format number."""
        kinds = {b"\0": (_PLAIN, Envelope(None)), b"\2": (_SEALED, self)}
        headers, envelope = kinds.get(payload[1:2], ({}, self))
        for header in headers.values():
            with suppress(UnreadableRecord):
                envelope.open(key, header + payload[2:], times)
                return True
        return False


def _as_text(times: Times) -> bytes:
    return b"".join(b"%d " % time for time in times)
