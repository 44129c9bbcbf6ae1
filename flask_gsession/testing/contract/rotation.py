"""The contract of ``replace`` and of pointers."""

from __future__ import annotations

import threading

from ...errors import Gone, Stale
from ...stores.base import (
    Record,
)
from ..records import a_pointer, a_record
from .base import Contract, changed, live, raises


class RotationContract(Contract):
    def test_replace_leaves_a_pointer_for_the_grace(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock), a_record(clock)
            store.create(old)
            pointer = a_pointer(old, new)
            store.replace(old.key, new, old.version, pointer)
            assert store.load(old.key) == pointer
            assert store.load(new.key) == new
            clock.advance(10)
            assert live(store, clock, old) is None
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
            saved = changed(old)
            store.save(saved, old.version)
            with raises(Stale):
                store.replace(old.key, new, old.version, a_pointer(old, new))
            assert store.load(old.key) == saved
            assert store.load(new.key) is None

    def test_replace_refuses_an_ended_session(self) -> None:
        with self._store() as (store, clock):
            old, new = a_record(clock, idle=10), a_record(clock)
            with raises(Gone):
                store.replace(old.key, new, old.version, None)
            store.create(old)
            clock.advance(10)
            with raises(Gone):
                store.replace(old.key, new, old.version, None)
            assert live(store, clock, new) is None

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
            with raises(Gone):
                store.save(changed(old), old.version)
            with raises(Gone):
                store.save(changed(old), new.version)
            with raises(Gone):
                store.replace(old.key, a_record(clock), new.version, None)
            assert not store.renew(old, old.idle_expires_at + 1000)
            assert store.load(new.key) == new

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
