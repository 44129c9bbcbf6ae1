"""The mark: an optional header of an encoded value, with its expiry and schema version.

A marked value is an extension type of MessagePack. Its length always takes four bytes, so that the
mark can be read without decoding the value::

    byte 0          0xc9
    bytes 1 to 4    how many bytes follow byte 5
    byte 5          13
    bytes 6 to 11   when it expires, in milliseconds since 1970; 0: with its session
    bytes 12, 13    the version of the schema that checked it
    then            the encoded value

The mark is part of the value's bytes, so code that compares, merges or moves a value includes its
expiry. Most values have no mark; the payload notes whether any value has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_EXT_32, _CODE = 0xC9, 13
MARK_BYTES = 14
#: The year 10000, in milliseconds since 1970. All our times are earlier.
END_OF_TIME = 253_402_300_800_000
MAX_VERSION = 0xFFFF
_NO_TIME = END_OF_TIME.to_bytes(6, "big")


class Mark(NamedTuple):
    """``expires_at`` is in milliseconds since 1970; 0: with the session."""

    expires_at: int = 0
    version: int = 1


#: Stands for no mark.
PLAIN = Mark()


def marked(raw: bytes, mark: Mark) -> bytes:
    """``raw``, an encoded value without a mark, with ``mark``."""
    if mark == PLAIN:
        return raw
    return b"".join(
        (
            bytes((_EXT_32,)),
            (len(raw) + MARK_BYTES - 6).to_bytes(4, "big"),
            bytes((_CODE,)),
            mark.expires_at.to_bytes(6, "big"),
            mark.version.to_bytes(2, "big"),
            raw,
        )
    )


def is_marked(raw: bytes) -> bool:
    """Whether an encoded value has a mark. A value with a malformed mark can't be decoded."""
    return (
        raw[0] == _EXT_32
        and raw[5:6] == b"\x0d"
        and len(raw) > MARK_BYTES
        and int.from_bytes(raw[1:5], "big") == len(raw) - 6
        and raw[6:12] < _NO_TIME
    )


def split(raw: bytes) -> tuple[Mark, bytes]:
    """The mark of an encoded value, and the value without it."""
    if not is_marked(raw):
        return PLAIN, raw
    mark = Mark(int.from_bytes(raw[6:12], "big"), int.from_bytes(raw[12:MARK_BYTES], "big"))
    return mark, raw[MARK_BYTES:]


def expired(raw: bytes | None, now: int) -> bool:
    """Whether an encoded value has expired by ``now``, in milliseconds."""
    return raw is not None and is_marked(raw) and 0 < int.from_bytes(raw[6:12], "big") <= now


def unexpired(stored: Mapping[str, bytes], now: int) -> dict[str, bytes]:
    """The encoded values that have not expired by ``now``."""
    return {key: raw for key, raw in stored.items() if not expired(raw, now)}
