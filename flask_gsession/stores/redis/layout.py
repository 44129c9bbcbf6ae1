"""How records, pointers and leases are written in Redis: one string for each session.

The string is a header of 31 bytes, then the payload::

    1 kind: 1 record, 2 pointer     8 version     6 created     6 idle expiry     6 absolute expiry
    4 CRC-32 of the session key and the 27 bytes before (times: milliseconds since 1970, big endian)

A pointer has its successor's key and a space before the payload.

Every write also sets the key's time to live, in the same step. The CRC detects a reply for another
key, which a connection can return after an interrupt left it out of step.
"""

from __future__ import annotations

from struct import Struct
from typing import overload
from zlib import crc32

from ...errors import UnreadableRecord
from ..base import Record
from ..lease import Lease

_HEADER = Struct(">BQ6s6s6s")
_WHOLE_HEADER = Struct(_HEADER.format + "I")  # with the CRC
_SIZE = _WHOLE_HEADER.size
_CHECKED = _SIZE - 4
_RECORD, _POINTER = 1, 2
_number = int.from_bytes


class Names:
    """The keys of one prefix. The part in braces decides the slot in a Cluster."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.start = f"{prefix}{{".encode()  # of the keys of sessions, and of their leases
        self.channels = f"{prefix}wake:".encode()

    def record(self, key: str) -> bytes:
        """The key of a session's record, or of a pointer."""
        return f"{self.prefix}{{{key}}}".encode()

    def lease(self, key: str) -> bytes:
        """The key of a session's lease, with the queue for it."""
        return f"{self.prefix}{{{key}}}:lock".encode()

    def blob(self, name: str) -> bytes:
        """The key of a large value."""
        return f"{self.prefix}blob:{{{name}}}".encode()


def version(number: int) -> bytes:
    return number.to_bytes(8, "big")


def pack(record: Record) -> bytes:
    """The string that holds a record or pointer; without a payload, the header of a record."""
    key, version, created, idle, absolute, payload, successor = record
    kind = _RECORD
    if successor is not None:
        kind, payload = _POINTER, successor.encode("ascii") + b" " + payload
    head = _HEADER.pack(
        kind,
        version,
        created.to_bytes(6, "big"),
        idle.to_bytes(6, "big"),
        absolute.to_bytes(6, "big"),
    )
    return head + crc32(head, crc32(key.encode("ascii"))).to_bytes(4, "big") + payload


@overload
def unpack(key: str, value: None) -> None: ...
@overload
def unpack(key: str, value: bytes) -> Record: ...
def unpack(key: str, value: bytes | None) -> Record | None:
    """The record or pointer in this string, or None. Raises ``UnreadableRecord``."""
    if value is None:
        return None
    if type(value) is not bytes or len(value) < _SIZE:  # or a reply to another command
        raise UnreadableRecord("corrupt", "malformed record")
    kind, version, created, idle, absolute, check = _WHOLE_HEADER.unpack_from(value)
    if kind != _RECORD and kind != _POINTER:
        raise _unknown(kind)
    if crc32(value[:_CHECKED], crc32(key.encode("ascii"))) != check:
        raise UnreadableRecord("corrupt", "checksum mismatch")
    successor, payload = None, value[_SIZE:]
    if kind == _POINTER:
        text, _, payload = payload.partition(b" ")
        successor = text.decode("ascii", "replace")
    return Record(
        key,
        version,
        _number(created, "big"),
        _number(idle, "big"),
        _number(absolute, "big"),
        payload,
        successor,
    )


def _unknown(kind: int) -> UnreadableRecord:
    if _POINTER < kind < 32:
        return UnreadableRecord("newer format", f"record kind {kind}")
    return UnreadableRecord("corrupt", "malformed record")


def lease_of(text: bytes | None) -> Lease:
    if text is None:
        return Lease()
    try:
        first, *lines = text.decode("ascii", "replace").splitlines()
        owner, until, length = first.split(" ")
        waiters = (line.split(" ") for line in lines)
        return Lease(owner, int(until), int(length), {who: int(seen) for who, seen, _ in waiters})
    except ValueError:
        return Lease()  # junk, which the next owner replaces
