"""The contract for repeated writes: a repeat changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ...errors import Gone, KeyTaken, Stale
from ...stores.base import (
    Record,
    Store,
    milliseconds,
    unexpired,
)
from ..clock import FakeClock
from ..records import a_pointer, a_record
from .base import Contract, changed

_Written = tuple[list[str], Record, Callable[[], object]]


def _created(store: Store, clock: FakeClock) -> _Written:
    """Make a write. Returns its keys, the resulting session, and a function that repeats it."""
    record = a_record(clock)
    store.create(record)
    return [record.key], record, lambda: store.create(record)


def _saved(store: Store, clock: FakeClock) -> _Written:
    record = a_record(clock)
    saved = changed(record)
    store.create(record)
    store.save(saved, record.version)
    return [record.key], saved, lambda: store.save(saved, record.version)


def _shortened(store: Store, clock: FakeClock) -> _Written:
    record = a_record(clock)
    saved = changed(record)._replace(idle_expires_at=record.idle_expires_at - 5000)
    store.create(record)
    store.save(saved, record.version, shorten=True)
    return [record.key], saved, lambda: store.save(saved, record.version, shorten=True)


def _renewed(store: Store, clock: FakeClock) -> _Written:
    record = a_record(clock)
    later = record.idle_expires_at + 5000
    store.create(record)
    store.renew(record, later)
    session = record._replace(idle_expires_at=later)
    return [record.key], session, lambda: store.renew(record, later)


def _rotated(store: Store, clock: FakeClock) -> _Written:
    old, new = a_record(clock), a_record(clock)
    pointer = a_pointer(old, new)
    store.create(old)
    store.replace(old.key, new, old.version, pointer)
    return [new.key, old.key], new, lambda: store.replace(old.key, new, old.version, pointer)


def _rotated_without_grace(store: Store, clock: FakeClock) -> _Written:
    old, new = a_record(clock), a_record(clock)
    store.create(old)
    store.replace(old.key, new, old.version, None)
    return [new.key, old.key], new, lambda: store.replace(old.key, new, old.version, None)


def _deleted(store: Store, clock: FakeClock) -> _Written:
    old, new = a_record(clock), a_record(clock)
    store.create(old)
    store.replace(old.key, new, old.version, a_pointer(old, new))
    store.delete(old.key)
    return [new.key, old.key], new, lambda: store.delete(old.key)


def _deleted_in_a_version(store: Store, clock: FakeClock) -> _Written:
    record = a_record(clock)
    store.create(record)
    store.delete(record.key, record.version)
    return [record.key], record, lambda: store.delete(record.key, record.version)


_WRITES = (
    *(_created, _saved, _shortened, _renewed, _rotated, _rotated_without_grace),
    *(_deleted, _deleted_in_a_version),
)


def _nothing(store: Store, clock: FakeClock, keys: list[str], session: Record) -> list[str]:
    """Another process changes the session under these keys. Returns the keys that it adds."""
    return []


def _a_logout(store: Store, clock: FakeClock, keys: list[str], session: Record) -> list[str]:
    store.delete(session.key)
    return []


def _a_logout_by_the_old_token(
    store: Store, clock: FakeClock, keys: list[str], session: Record
) -> list[str]:
    store.delete(keys[-1])
    return []


def _a_rotation(
    store: Store, clock: FakeClock, keys: list[str], session: Record, grace: bool = True
) -> list[str]:
    new = a_record(clock)
    with suppress(Gone):
        pointer = a_pointer(session, new) if grace else None
        store.replace(session.key, new, session.version, pointer)
    return [new.key]


def _a_rotation_without_grace(
    store: Store, clock: FakeClock, keys: list[str], session: Record
) -> list[str]:
    return _a_rotation(store, clock, keys, session, grace=False)


def _a_rotation_and_a_logout(
    store: Store, clock: FakeClock, keys: list[str], session: Record
) -> list[str]:
    (new,) = _a_rotation(store, clock, keys, session)
    store.delete(new)
    return [new]


def _a_later_save(store: Store, clock: FakeClock, keys: list[str], session: Record) -> list[str]:
    with suppress(Gone):
        store.save(changed(session, b"later"), session.version)
    return []


def _a_renewal(store: Store, clock: FakeClock, keys: list[str], session: Record) -> list[str]:
    store.renew(session, session.idle_expires_at + 60_000)
    return []


def _its_end(store: Store, clock: FakeClock, keys: list[str], session: Record) -> list[str]:
    clock.advance(600)
    return []


_EVENTS = (
    *(_nothing, _a_logout, _a_logout_by_the_old_token, _a_rotation, _a_rotation_without_grace),
    *(_a_rotation_and_a_logout, _a_later_save, _a_renewal, _its_end),
)


def _all_unexpired(store: Store, clock: FakeClock, keys: list[str]) -> list[Record | None]:
    return [unexpired(store, key, milliseconds(clock)) for key in keys]


class RepeatContract(Contract):
    def test_a_repeat_undoes_no_later_write(self) -> None:
        """The reply to a write is lost, and other processes write before the repeat."""
        with self._store() as (store, clock):
            for write in _WRITES:
                for event in _EVENTS:
                    keys, session, repeat = write(store, clock)
                    keys = [*keys, *event(store, clock, keys, session)]
                    before = _all_unexpired(store, clock, keys)
                    with suppress(Gone, Stale, KeyTaken):
                        repeat()
                    after = _all_unexpired(store, clock, keys)
                    if write is _created and before[0] is None:
                        # This equals a write that came later, since no client had its token.
                        after[0] = None
                    assert after == before, (write.__name__, event.__name__)
