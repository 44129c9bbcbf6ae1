"""Reads pickles of plain data, without unpickling: nothing is imported and nothing is called.

``pickletools.genops`` parses a pickle; this module executes the few operations that build plain
data. It refuses a pickle with any operation that names a class, calls something or sets attributes,
and so every datetime, Decimal or object. Source: PEP 3154, PEP 574, and the comments of
``pickletools``.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

MAX_BYTES = 32 * 1024 * 1024
#: The limit for operations, which also bounds values, keys and containers.
MAX_OPERATIONS = 200_000
MAX_MEMO = 100_000
#: The limit for keys and values at every depth, each counted wherever it appears.
MAX_VALUES = 200_000
MAX_DEPTH = 200
#: The limit for different tuples and frozensets with the same hash. -1 and -2 have the same hash,
#: and so do all tuples of them. Building a dict with n such keys takes n * n comparisons.
MAX_COLLISIONS = 32

_MARK: Any = object()
_SCALARS = (str, bytes, int, float, bool, type(None))
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError, struct.error)


class RefusedPickle(Exception):
    """The pickle holds more than plain data, is malformed, or exceeds a limit."""


def read_pickle(data: bytes) -> Any:
    """The plain data in ``data``: None, bool, numbers, text, bytes, and containers of these.

    Protocols 0 to 5. Raises ``RefusedPickle``, whose text never holds a value.
    """
    if len(data) > MAX_BYTES:
        raise RefusedPickle(f"more than {MAX_BYTES} bytes")
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPERATIONS:
                raise RefusedPickle(f"more than {MAX_OPERATIONS} operations")
            if opcode.name == "STOP":
                break
            operation = _OPERATIONS.get(opcode.name)
            if operation is None:
                raise RefusedPickle(f"operation {opcode.name}")
            operation(machine, argument)
        value = machine.pop()
        if machine.stack:
            raise RefusedPickle("malformed")
    except _MALFORMED:
        raise RefusedPickle("malformed") from None
    check_extent(value)
    return value


def check_extent(value: Any) -> None:
    """Raises ``RefusedPickle`` if ``value`` is too deep, too large, or holds too many values.

    A value counts wherever it appears, so shared and circular values can't get around the limits.
    """
    count = size = 0
    level = [value]
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_VALUES:
            raise RefusedPickle(f"more than {MAX_VALUES} values")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                below += item
            elif isinstance(item, (str, bytes)):
                size += len(item)
            elif isinstance(item, int):
                size += item.bit_length() // 8
            if len(below) > MAX_VALUES:
                raise RefusedPickle(f"more than {MAX_VALUES} values")
        if size > MAX_BYTES:
            raise RefusedPickle(f"more than {MAX_BYTES} bytes")
        level = below
        if not level:
            return
    raise RefusedPickle(f"nested more than {MAX_DEPTH} deep")


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._by_hash: dict[int, list[Any]] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise RefusedPickle("malformed")
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Pop the items above the last mark, and the mark."""
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:  # raises IndexError without a mark
            at -= 1
            if at < 0:
                raise RefusedPickle("malformed")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def memoize(self, index: int) -> None:
        if len(self.memo) >= MAX_MEMO:
            raise RefusedPickle(f"more than {MAX_MEMO} memo entries")
        value = self.stack[-1]
        if value is _MARK:
            raise RefusedPickle("malformed")
        self.memo[index] = value

    def check_hashable(self, item: Any) -> None:
        """Refuse a key or member that is costly to hash or to compare.

        A deeply nested one would overflow the interpreter's stack, and many long integers have the
        same hash.
        """
        is_nested = isinstance(item, (tuple, frozenset))
        for each in item if is_nested else (item,):
            if not isinstance(each, _SCALARS):
                raise RefusedPickle(f"a {type(item).__name__} as a key or in a set")
            if isinstance(each, int) and each.bit_length() > 64:
                raise RefusedPickle("an int beyond 64 bits as a key or in a set")
        if is_nested:
            alike = self._by_hash.setdefault(hash(item), [])
            if item not in alike:
                alike.append(item)
            if len(alike) > MAX_COLLISIONS:
                raise RefusedPickle("keys with the same hash")

    def pairs(self, items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise RefusedPickle("malformed")
        for key in items[::2]:
            self.check_hashable(key)
        return dict(zip(items[::2], items[1::2], strict=True))

    def members(self, items: list[Any]) -> list[Any]:
        for item in items:
            self.check_hashable(item)
        return items

    def top(self, kind: type) -> Any:
        """The container on top of the stack, which must have exactly this type."""
        value = self.stack[-1]
        if type(value) is not kind:
            raise RefusedPickle("malformed")
        return value


def _nothing(machine: _Machine, argument: Any) -> None:
    pass


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _push_ascii(machine: _Machine, argument: str) -> None:
    if not argument.isascii():  # text or bytes of Python 2
        raise RefusedPickle("bytes of Python 2")
    machine.push(argument)


def _pushes(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.push(make())


def _tuple_of(size: int) -> Callable[[_Machine, Any], None]:
    def build(machine: _Machine, argument: Any) -> None:
        items = [machine.pop() for _ in range(size)]
        machine.push(tuple(reversed(items)))

    return build


def _append(machine: _Machine, argument: Any) -> None:
    item = machine.pop()
    machine.top(list).append(item)


def _appends(machine: _Machine, argument: Any) -> None:
    items = machine.since_mark()
    machine.top(list).extend(items)


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.top(dict).update(machine.pairs([key, value]))


def _set_items(machine: _Machine, argument: Any) -> None:
    items = machine.since_mark()
    machine.top(dict).update(machine.pairs(items))


def _add_items(machine: _Machine, argument: Any) -> None:
    items = machine.since_mark()
    machine.top(set).update(machine.members(items))


def _get(machine: _Machine, argument: int) -> None:
    machine.push(machine.memo[argument])


def _put(machine: _Machine, argument: int) -> None:
    machine.memoize(argument)


def _pop(machine: _Machine, argument: Any) -> None:
    machine.stack.pop()


def _pop_mark(machine: _Machine, argument: Any) -> None:
    machine.since_mark()


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
            *("FLOAT", "BINFLOAT"),
            *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        ),
        _push_argument,
    ),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _push_ascii),
    "NONE": _pushes(lambda: None),
    "NEWTRUE": _pushes(lambda: True),
    "NEWFALSE": _pushes(lambda: False),
    "MARK": _pushes(lambda: _MARK),
    "EMPTY_LIST": _pushes(list),
    "EMPTY_DICT": _pushes(dict),
    "EMPTY_SET": _pushes(set),
    "EMPTY_TUPLE": _pushes(tuple),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "DICT": lambda machine, _: machine.push(machine.pairs(machine.since_mark())),
    "FROZENSET": lambda machine, _: machine.push(frozenset(machine.members(machine.since_mark()))),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "ADDITEMS": _add_items,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine.memo)),
    "POP": _pop,
    "POP_MARK": _pop_mark,
}
