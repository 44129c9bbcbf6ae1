"""The parts ``scans``, ``upkeep`` and ``counts`` of an SQLite store."""

from __future__ import annotations

import sqlite3

from ...errors import UnreadableRecord
from ..base import OTHER_ENDS, Record
from ..parts import COUNT_ALL, MORE, Counts, Page, Scans, Tidied, Upkeep
from .file import SQLiteFile, on_connection
from .layout import BETWEEN, COLUMNS, LIVE, ORPHANED, Layout, checked
from .records import EXPIRED

_BLOBS_AT_ONCE = 10  # removed at once: each may have many megabytes

_OF_SESSION = "substr(key, -1) NOT IN ({})".format(", ".join(f"'{end}'" for end in OTHER_ENDS))


class SQLiteScans(Scans, Upkeep, Counts):
    """Scans the tables by their indexes."""

    def __init__(self, file: SQLiteFile, layout: Layout) -> None:
        self.file = file
        self.layout = layout
        #: the condition for records that are old enough to remove
        self.removable = EXPIRED

    @on_connection
    def scan(
        self, db: sqlite3.Connection, cursor: str = "", limit: int = 200, begins: str = ""
    ) -> Page:
        now = self.layout.now()
        rows = db.execute(
            f"SELECT key, {COLUMNS} FROM gsession WHERE {BETWEEN} ORDER BY key LIMIT ?",
            (*self.layout.range_of(cursor, begins), limit),
        ).fetchall()
        records, unreadable = [], []
        keys = [row[0][len(self.layout.prefix) :] for row in rows]
        for key, row in zip(keys, rows, strict=True):
            try:
                record = checked(Record(key, *row[1:]))
            except UnreadableRecord:
                unreadable.append(key)
            else:
                if now < record.idle_expires_at:
                    records.append(record)
        return Page(records, unreadable, keys[-1] if len(keys) == limit else "")

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        """Finds only expired rows, by their index, so ``cursor`` has no position."""
        return self.file.within(
            lambda db: self._tidied(db, limit, dry_run=dry_run), transaction=not dry_run
        )

    def _tidied(self, db: sqlite3.Connection, limit: int, *, dry_run: bool) -> Tidied:
        now = self.layout.now()
        found = {}
        more = False
        for kind, table, condition, arguments in (
            ("expired sessions", "gsession", self.removable, (now,)),
            # In SQLite's order, text and blobs come after all numbers.
            ("unreadable records", "gsession", "idle_expires_at >= ''", ()),
            ("orphaned locks", "gsession_lease", ORPHANED, ()),
            ("expired large values", "gsession_blob", "expires_at <= ?", (now,)),
            ("orphaned large values", "gsession_blob", "expires_at >= ''", ()),
        ):
            if dry_run:
                select = f"SELECT count(*) FROM {table} WHERE {condition}"
                (found[kind],) = db.execute(select, arguments).fetchone()
                continue
            most = min(limit, _BLOBS_AT_ONCE) if table == "gsession_blob" else limit
            done = db.execute(
                f"DELETE FROM {table} WHERE rowid IN "
                f"(SELECT rowid FROM {table} WHERE {condition} LIMIT ?)",
                (*arguments, most),
            )
            found[kind] = done.rowcount
            more = more or done.rowcount == most
        return Tidied(found, sum(found.values()), MORE if more else "")

    @on_connection
    def count(self, db: sqlite3.Connection) -> int:
        """The approximate number of live sessions. Takes 60 ms for a million; blocks no call."""
        now = self.layout.now()
        ours = (self.layout.prefix, self.layout.prefix + "\x7f")
        (live,) = db.execute(
            "SELECT count(*) FROM gsession WHERE idle_expires_at > ?", (now,)
        ).fetchone()
        if live <= COUNT_ALL:
            # The unary plus makes SQLite use the index of the expiry.
            (live,) = db.execute(
                f"SELECT count(*) FROM gsession WHERE {LIVE} "
                f"AND +key > ? AND +key < ? AND {_OF_SESSION}",
                (now, *ours),
            ).fetchone()
            return int(live)
        # Read only the indexes, not the rows. Assume that rows under other prefixes live as long as
        # ours.
        (mine,) = db.execute(
            f"SELECT count(*) FROM gsession WHERE key > ? AND key < ? AND {_OF_SESSION}", ours
        ).fetchone()
        (total,) = db.execute("SELECT count(*) FROM gsession").fetchone()
        return int(live * mine / max(1, total))
