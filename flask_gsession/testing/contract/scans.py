"""The contract of the parts ``scans`` and ``upkeep``."""

from __future__ import annotations

from ...stores.base import (
    Record,
    is_session_key,
)
from ...stores.parts import Scans, parts_of
from ..records import a_pointer, a_record
from .base import Contract, clean_up, live


def _scanned(scans: Scans, limit: int, begins: str = "") -> dict[str, Record]:
    """All records of a scan, by key."""
    found: dict[str, Record] = {}
    cursor = ""
    while True:
        records, _, cursor = scans.scan(cursor, limit, begins)
        found |= {record.key: record for record in records if is_session_key(record.key)}
        if not cursor:
            return found


class ScanContract(Contract):
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

    def test_a_scan_leaves_out_expired_records(self) -> None:
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

    def test_a_scan_by_key_prefix(self) -> None:
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
                clean_up(upkeep, dry_run)
                for record in (*records, new, pointer):
                    assert store.load(record.key) == record
            assert live(store, clock, short) is None
            if leases is not None:
                assert leases.extend(new.key, "one", 60_000)
