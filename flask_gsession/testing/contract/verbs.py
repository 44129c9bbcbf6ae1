"""The contract of ``create``, ``load``, ``save``, ``renew``, ``delete`` and ``close``."""

from __future__ import annotations

import threading
from typing import get_args, get_type_hints

from ...errors import Gone, KeyTaken, Stale
from ...stores.base import (
    Deleted,
    Record,
    is_store,
)
from ...stores.parts import Parts, parts_of
from ..records import a_pointer, a_record
from .base import Contract, changed, live, raises


class VerbContract(Contract):
    def test_bulk_deletes_equal_single_deletes(self) -> None:
        with self._store() as (store, clock):
            bulk = parts_of(store).bulk
            if bulk is None:
                return
            records = [a_record(clock) for _ in range(5)]
            for record in records:
                store.create(record)
            rotated, absent, kept = a_record(clock), a_record(clock), records.pop()
            store.replace(
                records[0].key, rotated, records[0].version, a_pointer(records[0], rotated)
            )
            keys = [absent.key, *(record.key for record in records)]
            deleted = bulk.delete_many(keys)
            assert [bool(each) for each in deleted] == [False, True, True, True, True]
            assert [each.record for each in deleted] == [None, rotated, *records[1:]]
            for record in (*records, rotated):
                assert live(store, clock, record) is None
            assert live(store, clock, kept) == kept
            assert not any(bulk.delete_many(keys))
            assert bulk.delete_many([]) == []

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
            with raises(KeyTaken):
                store.create(changed(record))
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
        """An import does this with a record that expired in this store, but was used elsewhere."""
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

    def test_load_uses_the_times_of_the_record(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            clock.advance(9.5)
            assert store.load(record.key) == record
            clock.advance(0.5)
            assert live(store, clock, record) is None

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
            assert live(store, clock, new) is None

    def test_save_replaces_all_fields(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            saved = changed(record)._replace(idle_expires_at=record.idle_expires_at + 5000)
            store.save(saved, record.version)
            assert store.load(record.key) == saved

    def test_save_sets_the_expiry(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            store.save(
                changed(record)._replace(idle_expires_at=record.idle_expires_at + 20_000),
                record.version,
            )
            clock.advance(29)
            assert store.load(record.key) is not None
            clock.advance(1)
            assert live(store, clock, record) is None

    def test_save_refuses_another_version(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            first = changed(record, b"first")
            store.save(first, record.version)
            with raises(Stale):
                store.save(changed(record, b"second"), record.version)
            assert store.load(record.key) == first

    def test_save_may_be_repeated(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            saved = changed(record)
            store.save(saved, record.version)
            store.save(saved, record.version)
            assert store.load(record.key) == saved

    def test_save_never_creates(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            with raises(Gone):
                store.save(changed(record), record.version)
            assert store.load(record.key) is None

    def test_save_never_brings_back_a_deleted_record(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            store.delete(record.key)
            with raises(Gone):
                store.save(changed(record), record.version)
            assert store.load(record.key) is None

    def test_save_never_brings_back_an_expired_record(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            clock.advance(10)
            later = changed(record)._replace(idle_expires_at=record.idle_expires_at + 60_000)
            with raises(Gone):
                store.save(later, record.version)
            assert live(store, clock, record) is None

    def test_save_keeps_a_later_idle_expiry(self) -> None:
        """Another request has renewed the session since it was loaded."""
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            later = record.idle_expires_at + 5000
            store.create(record)
            store.renew(record, later)
            saved = changed(record)
            store.save(saved, record.version)
            assert store.load(record.key) == saved._replace(idle_expires_at=later)
            clock.advance(14)
            earlier = record.absolute_expires_at - 3_590_000 + 4500  # half a second from now
            short = changed(saved)._replace(absolute_expires_at=earlier, idle_expires_at=earlier)
            store.save(short, saved.version)
            assert store.load(record.key) == short

    def test_save_may_shorten_the_idle_expiry(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock, idle=10)
            store.create(record)
            shorter = changed(record)._replace(idle_expires_at=record.idle_expires_at - 5000)
            store.save(shorter, record.version, shorten=True)
            assert store.load(record.key) == shorter
            longer = changed(shorter)._replace(idle_expires_at=record.idle_expires_at + 5000)
            store.save(longer, shorter.version, shorten=True)
            assert store.load(record.key) == longer
            clock.advance(14)
            assert live(store, clock, record) == longer
            clock.advance(1)
            assert live(store, clock, record) is None

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
            assert live(store, clock, record) is None

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
                assert live(store, clock, record) is None

    def test_renew_compares_with_the_stored_record(self) -> None:
        """The loaded record may be outdated: another request may have renewed the session."""
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
            saved = changed(record)
            store.save(saved, record.version)
            assert not store.renew(record, record.idle_expires_at + 1000)
            assert store.load(record.key) == saved

    def test_save_after_renew_is_not_stale(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            store.renew(record, record.idle_expires_at + 1000)
            store.save(changed(record), record.version)

    def test_delete_returns_whether_there_was_a_session(self) -> None:
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

    def test_delete_of_a_version(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            with raises(Gone):
                store.delete(record.key, record.version)
            store.create(record)
            saved = changed(record)
            store.save(saved, record.version)
            with raises(Stale):
                store.delete(record.key, record.version)
            assert store.load(record.key) == saved
            assert store.delete(record.key, saved.version)
            assert store.load(record.key) is None

    def test_one_of_parallel_saves_wins(self) -> None:
        with self._store() as (store, clock):
            record = a_record(clock)
            store.create(record)
            rivals = [changed(record, bytes([number])) for number in range(8)]
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
