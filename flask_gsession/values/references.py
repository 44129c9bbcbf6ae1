"""References: stored in a session instead of a large value, which is in a blob.

A reference is an extension type of MessagePack, like a mark, and may have a mark::

    byte 0      0xc9
    bytes 1-4   how many bytes follow byte 5
    byte 5      14
    then        1 kind: 1 an encoded value, 2 bytes     1 encryption: 0 plain, 1 sealed
                16 name of the blob      16 key for the checksums of plain frames
                32 SHA-256 of the content     8 its length     4 length of a frame

Code that compares, merges or moves a value uses the bytes of the reference. ``holds`` recognises
equal content under another name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

from ..errors import UnreadableRecord
from .codec import REFERENCE
from .marks import MARK_BYTES, is_marked, split

#: The first byte of a reference, and of some other values.
EXT_32 = 0xC9
_DATA = Struct(">BB16s16s32sQI")
_HEAD = bytes((EXT_32,)) + _DATA.size.to_bytes(4, "big") + bytes((REFERENCE,))
VALUE, BYTES = 1, 2
_MAX_LENGTH = 2**40  # bytes, far beyond the maximum of SESSION_MAX_VALUE_BYTES
_BYTES_HEADS = {0xC4: 2, 0xC5: 3, 0xC6: 5}  # first byte and header length of bytes in MessagePack


class Reference(NamedTuple):
    """The location and the digest of a large value. ``frame`` and ``length`` are in bytes."""

    kind: int
    sealed: int
    blob: bytes
    key: bytes
    digest: bytes
    length: int
    frame: int

    def __repr__(self) -> str:
        return f"<Reference to {self.name}: {self.length} bytes>"

    @property
    def name(self) -> str:
        """The name of the blob."""
        return self.blob.hex()

    @property
    def frames(self) -> int:
        """The number of frames; an empty value has one empty frame."""
        return max(1, -(-self.length // self.frame))

    def pack(self) -> bytes:
        """The reference as an encoded value, without a mark."""
        return _HEAD + _DATA.pack(*self)

    @classmethod
    def of(cls, data: bytes) -> Reference:
        """Parse the data of the extension type. Raises ``UnreadableRecord``."""
        if not _is_well_formed(data):
            raise UnreadableRecord("corrupt", "a malformed reference")
        return cls(*_DATA.unpack(data))


#: A placeholder with the size of any other reference.
BLANK = Reference(BYTES, 0, b"", b"", b"", 0, 1).pack()


def _is_well_formed(data: bytes) -> bool:
    if len(data) != _DATA.size:
        return False
    kind, sealed, _, _, _, length, frame = _DATA.unpack(data)
    return kind in (VALUE, BYTES) and sealed <= 1 and frame > 0 and length <= _MAX_LENGTH


def refers(raw: bytes | None) -> bool:
    """Whether an encoded value, with a mark or without, is a reference.

    A malformed one isn't a reference, and can't be decoded.
    """
    if raw is None or raw[0] != EXT_32:
        return False
    start = MARK_BYTES if is_marked(raw) else 0
    return raw.startswith(_HEAD, start) and _is_well_formed(raw[start + len(_HEAD) :])


def length_of(raw: bytes | None) -> int:
    """The bytes of an encoded value without its mark, or of the large value; 0 for None."""
    if raw is None:
        return 0
    plain = split(raw)[1]
    return reference_in(raw).length if refers(raw) else len(plain)


def reference_in(raw: bytes) -> Reference:
    """The reference in an encoded value, with or without a mark."""
    return Reference.of(split(raw)[1][len(_HEAD) :])


def names_in(values: Iterable[bytes]) -> set[str]:
    """The names of the blobs that these encoded values refer to."""
    return {reference_in(raw).name for raw in values if refers(raw)}


def content_of(plain: bytes) -> tuple[int, memoryview]:
    """The kind and the content of an encoded value without a mark."""
    head = _BYTES_HEADS.get(plain[0])
    if head is None:
        return VALUE, memoryview(plain)
    return BYTES, memoryview(plain)[head:]


def holds(reference: bytes | None, raw: bytes | None) -> bool:
    """Whether ``reference`` refers to the same value as ``raw``, with the same mark."""
    if reference is None or raw is None or reference[0] != EXT_32:
        return False
    if not refers(reference) or refers(raw):
        return False
    (mark, _), (other, plain) = split(reference), split(raw)
    kind, content = content_of(plain)
    found = reference_in(reference)
    return (
        mark == other
        and (found.kind, found.length) == (kind, len(content))
        and found.digest == hashlib.sha256(content).digest()
    )
