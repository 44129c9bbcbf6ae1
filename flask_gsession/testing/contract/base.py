"""The base of all parts of the contract suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...stores.base import (
    Clock,
    Record,
    Store,
    is_store,
    milliseconds,
    new_version,
    unexpired,
)
from ...stores.parts import Upkeep
from ..clock import FakeClock


def changed(record: Record, payload: bytes = b"changed") -> Record:
    return record._replace(version=new_version(), payload=payload)


def live(store: Store, clock: Clock, record: Record) -> Record | None:
    return unexpired(store, record.key, milliseconds(clock))


@contextmanager
def raises(error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised")


def clean_up(upkeep: Upkeep, dry_run: bool) -> dict[str, int]:
    """The leftovers that a complete clean-up found."""
    found: dict[str, int] = {}
    cursor = ""
    while True:
        step, _, cursor = upkeep.tidy(cursor, 10, dry_run=dry_run)
        for kind, number in step.items():
            found[kind] = found.get(kind, 0) + number
        if not cursor:
            return found


class Contract:
    """Opens the store under test."""

    def open(self, clock: Clock) -> Store:
        """The store under test."""
        raise TypeError(
            f"{type(self).__name__} needs a method open(self, clock) that returns the store"
        )

    @contextmanager
    def _store(self) -> Iterator[tuple[Store, FakeClock]]:
        clock = FakeClock()
        store = self.open(clock)
        if not is_store(store):
            raise TypeError(
                f"open() of {type(self).__name__} must return the store, not {type(store).__name__}"
            )
        try:
            yield store, clock
        finally:
            store.close()
