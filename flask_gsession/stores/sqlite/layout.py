"""The tables of the SQLite file, and how they hold records and leases."""

from __future__ import annotations

import json
import sqlite3
from typing import NamedTuple

from ...errors import Gone, LeaseLost, Stale, UnreadableRecord
from ..base import Clock, Record, milliseconds
from ..lease import Lease

APPLICATION_ID = 0x67536573  # "gSes"
SCHEMA_VERSION = 4
SCHEMA = """
CREATE TABLE IF NOT EXISTS gsession (
    key TEXT PRIMARY KEY NOT NULL,
    version INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    idle_expires_at INTEGER NOT NULL,
    absolute_expires_at INTEGER NOT NULL,
    payload BLOB NOT NULL,
    successor TEXT
);
CREATE INDEX IF NOT EXISTS gsession_expiry ON gsession (idle_expires_at);
CREATE TABLE IF NOT EXISTS gsession_lease (
    key TEXT PRIMARY KEY NOT NULL,
    owner TEXT NOT NULL,
    until INTEGER NOT NULL,
    length INTEGER NOT NULL,
    waiters TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS gsession_blob (
    name TEXT PRIMARY KEY NOT NULL,
    expires_at INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS gsession_blob_expiry ON gsession_blob (expires_at);
CREATE TABLE IF NOT EXISTS gsession_frame (
    name TEXT NOT NULL,
    start INTEGER NOT NULL,
    frame BLOB NOT NULL,
    PRIMARY KEY (name, start)
);
"""
TRIGGERS = (
    """
    CREATE TRIGGER IF NOT EXISTS gsession_lease_ends AFTER DELETE ON gsession
    BEGIN DELETE FROM gsession_lease WHERE key = old.key; END
    """,
    """
    CREATE TRIGGER IF NOT EXISTS gsession_blob_ends AFTER DELETE ON gsession_blob
    BEGIN DELETE FROM gsession_frame WHERE name = old.name; END
    """,
)
COLUMNS = "version, created_at, idle_expires_at, absolute_expires_at, payload, successor"
LIVE = "successor IS NULL AND idle_expires_at > ?"
BETWEEN = "key > ? AND key >= ? AND key < ?"
ORPHANED = "NOT EXISTS (SELECT 1 FROM gsession WHERE gsession.key = gsession_lease.key)"


class AddedColumn(NamedTuple):
    """A column that tables in older files lack."""

    table: str
    name: str
    definition: str

    def add(self, db: sqlite3.Connection) -> None:
        """Add it to a table that lacks it."""
        if self._is_there(db):
            return
        try:
            db.execute(f"ALTER TABLE {self.table} ADD COLUMN {self.name} {self.definition}")
        except sqlite3.OperationalError:
            if not self._is_there(db):  # another process may have added it first
                raise

    def _is_there(self, db: sqlite3.Connection) -> bool:
        columns = db.execute("SELECT name FROM pragma_table_info(?)", (self.table,)).fetchall()
        return (self.name,) in columns


class Layout:
    """The rows of one prefix."""

    def __init__(self, prefix: str, clock: Clock) -> None:
        self.prefix = prefix
        self.clock = clock

    def now(self) -> int:
        """The time in milliseconds."""
        return milliseconds(self.clock)

    def lease(self, db: sqlite3.Connection, key: str) -> Lease:
        row = db.execute(
            "SELECT owner, until, length, waiters FROM gsession_lease WHERE key = ?",
            (self.prefix + key,),
        ).fetchone()
        if row is None:
            return Lease()
        try:
            return Lease.of(row[0], row[1], row[2], json.loads(row[3]))
        except (ValueError, TypeError, RecursionError):
            return Lease()  # malformed

    def put_lease(self, db: sqlite3.Connection, key: str, lease: Lease) -> None:
        name = self.prefix + key
        if lease == Lease():
            db.execute("DELETE FROM gsession_lease WHERE key = ?", (name,))
        else:
            db.execute(
                "INSERT OR REPLACE INTO gsession_lease VALUES (?, ?, ?, ?, ?)",
                (name, lease.owner, lease.until, lease.length, json.dumps(lease.waiters)),
            )

    def select(self, db: sqlite3.Connection, key: str) -> Record | None:
        row = db.execute(
            f"SELECT {COLUMNS} FROM gsession WHERE key = ?", (self.prefix + key,)
        ).fetchone()
        if row is None:
            return None
        return checked(Record(key, *row))

    def range_of(self, cursor: str, begins: str) -> tuple[str, str, str]:
        """The arguments of ``BETWEEN``: keys after ``cursor`` that start with ``begins``."""
        start = self.prefix + begins
        return self.prefix + cursor, start, f"{start}\U0010ffff"

    def insert(self, db: sqlite3.Connection, record: Record) -> None:
        db.execute(
            f"INSERT OR REPLACE INTO gsession (key, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self.prefix + record.key, *record[1:]),
        )

    def remove(self, db: sqlite3.Connection, key: str) -> None:
        db.execute("DELETE FROM gsession WHERE key = ?", (self.prefix + key,))

    def expect(
        self, db: sqlite3.Connection, record: Record | None, version: int | None, lease: str | None
    ) -> Record:
        now = self.now()
        if record is None or not record.is_live(now):
            raise Gone
        if lease is not None and not self.lease(db, record.key).is_held_by(lease, now):
            raise LeaseLost
        if record.version != version:
            raise Stale
        return record


def checked(record: Record) -> Record:
    if not (
        type(record.payload) is bytes
        and all(type(number) is int for number in record[1:5])
        and type(record.successor) in (str, type(None))
    ):
        raise UnreadableRecord("corrupt", "columns of wrong types")
    return record
