"""The verbs on records in an SQLite file; a write may name a lease."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from ...errors import KeyTaken
from ..base import Deleted, Record
from .file import SQLiteFile, in_transaction, on_connection
from .layout import LIVE, Layout

EXPIRED = "idle_expires_at <= ?"


class Records:
    """Keeps records. ``removable``: the condition for records that are old enough to remove."""

    def __init__(self, file: SQLiteFile, layout: Layout, removable: str = EXPIRED) -> None:
        self.file = file
        self.layout = layout
        self.remove_some(removable)

    def remove_some(self, removable: str) -> None:
        self._removal = (
            "DELETE FROM gsession WHERE key IN "
            f"(SELECT key FROM gsession WHERE {removable} LIMIT 2)"
        )

    @in_transaction()
    def create(self, db: sqlite3.Connection, record: Record) -> None:
        now = self.layout.now()
        db.execute(self._removal, (now,))
        there = self.layout.select(db, record.key)
        if there is not None and there.version == record.version:
            return
        if there is not None:
            if now < there.idle_expires_at:
                raise KeyTaken
            self.layout.remove(db, record.key)
        self.layout.insert(db, record)

    @on_connection
    def load(self, db: sqlite3.Connection, key: str) -> Record | None:
        return self.layout.select(db, key)

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        def save(db: sqlite3.Connection) -> None:
            now = self.layout.now()
            if lease is not None:
                there = self.layout.select(db, record.key)
                if there is None or there.version != record.version:
                    self.layout.expect(db, there, expected_version, lease)
            _, version, created, idle, absolute, payload, _ = record
            done = db.execute(
                "UPDATE gsession SET version = ?, created_at = ?, "
                "idle_expires_at = max(?, min(idle_expires_at, ?)), "
                "absolute_expires_at = ?, payload = ? "
                f"WHERE key = ? AND version = ? AND {LIVE}",
                (
                    version,
                    created,
                    idle,
                    idle
                    if shorten
                    else absolute,  # the latest idle expiry to take over from the stored record
                    absolute,
                    payload,
                    self.layout.prefix + record.key,
                    expected_version,
                    now,
                ),
            )
            if done.rowcount == 0:
                there = self.layout.select(db, record.key)
                if there is None or there.version != record.version:
                    self.layout.expect(db, there, None, None)

        self.file.within(save, transaction=lease is not None)

    @on_connection
    def renew(self, db: sqlite3.Connection, record: Record, idle_expires_at: int) -> bool:
        now = self.layout.now()
        done = db.execute(
            "UPDATE gsession SET idle_expires_at = "
            "min(max(idle_expires_at, ?), absolute_expires_at) "
            f"WHERE key = ? AND version = ? AND {LIVE}",
            (idle_expires_at, self.layout.prefix + record.key, record.version, now),
        )
        return done.rowcount == 1

    @in_transaction(durable=True)
    def replace(
        self,
        db: sqlite3.Connection,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        now = self.layout.now()
        taken = self.layout.select(db, record.key)
        if taken is not None and taken.version == record.version:
            return
        old = self.layout.expect(db, self.layout.select(db, key), expected_version, lease)
        if taken is not None and now < taken.idle_expires_at:
            raise KeyTaken
        self.layout.insert(db, record if shorten else record.kept_as_long_as(old))
        self.layout.remove(db, key)
        if pointer is not None:
            self.layout.insert(db, pointer)

    @in_transaction(durable=True)
    def delete(
        self,
        db: sqlite3.Connection,
        key: str,
        expected_version: int | None = None,
        lease: str | None = None,
    ) -> Deleted:
        now = self.layout.now()
        record = self.layout.select(db, key)
        if expected_version is not None:
            self.layout.expect(db, record, expected_version, lease)
        record = self._pop(db, record, now)
        return Deleted(record is not None, record)

    @in_transaction(durable=True)
    def delete_many(self, db: sqlite3.Connection, keys: Sequence[str]) -> list[Deleted]:
        """Part ``bulk``."""
        now = self.layout.now()
        ended = [self._pop(db, self.layout.select(db, key), now) for key in keys]
        return [Deleted(record is not None, record) for record in ended]

    def _pop(self, db: sqlite3.Connection, record: Record | None, now: int) -> Record | None:
        while True:  # ends, since each pointer is removed
            if record is None:
                return None
            self.layout.remove(db, record.key)
            if record.successor is None or now >= record.idle_expires_at:
                return record if record.is_live(now) else None
            record = self.layout.select(db, record.successor)
