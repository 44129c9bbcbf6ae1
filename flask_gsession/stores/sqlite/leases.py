"""The part ``leases`` of an SQLite store: a table beside the records."""

from __future__ import annotations

import sqlite3

from ...errors import Gone
from ..base import Deleted, Record
from ..lease import poll
from ..parts import Leases
from .file import in_transaction, on_connection
from .records import Records


class SQLiteLeases(Leases):
    """Lends sessions."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.file = records.file
        self.layout = records.layout

    def save(
        self, record: Record, expected_version: int, lease: str, *, shorten: bool = False
    ) -> None:
        self._records.save(record, expected_version, lease, shorten=shorten)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str,
        *,
        shorten: bool = False,
    ) -> None:
        self._records.replace(key, record, expected_version, pointer, lease, shorten=shorten)

    def delete(self, key: str, expected_version: int, lease: str) -> Deleted:
        return self._records.delete(key, expected_version, lease)

    @in_transaction()
    def acquire(
        self, db: sqlite3.Connection, key: str, owner: str, lease_ms: int, max_waiters: int
    ) -> int:
        now = self.layout.now()  # read after waiting for the database
        record = self.layout.select(db, key)
        if record is None or not record.is_live(now):
            raise Gone
        lease = self.layout.lease(db, key)
        answer = lease.acquire(owner, now, lease_ms, max_waiters)
        self.layout.put_lease(db, key, lease)
        return answer

    @on_connection
    def extend(self, db: sqlite3.Connection, key: str, owner: str, lease_ms: int) -> bool:
        now = self.layout.now()
        done = db.execute(
            "UPDATE gsession_lease SET until = ?, length = ? "
            "WHERE key = ? AND owner = ? AND until > ?",
            (now + lease_ms, lease_ms, self.layout.prefix + key, owner, now),
        )
        return done.rowcount == 1

    @in_transaction()
    def release(self, db: sqlite3.Connection, key: str, owner: str) -> bool:
        lease = self.layout.lease(db, key)
        held = lease.release(owner, self.layout.now())
        self.layout.put_lease(db, key, lease)
        return held

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        poll(lambda: self._is_turn_of(key, owner), seconds)

    @on_connection
    def _is_turn_of(self, db: sqlite3.Connection, key: str, owner: str) -> bool:
        return self.layout.lease(db, key).is_turn_of(owner, self.layout.now())
