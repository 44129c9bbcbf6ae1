"""How records, pointers and leases are written in Redis: one string for each session.

The string is a header of 31 bytes, then the payload::

    1 kind: 1 record, 2 pointer     8 version     6 created     6 idle expiry     6 absolute expiry
    4 CRC-32 of the session key and the 27 bytes before (times: milliseconds since 1970, big endian)

A pointer has its successor's key and a space before the payload.

The key's own time to live is set in the same step as every write. The CRC detects an answer for
another key, such as a connection gives after an interrupt left it out of step.
"""

from __future__ import annotations

from struct import Struct
from zlib import crc32

from ...errors import UnreadableRecord
from ..base import Record
from ..lease import Lease

_HEAD = Struct(">BQHIHIHI")  # the times in six bytes each, upper two and lower four
_WHOLE_HEAD = Struct(_HEAD.format + "I")  # with the CRC
_CHECKED, _HEADER = _HEAD.size, _WHOLE_HEAD.size
_LOW = 0xFFFF_FFFF
RECORD, _POINTER = 1, 2


class Names:
    """The keys of one prefix. The part in braces decides the slot in a Cluster."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
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


def header(kind: int, record: Record) -> bytes:
    created, idle, absolute = record[2:5]
    head = _HEAD.pack(
        kind,
        record.version,
        created >> 32,
        created & _LOW,
        idle >> 32,
        idle & _LOW,
        absolute >> 32,
        absolute & _LOW,
    )
    return head + crc32(head, crc32(record.key.encode("ascii"))).to_bytes(4, "big")


def pack(record: Record) -> bytes:
    if record.successor is None:
        return header(RECORD, record) + record.payload
    return header(_POINTER, record) + record.successor.encode("ascii") + b" " + record.payload


def unpack_any(key: str, value: bytes | None) -> Record | None:
    return None if value is None else unpack(key, value)


def unpack(key: str, value: bytes) -> Record:
    if len(value) < _HEADER:
        raise UnreadableRecord("corrupt", "malformed record")
    kind, version, c, created, i, idle, a, absolute, check = _WHOLE_HEAD.unpack_from(value)
    if kind != RECORD and kind != _POINTER:
        if _POINTER < kind < 32:
            raise UnreadableRecord("newer format", f"record kind {kind}")
        raise UnreadableRecord("corrupt", "malformed record")
    if crc32(value[:_CHECKED], crc32(key.encode("ascii"))) != check:
        raise UnreadableRecord("corrupt", "checksum mismatch")
    successor, payload = None, value[_HEADER:]
    if kind == _POINTER:
        text, _, payload = payload.partition(b" ")
        successor = text.decode("ascii", "replace")
    return Record(
        key,
        version,
        c << 32 | created,
        i << 32 | idle,
        a << 32 | absolute,
        payload,
        successor,
    )


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
