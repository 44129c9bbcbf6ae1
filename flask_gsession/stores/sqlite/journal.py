"""The part ``journal`` of an SQLite store: a table, written in the transaction of the session."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from ...errors import KeyTaken, UnreadableRecord
from ..base import KEY_LENGTH, OTHER_ENDS, Deleted, Record
from ..journals import Entries, Journal, JournalFigures
from .file import in_transaction, on_connection
from .layout import BETWEEN, COLUMNS, checked
from .records import EXPIRED, Records
from .scans import SQLiteScans

_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS gsession_journal (
        prefix TEXT NOT NULL,
        number INTEGER NOT NULL,
        entry BLOB NOT NULL,
        PRIMARY KEY (prefix, number)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS gsession_consumer (
        prefix TEXT NOT NULL,
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        PRIMARY KEY (prefix, name)
    ) WITHOUT ROWID
    """,
)
_OTHERS = "substr(key, -1) IN ({})".format(", ".join(f"'{end}'" for end in OTHER_ENDS))
_REMOVABLE = f"{EXPIRED} AND (successor IS NOT NULL OR {_OTHERS})"
# Keys under a longer prefix that begins with ours have another length.
_DUE = f"{BETWEEN} AND length(key) = ? AND {EXPIRED} AND successor IS NULL AND NOT {_OTHERS}"
_AT_ONCE = 100  # sessions per transaction, since other writers wait for it
_REST = 0.02  # seconds between transactions: other writers retry at this interval
_TRIMMED = 128  # old entries are removed in batches of about this size


class SQLiteJournal(Journal):
    """Entries of one prefix, numbered one by one."""

    def __init__(self, records: Records, scans: SQLiteScans) -> None:
        self._records = records
        self._scans = scans
        self.file = records.file
        self.layout = records.layout
        self._most = 0

    def begin(self, most: int) -> None:
        self._most = most
        self.file.tables = (*self.file.tables, *_TABLES)
        self._records.remove_some(_REMOVABLE)
        self._scans.removable = _REMOVABLE

    @in_transaction()
    def create(self, db: sqlite3.Connection, record: Record, entries: Sequence[bytes]) -> None:
        there = self.layout.select(db, record.key)
        if there is not None and there.version != record.version:
            raise KeyTaken
        self._within(db).create(record)
        self._add(db, entries)

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        self._records.save(record, expected_version, lease, shorten=shorten)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        return self._records.renew(record, idle_expires_at)

    @in_transaction(durable=True)
    def replace(
        self,
        db: sqlite3.Connection,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        entries: Sequence[bytes],
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        self._within(db).replace(key, record, expected_version, pointer, lease, shorten=shorten)
        self._add(db, entries)

    @in_transaction(durable=True)
    def end(
        self,
        db: sqlite3.Connection,
        key: str,
        expected_version: int,
        entries: Sequence[bytes],
        lease: str | None = None,
    ) -> Deleted:
        deleted = self._within(db).delete(key, expected_version, lease)
        self._add(db, entries)
        return deleted

    @on_connection
    def due(self, db: sqlite3.Connection, limit: int) -> list[Record]:
        # The unary plus makes SQLite use the index of the expiry.
        rows = db.execute(
            f"SELECT key, {COLUMNS} FROM gsession WHERE {_DUE.replace('key ', '+key ')} "
            "ORDER BY idle_expires_at LIMIT ?",
            (*self._ours(), self.layout.now(), limit),
        ).fetchall()
        return [self._readable(row[0][len(self.layout.prefix) :], row) for row in rows]

    def _ours(self) -> tuple[str, str, str, int]:
        return *self.layout.range_of("", ""), len(self.layout.prefix) + KEY_LENGTH

    def _readable(self, key: str, row: tuple[Any, ...]) -> Record:
        try:
            return checked(Record(key, *row[1:]))
        except UnreadableRecord:  # only its payload is unreadable, not its end
            return Record(key, row[1], 0, row[3], 0, b"")

    def expire(self, expired: Sequence[tuple[Record, bytes]]) -> int:
        removed = 0
        for start in range(0, len(expired), _AT_ONCE):
            some = expired[start : start + _AT_ONCE]
            removed += self._expire(some)
            if len(some) == _AT_ONCE:
                time.sleep(_REST)
        return removed

    @in_transaction(durable=True)
    def _expire(self, db: sqlite3.Connection, expired: Sequence[tuple[Record, bytes]]) -> int:
        entries = []
        for record, entry in expired:
            done = db.execute(
                "DELETE FROM gsession WHERE key = ? AND version = ? AND successor IS NULL "
                f"AND idle_expires_at = ? AND {EXPIRED}",
                (
                    self.layout.prefix + record.key,
                    record.version,
                    record.idle_expires_at,
                    self.layout.now(),
                ),
            )
            if done.rowcount:
                entries.append(entry)
        self._add(db, entries)
        return len(entries)

    def recover(self) -> int:
        return 0

    @in_transaction(durable=True)
    def append(
        self, db: sqlite3.Connection, entries: Sequence[bytes], key: str | None = None
    ) -> None:
        self._add(db, entries)

    def _add(self, db: sqlite3.Connection, entries: Sequence[bytes]) -> None:
        if not entries:
            return
        prefix, last = self.layout.prefix, self._last(db)
        numbered = enumerate(entries, last + 1)
        db.executemany(
            "INSERT INTO gsession_journal VALUES (?, ?, ?)",
            ((prefix, number, entry) for number, entry in numbered),
        )
        after = last + len(entries)
        if after // _TRIMMED != last // _TRIMMED:
            db.execute(
                "DELETE FROM gsession_journal WHERE prefix = ? AND number <= ?",
                (prefix, after - self._most),
            )

    def _last(self, db: sqlite3.Connection) -> int:
        select = "SELECT max(number) FROM gsession_journal WHERE prefix = ?"
        (number,) = db.execute(select, (self.layout.prefix,)).fetchone()
        return number or 0

    @on_connection
    def read(self, db: sqlite3.Connection, after: int, limit: int) -> Entries:
        prefix = self.layout.prefix
        rows = db.execute(
            "SELECT number, entry FROM gsession_journal WHERE prefix = ? AND number > ? "
            "ORDER BY number LIMIT ?",
            (prefix, after, limit),
        ).fetchall()
        return Entries(rows, rows[0][0] if rows else after + 1)

    @in_transaction()
    def acknowledge(self, db: sqlite3.Connection, consumer: str, number: int) -> None:
        db.execute(
            "INSERT INTO gsession_consumer VALUES (?, ?, ?) ON CONFLICT (prefix, name) "
            "DO UPDATE SET number = max(number, excluded.number)",
            (self.layout.prefix, consumer, number),
        )

    @on_connection
    def acknowledged(self, db: sqlite3.Connection, consumer: str) -> int | None:
        row = db.execute(
            "SELECT number FROM gsession_consumer WHERE prefix = ? AND name = ?",
            (self.layout.prefix, consumer),
        ).fetchone()
        return None if row is None else row[0]

    @in_transaction()
    def forget(self, db: sqlite3.Connection, consumer: str) -> bool:
        done = db.execute(
            "DELETE FROM gsession_consumer WHERE prefix = ? AND name = ?",
            (self.layout.prefix, consumer),
        )
        return done.rowcount == 1

    @on_connection
    def figures(self, db: sqlite3.Connection) -> JournalFigures:
        prefix = (self.layout.prefix,)
        first, last = db.execute(
            "SELECT min(number), max(number) FROM gsession_journal WHERE prefix = ?", prefix
        ).fetchone()
        due, oldest = db.execute(
            f"SELECT count(*), min(idle_expires_at) FROM gsession "
            f"WHERE {_DUE.replace('key ', '+key ')}",
            (*self._ours(), self.layout.now()),
        ).fetchone()
        consumers = dict(
            db.execute("SELECT name, number FROM gsession_consumer WHERE prefix = ?", prefix)
        )
        return JournalFigures(first or 0, last or 0, due, oldest or 0, consumers)

    def _within(self, db: sqlite3.Connection) -> Records:
        """The records, within this transaction."""
        return Records(_OpenTransaction(db), self.layout, _REMOVABLE)  # type: ignore[arg-type]  # it has all the methods used


class _OpenTransaction:
    """Stands in for the file: its calls run in an open transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def within(self, work: Any, **_: Any) -> Any:
        return work(self._db)
