"""A set of weakly referenced objects that threads can change while others go through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class WeakObjects(Generic[T]):
    """Objects that others keep alive, by identity.

    Going through a ``WeakSet`` fails if another thread adds an object meanwhile.
    """

    def __init__(self) -> None:
        self._by_id: WeakValueDictionary[int, T] = WeakValueDictionary()

    def add(self, each: T) -> None:
        self._by_id[id(each)] = each

    def discard(self, each: T) -> None:
        self._by_id.pop(id(each), None)

    def clear(self) -> None:
        self._by_id.clear()

    def __iter__(self) -> Iterator[T]:
        for reference in self._by_id.valuerefs():  # a copy, made in one step
            each = reference()
            if each is not None:
                yield each
