"""Large values: stored outside the session in blobs, frame by frame, in bounded memory.

A stored frame::

    plain       16 bytes keyed BLAKE2b of the frame, then the frame
    sealed      4 bytes key id, 12 bytes nonce, ciphertext and tag (AES-GCM)

Both checks cover the frame, its position, and whether it is the last one. The key for the plain
check is random for each blob, and is stored only in the session's record. So a truncated, altered,
swapped or moved frame is detected before any of it is used.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import io
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..errors import Gone, SessionTooLarge, StoreUnavailable, UnreadableRecord, ValueLost
from ..events import logger
from ..stores.parts import Blobs
from .encryption import Cipher
from .references import BYTES, Reference

FRAME = 256 * 1024  # bytes
_TAG = 16
_OVERHEAD = (_TAG, 32)  # bytes of a frame beyond its content: plain, sealed


class LargeValueStorage:
    """Writes and reads the large values of one application's sessions.

    ``allow_plain`` accepts values that were written before encryption was turned on.
    """

    def __init__(
        self, blobs: Blobs, *, max_bytes: int, cipher: Cipher | None, allow_plain: bool = False
    ) -> None:
        self.blobs = blobs
        #: bytes; the last frame may be shorter
        self.frame_bytes: int = getattr(blobs, "frame_bytes", FRAME)
        self.max_bytes = max_bytes
        self._cipher = cipher
        self._allow_plain = cipher is None or allow_plain

    def through(self, blobs: Blobs) -> LargeValueStorage:
        """A copy that uses another object for the same blobs, such as a wrapper."""
        other = copy.copy(self)
        other.blobs = blobs
        return other

    def check(self, path: str, length: int) -> None:
        """Raises ``SessionTooLarge`` if ``length`` is over the limit for one value."""
        if length > self.max_bytes:
            raise SessionTooLarge(
                path, f"{length} bytes or more; SESSION_MAX_VALUE_BYTES allows {self.max_bytes}"
            )

    def write(
        self,
        path: str,
        kind: int,
        pieces: Iterable[Any],
        expires_at: Callable[[], int],
        allowed: int = 0,
        room: int | None = None,
    ) -> Reference:
        """Write ``pieces`` of ``frame_bytes`` each into a new blob; the last may be shorter.

        ``allowed``: the bytes that the value may have, even if the setting allows fewer. ``room``:
        the bytes by which the large values of the session may still grow.

        Raises ``SessionTooLarge``, ``StoreUnavailable`` and the errors of ``pieces``, after
        discarding the blob. One round trip for each frame.
        """
        sealed, size = int(self._cipher is not None), self.frame_bytes
        name, key = secrets.token_bytes(16), secrets.token_bytes(16)
        blob = Reference(kind, sealed, name, key, b"", 0, size)
        digest, length, begun = hashlib.sha256(), 0, False
        try:
            for number, (piece, last) in enumerate(_with_last(pieces)):
                length += len(piece)
                if length > allowed:
                    self.check(path, length)
                if room is not None and length > room:
                    raise SessionTooLarge(
                        path,
                        f"{length} bytes or more; the large values of the session may grow by "
                        f"{room} more (SESSION_MAX_TOTAL_BYTES)",
                    )
                digest.update(piece)
                begun = True
                self.blobs.write_frame(
                    blob.name,
                    number * (size + _OVERHEAD[sealed]),
                    self._close(blob, number, last, piece),
                    expires_at(),
                )
        except BaseException as error:
            if isinstance(error, Gone):
                raise StoreUnavailable("a large value was removed while it was written") from None
            if begun and not isinstance(error, StoreUnavailable):  # otherwise it expires
                self.discard([blob.name], 0)
            raise
        return blob._replace(digest=digest.digest(), length=length)

    def frame(self, reference: Reference, number: int) -> bytes:
        """One frame of the content, in one round trip.

        Raises ``ValueLost`` and ``StoreUnavailable``.
        """
        last = number == reference.frames - 1
        return self._open(reference, number, last, self._stored(reference, number, last)[1])

    def stored(self, reference: Reference) -> Iterator[tuple[int, bytes]]:
        """The frames as they are stored, each with its offset. Raises as ``frame`` does."""
        for number in range(reference.frames):
            yield self._stored(reference, number, number == reference.frames - 1)

    def _stored(self, reference: Reference, number: int, last: bool) -> tuple[int, bytes]:
        size = reference.length - number * reference.frame if last else reference.frame
        overhead = _OVERHEAD[reference.sealed]
        offset = number * (reference.frame + overhead)
        try:
            stored = self.blobs.read_frame(reference.name, offset, size + overhead)
        except StoreUnavailable as error:
            logger.log(error.log_level, "A large value could not be read: %s", error)
            raise
        if stored is None:
            raise ValueLost("truncated" if number else "missing")
        if len(stored) != size + overhead:
            raise ValueLost("truncated" if len(stored) < size + overhead else "altered")
        return offset, stored

    def read(self, reference: Reference) -> bytes:
        """The whole content. Raises ``ValueLost`` and ``StoreUnavailable``."""
        return b"".join(self.frame(reference, number) for number in range(reference.frames))

    def renew(self, names: Sequence[str], expires_at: int) -> None:
        """Keep these blobs until ``expires_at``. Raises ``StoreUnavailable``."""
        self.blobs.renew_blobs(names, expires_at)

    def discard(self, names: Sequence[str], at: int) -> None:
        """Expire these blobs at ``at``. If that fails, they stay until their own expiry."""
        try:
            self.blobs.discard_blobs(names, at)
        except StoreUnavailable as error:
            logger.warning("Unused large values stay until they expire: %s", error)

    def _close(self, blob: Reference, number: int, last: bool, content: Any) -> bytes:
        place = _place(number, last)
        if self._cipher is not None:
            return self._cipher.seal(content, b"blob " + blob.blob, place)
        return b"".join((_check(blob.key, place, content), content))

    def _open(self, blob: Reference, number: int, last: bool, stored: bytes) -> bytes:
        place = _place(number, last)
        if blob.sealed:
            if self._cipher is None:
                raise ValueLost("unknown encryption key")
            try:
                return self._cipher.open(stored, b"blob " + blob.blob, place)
            except UnreadableRecord as error:
                known = error.reason == "corrupt"
                raise ValueLost("altered" if known else error.reason) from None
        if not self._allow_plain:
            raise ValueLost("not encrypted")
        content: bytes = stored[_TAG:]
        if not hmac.compare_digest(_check(blob.key, place, content), stored[:_TAG]):
            raise ValueLost("altered")
        return content


def stored_length(reference: Reference) -> int:
    """The bytes that the stored frames of a large value take."""
    return reference.length + reference.frames * _OVERHEAD[reference.sealed]


def pieces_of(content: Any, size: int) -> Iterator[Any]:
    """Bytes in memory, in pieces for ``LargeValueStorage.write``."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


def pieces_from(file: Any, size: int) -> Iterator[bytes]:
    """A binary file from its current position, in pieces for ``LargeValueStorage.write``."""
    if not hasattr(file, "read"):
        raise TypeError(f"attach() takes a binary file, not a value of type {type(file).__name__}")
    while True:
        parts, missing = [], size
        while missing:
            part = file.read(missing)
            if not isinstance(part, (bytes, bytearray, memoryview)):
                raise TypeError(
                    "attach() takes a binary file; read() returned a value of type "
                    f"{type(part).__name__}, not bytes"
                )
            if len(part) > missing:
                raise ValueError("read() returned more bytes than requested")
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        if parts:
            yield b"".join(parts)
        if missing:
            return


class ValueReader(io.BufferedIOBase):
    """A large value as a readable, seekable binary file, from ``session.open``.

    Holds one frame of the value in memory, 256 KB (4 MB if values are files). Doesn't need the
    session, so you can read it while a response is streamed. Reading raises ``ValueLost`` if the
    rest of the value is gone or altered, and ``StoreUnavailable`` if the store doesn't answer;
    data returned before that is intact. One round trip per frame.
    """

    def __init__(self, reference: Reference, frame: Callable[[int], bytes]) -> None:
        self._reference = reference
        self._read_frame = frame
        self._position = 0
        self._number, self._frame = 0, frame(0)

    @property
    def length(self) -> int:
        """The bytes of the value."""
        return self._reference.length

    @property
    def digest(self) -> str:
        """The SHA-256 of the value in hexadecimal digits, which you can use as an ETag."""
        return self._reference.digest.hex()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self.length if size is None or size < 0 else self._position + size
        parts = []
        while part := self.read1(end - self._position):
            parts.append(part)
        return b"".join(parts)

    def read1(self, size: int = -1) -> bytes:
        if self.closed:
            raise ValueError("this file is closed")
        if self._position >= self.length or size == 0:
            return b""
        number, start = divmod(self._position, self._reference.frame)
        if number != self._number:
            self._number, self._frame = number, self._read_frame(number)
        part = self._frame[start : start + size if size > 0 else None]
        self._position += len(part)
        return part

    def readline(self, size: int | None = -1) -> bytes:
        """One line. ``read`` and ``send_file`` are faster."""
        limit = self.length if size is None or size < 0 else size
        parts: list[bytes] = []
        while limit and (part := self.read1(limit)):
            end = part.find(b"\n") + 1
            if end:
                self._position -= len(part) - end
                parts.append(part[:end])
                break
            parts.append(part)
            limit -= len(part)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


def reader_of(content: bytes) -> ValueReader:
    """Bytes in memory as a ``ValueReader``."""
    digest, length = hashlib.sha256(content).digest(), len(content)
    reference = Reference(BYTES, 0, b"", b"", digest, length, max(1, length))
    return ValueReader(reference, lambda number: content)


def _place(number: int, last: bool) -> bytes:
    return number.to_bytes(8, "big") + (b"\1" if last else b"\0")


def _check(key: bytes, place: bytes, content: Any) -> bytes:
    return hashlib.blake2b(content, digest_size=_TAG, key=key + place).digest()


def _with_last(pieces: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each piece, and whether it is the last. Without pieces, one empty piece."""
    before: Any = None
    for piece in pieces:
        if before is not None:
            yield before, False
        before = piece
    yield b"" if before is None else before, True
