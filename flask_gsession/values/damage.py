"""Finds out whether a decoding error comes from malformed data or has another cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from msgspec import DecodeError

from ..errors import UnreadableRecord

#: The upper limit of SESSION_MAX_DEPTH.
DEEPEST = 200
_NESTING = (2, 3, 4, 15)  # the extension types of ``codec`` whose data is an array

#: The errors that malformed data raises. They may have another cause: see ``check_damage``.
DECODING_ERRORS = (DecodeError, ValueError, TypeError, ArithmeticError, RecursionError)


def check_damage(
    decode: Callable[[Any], Any], raw: bytes | memoryview, error: Exception
) -> NoReturn:
    """Raise ``UnreadableRecord`` if ``raw`` is malformed, or else ``error``.

    ``error`` was raised by ``decode(raw)``. If the data is well-formed, the stack was almost full,
    or a signal handler raised the error. To find out, this decodes the data again, or measures how
    deep it is nested.
    """
    if isinstance(error, RecursionError):
        if not _is_nested_beyond(raw, 2 * DEEPEST):
            raise error
    else:
        try:
            decode(raw)
        except DECODING_ERRORS as again:
            if isinstance(again, RecursionError):
                raise
        else:
            raise error
    raise UnreadableRecord("corrupt", type(error).__name__) from None


def _is_nested_beyond(raw: bytes | memoryview, limit: int) -> bool:
    """Whether containers are nested deeper than ``limit`` in these encoded values."""
    data = memoryview(raw)
    at, left = 0, [1]  # the number of remaining values at each level
    while at < len(data):
        while not left[-1]:
            left.pop()
            if not left:
                return False
        if len(left) - 1 > limit:
            return True
        left[-1] -= 1
        head = data[at]
        at += 1
        if head in _SIZES:
            digits, each, nesting = _SIZES[head]
            count = each * int.from_bytes(data[at : at + digits], "big")
            at += digits
        elif 0x80 <= head < 0xA0:
            count, nesting = (head & 15) * (1 if head & 0x10 else 2), True
        else:
            count = head & 31 if 0xA0 <= head < 0xC0 else _FIXED.get(head, 0)
            nesting = False
        if 0xC7 <= head <= 0xC9 or 0xD4 <= head <= 0xD8:
            code = data[at] if at < len(data) else 0
            at += 1
            count, nesting = (1, True) if code in _NESTING else (count, False)
        if nesting:
            left.append(count)
        else:
            at += count
    return False


# By the first byte in MessagePack. _SIZES: the size in bytes of the length or count that follows, a
# factor for it, and whether it counts values. _FIXED: how many bytes of data follow.
_SIZES = {
    **{first + n: (2**n, 1, False) for first in (0xC4, 0xC7, 0xD9) for n in range(3)},
    **{first + n: (2 << n, each, True) for first, each in ((0xDC, 1), (0xDE, 2)) for n in (0, 1)},
}
_FIXED = {0xCA: 4, 0xCB: 8} | {first + n: 2**n for first in (0xCC, 0xD0) for n in range(4)}
_FIXED |= {0xD4 + n: 2**n for n in range(5)}
