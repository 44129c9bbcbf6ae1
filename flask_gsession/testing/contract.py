"""The contract suite that every store must pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, get_args, get_type_hints

from ..errors import Gone, KeyTaken, LeaseLost, QueueFull, Stale
from ..stores.base import (
    Clock,
    Deleted,
    Record,
    Store,
    is_session_key,
    is_store,
    milliseconds,
    new_version,
    unexpired,
)
from ..stores.lease import ASK_AGAIN, WAITER_LIFE
from ..stores.parts import Parts, Scans, Upkeep, parts_of
from .clock import FakeClock
from .records import a_blob, a_pointer, a_record


def _changed(record: Record, payload: bytes = b"changed") -> Record:
    return record._replace(version=new_version(), payload=payload)


def _unexpired(store: Store, clock: Clock, record: Record) -> Record | None:
    return unexpired(store, record.key, milliseconds(clock))


@contextmanager
def _raises(error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised")


def _scanned(scans: Scans, limit: int, begins: str = "") -> dict[str, Record]:
    """All records of a scan, by key."""
    found: dict[str, Record] = {}
    cursor = ""
    while True:
        records, _, cursor = scans.scan(cursor, limit, begins)
        found |= {record.key: record for record in records if is_session_key(record.key)}
        if not cursor:
            return found


def _tidied(upkeep: Upkeep, dry_run: bool) -> dict[str, int]:
    """The leftovers that a complete clean-up found."""
    found: dict[str, int] = {}
    cursor = ""
    while True:
        step, _, cursor = upkeep.tidy(cursor, 10, dry_run=dry_run)
        for kind, number in step.items():
            found[kind] = found.get(kind, 0) + number
        if not cursor:
            return found


_Written = tuple[list[str], Record, Callable[[], object]]


def _created(store: Store, clock: FakeClock) -> _Written:
    """A write: the keys it changes, the resulting session, and a function that repeats it."""
    record = a_record(clock)
    store.create(record)
    return [record.key], record, lambda: store.create(record)


def _saved(store: Store, clock: FakeClock) -> _Written:
    record = a_record(clock)
    saved = _changed(record)
    store.create(record)
    store.save(saved, record.version)
    return [record.key], saved, lambda: store.save(saved, record.version)


def _shortened(store: Store, clock: FakeClock) -> _Written:
    record = a_record(clock)
    saved = _changed(record)._replace(idle_expires_at=record.idle_expires_at - 5000)
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
        store.save(_changed(session, b"later"), session.version)
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


class StoreContract:
    """The promises of ``flask_gsession.stores.base.Store``, one test each.

    ``open`` returns a store that takes the time from ``clock``; it may share its records with
    earlier ones, since every test uses keys of its own.
    """

    def open(self, clock: Clock) -> Store:
        """The store under test."""
        raise TypeError("override open() in your subclass")

    @contextmanager
    def _store(self) -> Iterator[tuple[Store, FakeClock]]:
        clock = FakeClock()
        store = self.open(clock)
        try:
            yield store, clock
        finally:
            store.close()

    def test_is_a_store(self) -> None:
        with self._store() as (store, _):
            assert is_store(store)

    def test_each_part_has_its_methods(self) -> None:
        with self._store() as (store, _):
            for name, kind in get_type_hints(Parts).items():
                part, protocol = getattr(parts_of(store), name), get_args(kind)[0]
                methods = [method for method in vars(protocol) if not method.startswith("_")]
                missing = [method for method in methods if not hasattr(part, method)]
                assert part is None or not missing, f"the part {name} lacks {missing}"

    def test_a_created_record_loads_as_it_was(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            assert store.load(record.key) == record

    def test_an_empty_and_a_large_payload_load_as_they_were(self) -> None:
        with self._store() as (store, clock):
            for payload in (b"", b"\0", bytes(range(256)) * 4096):
                record = a_record(clock, payload=payload)
                store.create(record)
                assert store.load(record.key) == record

    def test_an_absent_record_is_none(self) -> None:
        with self._store() as (store, clock):
            assert store.load(a_record(clock).key) is None

    def test_create_refuses_a_taken_key(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            with _raises(KeyTaken):
                store.create(_changed(record))
            assert store.load(record.key) == record

    def test_create_takes_the_key_of_an_expired_record(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            clock.advance(10)
            later = a_record(clock, key=record.key)
            store.create(later)
            assert store.load(record.key) == later

    def test_create_replaces_an_expired_record_of_the_same_version(self) -> None:
        """An import does this with a record that has expired here and was used elsewhere."""
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            clock.advance(10)
            store.create(record._replace(idle_expires_at=record.idle_expires_at + 20_000))
            there = store.load(record.key)
            assert there is not None
            assert there.idle_expires_at == record.idle_expires_at + 20_000

    def test_create_may_be_repeated(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            store.create(record)
            assert store.load(record.key) == record

    def test_load_goes_by_the_times_of_the_record(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            clock.advance(9.5)
            assert store.load(record.key) == record
            clock.advance(0.5)
            assert _unexpired(store, clock, record) is None

    def test_load_returns_an_expired_record_unchanged_or_none(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock, idle=20), a_record(clock, idle=20)
            store.create(old)
            pointer = a_pointer(old, new)
            store.replace(old.key, new, old.version, pointer)
            clock.advance(20)
            assert store.load(old.key) in (pointer, None)
            assert store.load(new.key) in (new, None)
            store.delete(new.key)
            assert _unexpired(store, clock, new) is None

    def test_save_replaces_all_fields(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            saved = _changed(record)._replace(idle_expires_at=record.idle_expires_at + 5000)
            store.save(saved, record.version)
            assert store.load(record.key) == saved

    def test_save_sets_the_expiry(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            store.save(
                _changed(record)._replace(idle_expires_at=record.idle_expires_at + 20_000),
                record.version,
            )
            clock.advance(29)
            assert store.load(record.key) is not None
            clock.advance(1)
            assert _unexpired(store, clock, record) is None

    def test_save_refuses_another_version(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            first = _changed(record, b"first")
            store.save(first, record.version)
            with _raises(Stale):
                store.save(_changed(record, b"second"), record.version)
            assert store.load(record.key) == first

    def test_save_may_be_repeated(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            saved = _changed(record)
            store.save(saved, record.version)
            store.save(saved, record.version)
            assert store.load(record.key) == saved

    def test_save_never_creates(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            with _raises(Gone):
                store.save(_changed(record), record.version)
            assert store.load(record.key) is None

    def test_save_never_brings_back_the_deleted(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            store.delete(record.key)
            with _raises(Gone):
                store.save(_changed(record), record.version)
            assert store.load(record.key) is None

    def test_save_never_brings_back_the_expired(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            clock.advance(10)
            later = _changed(record)._replace(idle_expires_at=record.idle_expires_at + 60_000)
            with _raises(Gone):
                store.save(later, record.version)
            assert _unexpired(store, clock, record) is None

    def test_save_keeps_a_later_idle_expiry(self) -> None:
        """Another request has renewed the session since it was loaded."""
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            later = record.idle_expires_at + 5000
            store.create(record)
            store.renew(record, later)
            saved = _changed(record)
            store.save(saved, record.version)
            assert store.load(record.key) == saved._replace(idle_expires_at=later)
            clock.advance(14)
            earlier = record.absolute_expires_at - 3_590_000 + 4500  # half a second from now
            short = _changed(saved)._replace(absolute_expires_at=earlier, idle_expires_at=earlier)
            store.save(short, saved.version)
            assert store.load(record.key) == short

    def test_save_may_shorten_the_idle_expiry(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            shorter = _changed(record)._replace(idle_expires_at=record.idle_expires_at - 5000)
            store.save(shorter, record.version, shorten=True)
            assert store.load(record.key) == shorter
            longer = _changed(shorter)._replace(idle_expires_at=record.idle_expires_at + 5000)
            store.save(longer, shorter.version, shorten=True)
            assert store.load(record.key) == longer
            clock.advance(14)
            assert _unexpired(store, clock, record) == longer
            clock.advance(1)
            assert _unexpired(store, clock, record) is None

    def test_renew_moves_the_idle_expiry_only(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            assert store.renew(record, record.idle_expires_at + 5000)
            renewed = record._replace(idle_expires_at=record.idle_expires_at + 5000)
            assert store.load(record.key) == renewed
            clock.advance(12)
            assert store.load(record.key) == renewed

    def test_renew_never_passes_the_absolute_expiry(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10, absolute=20)
            store.create(record)
            assert store.renew(record, record.idle_expires_at + 60_000)
            clock.advance(19)
            assert store.load(record.key) is not None
            clock.advance(1)
            assert _unexpired(store, clock, record) is None

    def test_renew_never_shortens(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            store.renew(record, record.idle_expires_at - 5000)
            assert store.load(record.key) == record

    def test_renew_never_creates(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            assert not store.renew(record, record.idle_expires_at + 1000)
            assert store.load(record.key) is None

    def test_renew_never_brings_back(self) -> None:
        with self._store() as (store, clock):
            deleted, expired = a_record(clock), a_record(clock, idle=10)
            store.create(deleted)
            store.create(expired)
            store.delete(deleted.key)
            clock.advance(10)
            for record in (deleted, expired):
                assert not store.renew(record, record.idle_expires_at + 60_000)
                assert _unexpired(store, clock, record) is None

    def test_renew_compares_with_the_stored_record(self) -> None:
        """The loaded record doesn't count: another request may have renewed the session since."""
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            for later, kept in ((5000, 5000), (3000, 5000), (8000, 8000)):
                assert store.renew(record, record.idle_expires_at + later)
                there = store.load(record.key)
                assert there == record._replace(idle_expires_at=record.idle_expires_at + kept)
            clock.advance(12)
            assert store.renew(record, record.idle_expires_at + 9000)

    def test_renew_leaves_a_newer_version_alone(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            saved = _changed(record)
            store.save(saved, record.version)
            assert not store.renew(record, record.idle_expires_at + 1000)
            assert store.load(record.key) == saved

    def test_save_after_renew_is_not_stale(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            store.renew(record, record.idle_expires_at + 1000)
            store.save(_changed(record), record.version)

    def test_replace_leaves_a_pointer_for_the_grace(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            pointer = a_pointer(old, new)
            store.replace(old.key, new, old.version, pointer)
            assert store.load(old.key) == pointer
            assert store.load(new.key) == new
            clock.advance(10)
            assert _unexpired(store, clock, old) is None
            assert store.load(new.key) == new

    def test_replace_without_grace_leaves_nothing(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            store.replace(old.key, new, old.version, None)
            assert store.load(old.key) is None
            assert store.load(new.key) == new

    def test_replace_keeps_a_later_idle_expiry(self) -> None:
        with self._store() as (store, clock):
            for grace in (True, False):
                for shorten in (False, True):
                    old, new = a_record(clock, idle=10), a_record(clock, idle=5)
                    later = old.idle_expires_at + 5000
                    pointer = a_pointer(old, new) if grace else None
                    store.create(old)
                    store.renew(old, later)
                    store.replace(old.key, new, old.version, pointer, shorten=shorten)
                    kept = new.idle_expires_at if shorten else later
                    assert store.load(new.key) == new._replace(idle_expires_at=kept)
                    assert store.load(old.key) == pointer

    def test_replace_may_be_repeated(self) -> None:
        with self._store() as (store, clock):
            for grace in (True, False):
                old, new = a_record(clock), a_record(clock)
                store.create(old)
                pointer = a_pointer(old, new) if grace else None
                store.replace(old.key, new, old.version, pointer)
                store.replace(old.key, new, old.version, pointer)
                assert store.load(new.key) == new

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
                        # As if the write had come later: no client had its token.
                        after[0] = None
                    assert after == before, (write.__name__, event.__name__)

    def test_a_repeated_rotation_is_known_for_a_while(self) -> None:
        with self._store() as (store, clock):
            for pause in (0.001, 5):
                old, new = a_record(clock), a_record(clock)
                store.create(old)
                store.replace(old.key, new, old.version, None)
                clock.advance(pause)
                store.replace(old.key, new, old.version, None)
                assert store.load(new.key) == new
                assert store.load(old.key) is None
                assert not store.delete(old.key)
                store.create(old)  # its key is free
                assert store.load(old.key) == old

    def test_replace_refuses_another_version_and_changes_nothing(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            saved = _changed(old)
            store.save(saved, old.version)
            with _raises(Stale):
                store.replace(old.key, new, old.version, a_pointer(old, new))
            assert store.load(old.key) == saved
            assert store.load(new.key) is None

    def test_replace_refuses_what_is_gone(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock, idle=10), a_record(clock)
            with _raises(Gone):
                store.replace(old.key, new, old.version, None)
            store.create(old)
            clock.advance(10)
            with _raises(Gone):
                store.replace(old.key, new, old.version, None)
            assert _unexpired(store, clock, new) is None

    def test_a_race_of_replacements_has_one_successor(self) -> None:
        with self._store() as (store, clock):
            old = a_record(clock)
            store.create(old)
            rivals = [a_record(clock) for _ in range(8)]
            won: list[str] = []
            start = threading.Barrier(len(rivals))

            def rotate(record: Record) -> None:
                start.wait()
                try:
                    store.replace(
                        old.key,
                        record,
                        old.version,
                        a_pointer(old, record),
                    )
                except (Gone, Stale):
                    return
                won.append(record.key)

            threads = [threading.Thread(target=rotate, args=(record,)) for record in rivals]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            pointer = store.load(old.key)
            assert pointer is not None
            assert pointer.successor == won[0]
            assert [r.key for r in rivals if store.load(r.key) is not None] == won

    def test_a_pointer_takes_no_write(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            store.replace(old.key, new, old.version, a_pointer(old, new))
            with _raises(Gone):
                store.save(_changed(old), old.version)
            with _raises(Gone):
                store.save(_changed(old), new.version)
            with _raises(Gone):
                store.replace(old.key, a_record(clock), new.version, None)
            assert not store.renew(old, old.idle_expires_at + 1000)
            assert store.load(new.key) == new

    def test_delete_says_whether_there_was_one(self) -> None:
        with self._store() as (store, clock):
            record, expired = a_record(clock), a_record(clock, idle=10)
            assert not store.delete(record.key)
            store.create(record)
            store.create(expired)
            assert store.delete(record.key)
            assert not store.delete(record.key)
            assert store.load(record.key) is None
            clock.advance(10)
            assert not store.delete(expired.key)

    def test_delete_follows_pointers(self) -> None:
        with self._store() as (store, clock):
            first, second, third = (a_record(clock) for _ in range(3))
            store.create(first)
            store.replace(first.key, second, first.version, a_pointer(first, second))
            store.replace(second.key, third, second.version, a_pointer(second, third))
            assert store.delete(first.key)
            for record in (first, second, third):
                assert store.load(record.key) is None

    def test_delete_follows_many_pointers(self) -> None:
        """A session may be rotated many times within the grace of its first token."""
        with self._store() as (store, clock):
            first = last = a_record(clock)
            store.create(first)
            for _ in range(20):
                rotated = a_record(clock)
                store.replace(last.key, rotated, last.version, a_pointer(last, rotated))
                last = rotated
            assert store.delete(first.key)
            assert store.load(first.key) is None
            assert store.load(last.key) is None

    def test_delete_may_return_the_record(self) -> None:
        with self._store() as (store, clock):
            record, expired, old, new = (a_record(clock, idle=idle) for idle in (60, 1, 60, 60))

            def ended(key: str) -> Record | None:
                deleted = store.delete(key)
                if isinstance(deleted, Deleted):
                    assert deleted.found == bool(deleted.record)
                    return deleted.record
                return {record.key: record, old.key: new}.get(key) if deleted else None

            assert ended(record.key) is None
            for each in (record, expired, old):
                store.create(each)
            store.replace(old.key, new, old.version, a_pointer(old, new))
            clock.advance(1)
            assert ended(record.key) == record
            assert ended(record.key) is None
            assert ended(expired.key) is None
            assert ended(old.key) == new
            assert [store.load(each.key) for each in (record, old, new)] == [None] * 3

    def test_delete_leaves_the_successor_of_an_expired_pointer(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            store.replace(old.key, new, old.version, a_pointer(old, new, 0.01))
            clock.advance(1)
            assert not store.delete(old.key)
            assert store.load(new.key) == new

    def test_delete_ends_in_a_circle_of_pointers(self) -> None:
        with self._store() as (store, clock):
            first, second = a_record(clock), a_record(clock)
            for one, other in ((first, second), (second, first)):
                store.create(one)
                store.replace(one.key, a_record(clock), one.version, a_pointer(one, other))
            assert not store.delete(first.key)

    def test_delete_of_a_version(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            with _raises(Gone):
                store.delete(record.key, record.version)
            store.create(record)
            saved = _changed(record)
            store.save(saved, record.version)
            with _raises(Stale):
                store.delete(record.key, record.version)
            assert store.load(record.key) == saved
            assert store.delete(record.key, saved.version)
            assert store.load(record.key) is None

    def test_one_of_parallel_saves_wins(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            rivals = [_changed(record, bytes([number])) for number in range(8)]
            won: list[Record] = []
            start = threading.Barrier(len(rivals))

            def save(rival: Record) -> None:
                start.wait()
                try:
                    store.save(rival, record.version)
                except Stale:
                    return
                won.append(rival)

            threads = [threading.Thread(target=save, args=(rival,)) for rival in rivals]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            assert store.load(record.key) == won[0]

    def test_a_closed_store_may_be_used_again(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.close()
            store.close()
            store.create(record)
            assert store.load(record.key) == record

    # -- of stores with the part ``scans`` or ``upkeep``

    def test_a_scan_returns_every_record(self) -> None:
        with self._store() as (store, clock):
            scans = parts_of(store).scans
            if scans is None:
                return
            records = [a_record(clock) for _ in range(30)]
            old, new = a_record(clock), a_record(clock)
            for record in (*records, old):
                store.create(record)
            pointer = a_pointer(old, new)
            store.replace(old.key, new, old.version, pointer)
            store.delete(records.pop().key)
            found = _scanned(scans, 7)
            for record in (*records, new, pointer):
                assert found[record.key] == record

    def test_a_scan_leaves_out_the_expired(self) -> None:
        with self._store() as (store, clock):
            scans = parts_of(store).scans
            if scans is None:
                return
            short, long = a_record(clock, idle=10), a_record(clock)
            store.create(short)
            store.create(long)
            clock.advance(10)
            found = _scanned(scans, 100)
            assert long.key in found
            assert short.key not in found

    def test_a_scan_by_the_beginning_of_the_key(self) -> None:
        with self._store() as (store, clock):
            scans = parts_of(store).scans
            if scans is None:
                return
            record, other = a_record(clock), a_record(clock)
            store.create(record)
            store.create(other)
            for length in (8, 43):
                assert _scanned(scans, 100, record.key[:length]) == {record.key: record}

    def test_a_scan_survives_parallel_writes(self) -> None:
        with self._store() as (store, clock):
            scans = parts_of(store).scans
            if scans is None:
                return
            stay = [a_record(clock) for _ in range(20)]
            leave = [a_record(clock) for _ in range(20)]
            for record in (*stay, *leave):
                store.create(record)
            cursor, found = "", set()
            while True:
                page = scans.scan(cursor, 3)
                found |= {record.key for record in page.records}
                if leave:
                    store.delete(leave.pop().key)
                    store.create(a_record(clock))
                cursor = page.cursor
                if not cursor:
                    break
            assert {record.key for record in stay} <= found

    def test_a_clean_up_keeps_live_records(self) -> None:
        with self._store() as (store, clock):
            upkeep, leases = parts_of(store).upkeep, parts_of(store).leases
            if upkeep is None:
                return
            records = [a_record(clock) for _ in range(5)]
            short, old, new = a_record(clock, idle=10), a_record(clock), a_record(clock)
            for record in (*records, short, old):
                store.create(record)
            pointer = a_pointer(old, new, grace=30)
            store.replace(old.key, new, old.version, pointer)
            if leases is not None:
                leases.acquire(new.key, "one", 60_000, 0)
            clock.advance(10)
            for dry_run in (True, False):
                _tidied(upkeep, dry_run)
                for record in (*records, new, pointer):
                    assert store.load(record.key) == record
            assert _unexpired(store, clock, short) is None
            if leases is not None:
                assert leases.extend(new.key, "one", 60_000)

    # -- of stores with the part ``leases``

    @contextmanager
    def _leasing(self) -> Iterator[tuple[Store, Any, FakeClock, Record]]:
        """A store, its leases (None without that part) and a stored record."""
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            yield store, parts_of(store).leases, clock, record

    def test_a_lease_has_one_holder(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            assert leases.acquire(record.key, "one", 10_000, 10) == 0
            assert 0 < leases.acquire(record.key, "two", 10_000, 10) <= ASK_AGAIN
            assert leases.release(record.key, "one") is True
            assert leases.acquire(record.key, "two", 10_000, 10) == 0

    def test_acquire_may_be_repeated(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            assert leases.acquire(record.key, "one", 10_000, 10) == 0
            assert leases.acquire(record.key, "two", 10_000, 1) > 0
            clock.advance(1)
            assert leases.acquire(record.key, "two", 10_000, 1) > 0
            assert leases.acquire(record.key, "one", 10_000, 10) == 0

    def test_a_repeat_takes_no_lease_from_another_owner(self) -> None:
        with self._leasing() as (store, leases, _, record):
            if leases is None:
                return
            key = record.key
            leases.acquire(key, "one", 10_000, 10)
            leases.extend(key, "one", 10_000)
            leases.release(key, "one")
            assert leases.acquire(key, "two", 10_000, 10) == 0
            assert leases.acquire(key, "one", 10_000, 10) > 0
            assert leases.extend(key, "one", 10_000) is False
            assert leases.release(key, "one") is False
            assert leases.extend(key, "two", 10_000) is True
            store.delete(key)
            with _raises(Gone):
                leases.acquire(key, "two", 10_000, 10)
            assert leases.extend(key, "two", 10_000) is False
            assert leases.release(key, "two") is False
            assert store.load(key) is None

    def test_a_lease_runs_out(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            assert leases.acquire(record.key, "one", 500, 10) == 0
            assert leases.acquire(record.key, "two", 500, 10) == 500
            clock.advance(0.5)
            assert leases.acquire(record.key, "two", 500, 10) == 0
            assert leases.release(record.key, "one") is False
            assert leases.extend(record.key, "two", 500) is True

    def test_extend_lets_a_lease_run_longer(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            assert leases.extend(record.key, "two", 5000) is False
            clock.advance(4)
            assert leases.extend(record.key, "one", 5000) is True
            clock.advance(4)
            assert leases.acquire(record.key, "two", 5000, 10) > 0
            clock.advance(1)
            assert leases.extend(record.key, "one", 5000) is False
            assert leases.acquire(record.key, "two", 5000, 10) == 0

    def test_a_lease_ends_after_a_clock_was_set_back(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            leases.acquire(record.key, "gone", 5000, 10)
            clock.advance(-4)  # another host's clock; this frees no lease
            assert leases.acquire(record.key, "two", 5000, 10) > 0
            clock.advance(-3600)
            assert leases.extend(record.key, "one", 5000) is True  # no other owner took it
            clock.advance(-3600)
            assert leases.acquire(record.key, "three", 5000, 10) == 0
            with _raises(LeaseLost):
                leases.save(_changed(record), record.version, "one")
            leases.release(record.key, "three")

    def test_extend_counts_from_now(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 500, 10)
            assert leases.extend(record.key, "one", 60_000) is True
            assert leases.acquire(record.key, "two", 500, 10) > 0
            assert leases.extend(record.key, "one", 500) is True
            clock.advance(-5)
            assert leases.acquire(record.key, "three", 500, 10) == 0

    def test_only_the_holder_releases_and_once(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            assert leases.release(record.key, "one") is False
            leases.acquire(record.key, "one", 5000, 10)
            assert leases.release(record.key, "two") is False
            assert leases.acquire(record.key, "two", 5000, 1) > 0
            assert leases.release(record.key, "one") is True
            assert leases.release(record.key, "one") is False
            assert leases.acquire(record.key, "two", 5000, 10) == 0
            clock.advance(5)
            assert leases.release(record.key, "two") is False

    def test_waiters_take_turns(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            for owner in ("one", "two", "three", "two"):
                leases.acquire(record.key, owner, 5000, 10)
            leases.release(record.key, "one")
            assert leases.acquire(record.key, "three", 5000, 10) > 0
            assert leases.acquire(record.key, "new", 5000, 10) > 0
            assert leases.acquire(record.key, "two", 5000, 10) == 0
            leases.release(record.key, "two")
            assert leases.acquire(record.key, "new", 5000, 10) > 0
            assert leases.acquire(record.key, "three", 5000, 10) == 0

    def test_a_silent_waiter_loses_its_place(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            for owner in ("one", "two", "three"):
                leases.acquire(record.key, owner, 60_000, 10)
            clock.advance(WAITER_LIFE / 1000 - 0.5)
            leases.acquire(record.key, "three", 60_000, 10)
            leases.release(record.key, "one")
            assert leases.acquire(record.key, "three", 60_000, 10) == 500
            clock.advance(0.5)
            assert leases.acquire(record.key, "three", 60_000, 10) == 0
            assert leases.acquire(record.key, "two", 60_000, 10) > 0

    def test_a_full_queue_refuses(self) -> None:
        with self._leasing() as (_, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 60_000, 0)
            with _raises(QueueFull):
                leases.acquire(record.key, "two", 60_000, 0)
            for owner in ("two", "three", "three"):
                assert leases.acquire(record.key, owner, 60_000, 2) > 0
            with _raises(QueueFull):
                leases.acquire(record.key, "four", 60_000, 2)
            leases.release(record.key, "two")
            assert leases.acquire(record.key, "four", 60_000, 2) > 0
            clock.advance(WAITER_LIFE / 1000)
            assert leases.acquire(record.key, "five", 60_000, 2) > 0

    def test_a_lease_needs_a_live_session(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            old, new, short = a_record(clock), a_record(clock), a_record(clock, idle=10)
            with _raises(Gone):
                leases.acquire(old.key, "one", 5000, 10)
            store.create(old)
            store.create(short)
            assert leases.acquire(short.key, "one", 60_000, 10) == 0
            store.replace(old.key, new, old.version, a_pointer(old, new))
            with _raises(Gone):
                leases.acquire(old.key, "one", 5000, 10)
            clock.advance(10)
            with _raises(Gone):
                leases.acquire(short.key, "two", 5000, 10)
            with _raises(Gone):
                leases.save(_changed(short), short.version, "one")
            assert _unexpired(store, clock, short) is None
            store.delete(new.key)
            leases.extend(record.key, "one", 5000)
            with _raises(Gone):
                leases.acquire(new.key, "one", 5000, 10)
            assert _unexpired(store, clock, new) is None

    def test_a_lease_ends_with_its_session(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            leases.acquire(old.key, "one", 5000, 10)
            store.replace(old.key, new, old.version, a_pointer(old, new))
            assert not leases.extend(old.key, "one", 5000)
            assert not leases.release(old.key, "one")
            assert leases.acquire(new.key, "two", 5000, 10) == 0
            leases.acquire(record.key, "one", 5000, 10)
            leases.acquire(record.key, "two", 5000, 10)
            store.delete(record.key)
            assert not leases.extend(record.key, "one", 5000)
            store.create(record)
            assert leases.acquire(record.key, "three", 5000, 10) == 0

    def test_a_write_under_the_lease(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            saved = _changed(record)
            leases.save(saved, record.version, "one")
            leases.save(saved, record.version, "one")
            assert store.load(record.key) == saved
            with _raises(Stale):
                leases.save(_changed(record), record.version, "one")
            new = a_record(clock)
            leases.replace(record.key, new, saved.version, None, "one")
            leases.replace(record.key, new, saved.version, None, "one")
            assert store.load(new.key) == new
            leases.acquire(new.key, "one", 5000, 10)
            assert leases.delete(new.key, new.version, "one")

    def test_a_write_needs_the_lease_that_it_names(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return

            def refused() -> None:
                new = a_record(clock)
                with _raises(LeaseLost):
                    leases.save(_changed(record), record.version, "one")
                with _raises(LeaseLost):
                    leases.save(_changed(record), new_version(), "one")
                with _raises(LeaseLost):
                    leases.replace(record.key, new, record.version, a_pointer(record, new), "one")
                with _raises(LeaseLost):
                    leases.replace(record.key, new, record.version, None, "one")
                with _raises(LeaseLost):
                    leases.delete(record.key, record.version, "one")
                assert store.load(record.key) == record
                assert store.load(new.key) is None

            refused()  # never acquired
            leases.acquire(record.key, "one", 5000, 10)
            clock.advance(5)
            refused()  # expired, and no other owner has it
            leases.acquire(record.key, "two", 5000, 10)
            refused()
            leases.acquire(record.key, "one", 5000, 10)
            refused()  # waiting is not holding
            leases.release(record.key, "two")
            refused()
            leases.acquire(record.key, "one", 5000, 10)
            leases.release(record.key, "one")
            refused()
            with _raises(Gone):
                leases.save(_changed(a_record(clock)), record.version, "one")

    def test_a_stored_write_is_recognised_after_its_lease(self) -> None:
        with self._leasing() as (store, leases, clock, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            saved = _changed(record)
            leases.save(saved, record.version, "one")
            clock.advance(5)
            leases.save(saved, record.version, "one")
            assert store.load(record.key) == saved

    def test_a_write_without_a_lease_ignores_leases(self) -> None:
        with self._leasing() as (store, leases, _, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 5000, 10)
            saved = _changed(record)
            store.save(saved, record.version)
            assert store.renew(saved, saved.idle_expires_at + 1000)
            leases.save(_changed(saved), saved.version, "one")
            assert store.delete(record.key)

    def test_a_wait_ends_with_the_release(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            leases.acquire(record.key, "one", 60_000, 10)
            for _ in range(2):  # the first wait may need to set up a connection
                assert leases.acquire(record.key, "two", 60_000, 10) > 0
                leases.wait_for_release(record.key, "two", 0.01)
            done: list[float] = []

            def wait() -> None:
                end = time.monotonic() + 30
                while time.monotonic() < end:
                    leases.wait_for_release(record.key, "two", end - time.monotonic())
                    if leases.acquire(record.key, "two", 60_000, 10) == 0:
                        done.append(time.monotonic())
                        return

            waiter = threading.Thread(target=wait)
            waiter.start()
            time.sleep(0.05)
            assert not done
            released = time.monotonic()
            leases.release(record.key, "one")
            waiter.join()
            assert done[0] - released < 20

    def test_one_of_parallel_acquisitions_wins(self) -> None:
        with self._leasing() as (_, leases, _, record):
            if leases is None:
                return
            start = threading.Barrier(8)
            answers: list[int] = []

            def acquire(number: int) -> None:
                start.wait()
                answers.append(leases.acquire(record.key, f"owner{number}", 60_000, 10))

            threads = [threading.Thread(target=acquire, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert answers.count(0) == 1

    # -- of stores with the part ``blobs``

    @contextmanager
    def _with_blobs(self) -> Iterator[tuple[Any, FakeClock]]:
        """The place for large values; None without that part."""
        with self._store() as (store, clock):
            yield parts_of(store).blobs, clock

    def test_a_blob_reads_as_it_was_written(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            end = milliseconds(clock) + 60_000
            frames = {0: bytes(range(256)) * 1024, 262_144: b"\0" * 262_144, 524_288: b"end"}
            one, other = a_blob(), a_blob()
            for offset, frame in frames.items():
                blobs.write_frame(one, offset, frame, end)
            blobs.write_frame(other, 0, b"\0", end)
            for offset, frame in frames.items():
                assert blobs.read_frame(one, offset, len(frame)) == frame
            assert blobs.read_frame(other, 0, 1) == b"\0"

    def test_a_frame_that_was_not_written_is_none(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name = a_blob()
            assert blobs.read_frame(name, 0, 10) is None
            blobs.write_frame(name, 0, b"0123456789", milliseconds(clock) + 60_000)
            assert blobs.read_frame(name, 10, 10) is None
            assert blobs.read_frame(a_blob(), 0, 10) is None

    def test_a_frame_may_be_written_again(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name, end = a_blob(), milliseconds(clock) + 60_000
            for offset, frame in ((0, b"first"), (0, b"first"), (5, b"second"), (5, b"second")):
                blobs.write_frame(name, offset, frame, end)
            blobs.write_frame(name, 0, b"first", end)  # a late duplicate
            assert blobs.read_frame(name, 0, 5) == b"first"
            assert blobs.read_frame(name, 5, 6) == b"second"

    def test_a_later_frame_creates_no_blob(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name = a_blob()
            with suppress(Gone):
                blobs.write_frame(name, 5, b"second", milliseconds(clock) + 60_000)
            assert blobs.read_frame(name, 0, 5) is None

    def test_a_blob_stays_until_its_expiry(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            names = [a_blob() for _ in range(3)]
            for name in names:
                blobs.write_frame(name, 0, b"frame", milliseconds(clock) + 10_000)
            blobs.renew_blobs(names[1:], milliseconds(clock) + 60_000)
            blobs.renew_blobs(names[2:], milliseconds(clock) + 20_000)  # its current expiry
            clock.advance(9)
            assert [blobs.read_frame(name, 0, 5) for name in names] == [b"frame"] * 3
            clock.advance(50)
            assert [blobs.read_frame(name, 0, 5) for name in names[1:]] == [b"frame"] * 2

    def test_a_renewal_creates_no_blob(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            name = a_blob()
            blobs.renew_blobs([name], milliseconds(clock) + 60_000)
            assert blobs.read_frame(name, 0, 5) is None

    def test_discarded_blobs_are_removed(self) -> None:
        with self._with_blobs() as (blobs, clock):
            if blobs is None:
                return
            now, names = milliseconds(clock), [a_blob() for _ in range(4)]
            for name in names:
                for offset in (0, 5):
                    blobs.write_frame(name, offset, b"frame", now + 60_000)
            blobs.discard_blobs(names[:2], now)
            blobs.discard_blobs([names[2]], now + 30_000)
            blobs.discard_blobs([names[2]], now + 90_000)  # it expires earlier
            blobs.discard_blobs([a_blob(), names[0]], now)
            for offset in (0, 5):
                found = [blobs.read_frame(name, offset, 5) for name in names]
                assert found == [None, None, b"frame", b"frame"]

    def test_a_clean_up_removes_expired_blobs(self) -> None:
        with self._store() as (store, clock):
            blobs, upkeep = parts_of(store).blobs, parts_of(store).upkeep
            if blobs is None or upkeep is None:
                return
            end = milliseconds(clock) + 10_000
            short, long = a_blob(), a_blob()
            for name in (short, long):
                blobs.write_frame(name, 0, b"frame", end)
                blobs.write_frame(name, 5, b"frame", end)
            blobs.renew_blobs([long], end + 10_000)
            clock.advance(10)
            if not _tidied(upkeep, dry_run=False).get("expired large values"):
                return  # the server removes them by itself
            clock.advance(-10)
            assert blobs.read_frame(short, 0, 5) is None
            assert blobs.read_frame(short, 5, 5) is None
            assert blobs.read_frame(long, 5, 5) == b"frame"
