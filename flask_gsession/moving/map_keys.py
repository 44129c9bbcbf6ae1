"""Counts the arrays that are keys of maps in MessagePack, before it is decoded.

msgspec turns them into tuples. All tuples of -1 and -2 have the same hash, so building a map with n
such keys takes n * n comparisons.
"""

from __future__ import annotations

from .pickles import MAX_VALUES

MAX_ARRAY_KEYS = 1000
_MAPS = frozenset(bytes([head]) for head in (*range(0x81, 0x90), 0xDE, 0xDF))
# The number of bytes that hold the length, or the value itself, after each first byte.
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXT_LENGTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_COUNTS = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_SIZES = {0xCA: 4, 0xCB: 8} | {first + n: 2**n for first in (0xCC, 0xD0) for n in range(4)}
_SIZES |= {0xD4 + n: 2**n + 1 for n in range(5)}


def excess_in(data: bytes) -> str:
    """The limit that this map exceeds, in words; "" if it exceeds none. Malformed data is left to
    the decoder.
    """
    if data[:1] not in _MAPS:
        return ""
    at = values = array_keys = 0
    levels: list[tuple[int, bool]] = [
        (1, False)
    ]  # the number of pending values, and whether they belong to a map
    while at < len(data):
        while levels and not levels[-1][0]:
            levels.pop()
        if not levels:
            return ""
        values += 1
        if values > MAX_VALUES:
            return f"more than {MAX_VALUES} values"
        left, of_map = levels[-1]
        levels[-1] = left - 1, of_map
        head = data[at]
        at += 1
        count = -1
        if 0x80 <= head < 0xA0:
            count = head & 15
        elif head in _COUNTS:
            count = int.from_bytes(data[at : at + _COUNTS[head]], "big")
            at += _COUNTS[head]
        if count >= 0:
            if of_map and left % 2 == 0:
                array_keys += 1
                if array_keys > MAX_ARRAY_KEYS:
                    return f"more than {MAX_ARRAY_KEYS} arrays as keys of maps"
            is_map = head < 0x90 or head >= 0xDE
            levels.append((count * 2 if is_map else count, is_map))
        elif 0xA0 <= head < 0xC0:
            at += head & 31
        elif head in _LENGTHS:
            at += _LENGTHS[head] + int.from_bytes(data[at : at + _LENGTHS[head]], "big")
        elif head in _EXT_LENGTHS:
            at += _EXT_LENGTHS[head] + 1 + int.from_bytes(data[at : at + _EXT_LENGTHS[head]], "big")
        else:
            at += _SIZES.get(head, 0)
    return ""
