"""The part ``blobs`` of an SQLite store: a row for each large value, and one for each frame."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from ...errors import Gone
from ..parts import Blobs
from .file import SQLiteFile, in_transaction, on_connection
from .layout import Layout


class SQLiteBlobs(Blobs):
    """Keeps large values. Each new one removes up to two that have expired."""

    def __init__(self, file: SQLiteFile, layout: Layout) -> None:
        self.file = file
        self.layout = layout

    @in_transaction()
    def write_frame(
        self, db: sqlite3.Connection, name: str, offset: int, frame: bytes, expires_at: int
    ) -> None:
        now = self.layout.now()
        name = self.layout.prefix + name
        if offset == 0:
            self._sweep_blobs(db, now, 2)
            db.execute("INSERT OR IGNORE INTO gsession_blob VALUES (?, ?)", (name, expires_at))
        done = db.execute(
            "UPDATE gsession_blob SET expires_at = max(expires_at, ?) "
            "WHERE name = ? AND expires_at > ?",
            (expires_at, name, now),
        )
        if done.rowcount == 0:
            raise Gone
        db.execute("INSERT OR REPLACE INTO gsession_frame VALUES (?, ?, ?)", (name, offset, frame))

    @on_connection
    def read_frame(self, db: sqlite3.Connection, name: str, offset: int, size: int) -> bytes | None:
        row = db.execute(
            "SELECT frame FROM gsession_frame JOIN gsession_blob USING (name) "
            "WHERE name = ? AND start = ? AND expires_at > ?",
            (self.layout.prefix + name, offset, self.layout.now()),
        ).fetchone()
        return row[0] if row is not None and type(row[0]) is bytes else None

    @in_transaction()
    def renew_blobs(self, db: sqlite3.Connection, names: Sequence[str], expires_at: int) -> None:
        now = self.layout.now()
        db.executemany(
            "UPDATE gsession_blob SET expires_at = max(expires_at, ?) "
            "WHERE name = ? AND expires_at > ?",
            [(expires_at, self.layout.prefix + name, now) for name in names],
        )

    @in_transaction()
    def discard_blobs(self, db: sqlite3.Connection, names: Sequence[str], at: int) -> None:
        now = self.layout.now()
        if at <= now:
            statement = "DELETE FROM gsession_blob WHERE name = ?"
            db.executemany(statement, [(self.layout.prefix + name,) for name in names])
        else:
            statement = "UPDATE gsession_blob SET expires_at = min(expires_at, ?) WHERE name = ?"
            db.executemany(statement, [(at, self.layout.prefix + name) for name in names])

    def _sweep_blobs(self, db: sqlite3.Connection, now: int, limit: int) -> int:
        done = db.execute(
            "DELETE FROM gsession_blob WHERE name IN "
            "(SELECT name FROM gsession_blob WHERE expires_at <= ? LIMIT ?)",
            (now, limit),
        )
        return done.rowcount
