"""The rows of an edge's file: copies of sessions, and changes that wait for the centre."""

from __future__ import annotations

import sqlite3
from enum import IntEnum
from typing import Any, NamedTuple

from msgspec import MsgspecError
from msgspec.msgpack import decode, encode

from ...errors import UnreadableRecord
from ..base import KEY_LENGTH, Record
from ..sqlite.layout import AddedColumn

TABLES: tuple[str | AddedColumn, ...] = (
    """
    CREATE TABLE IF NOT EXISTS gsession_edge (
        key TEXT PRIMARY KEY NOT NULL,
        version INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        idle_expires_at INTEGER NOT NULL,
        absolute_expires_at INTEGER NOT NULL,
        payload BLOB NOT NULL,
        successor TEXT,
        state INTEGER NOT NULL,
        confirmed_at INTEGER NOT NULL,
        removable_at INTEGER NOT NULL,
        queued INTEGER,
        base BLOB,
        sent BLOB,
        number INTEGER,
        typed BLOB
    )
    """,
    "CREATE INDEX IF NOT EXISTS gsession_edge_ends ON gsession_edge (queued) "
    "WHERE queued IS NOT NULL AND state = 3",
    "CREATE INDEX IF NOT EXISTS gsession_edge_changes ON gsession_edge (queued) "
    "WHERE queued IS NOT NULL AND state < 3",
    "CREATE INDEX IF NOT EXISTS gsession_edge_removable ON gsession_edge (removable_at)",
    """
    CREATE TABLE IF NOT EXISTS gsession_edge_node (
        only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
        id TEXT NOT NULL,
        numbers INTEGER NOT NULL,
        settler TEXT NOT NULL,
        settler_until INTEGER NOT NULL,
        settled_at INTEGER NOT NULL,
        settled INTEGER NOT NULL,
        dropped INTEGER NOT NULL,
        trouble TEXT NOT NULL,
        boot TEXT NOT NULL,
        ahead INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS gsession_edge_turns (
        prefix TEXT PRIMARY KEY NOT NULL,
        number INTEGER NOT NULL,
        mark TEXT NOT NULL
    )
    """,
    AddedColumn("gsession_edge", "typed", "BLOB"),
    AddedColumn("gsession_edge_node", "boot", "TEXT NOT NULL DEFAULT ''"),
    AddedColumn("gsession_edge_node", "ahead", "INTEGER NOT NULL DEFAULT 0"),
    # A random id of 48 bits, since a node that starts with an empty file is a new node.
    "INSERT OR IGNORE INTO gsession_edge_node "
    "SELECT 1, lower(hex(randomblob(6))), 0, '', 0, 0, 0, 0, '', '', 0 "
    "WHERE NOT EXISTS (SELECT 1 FROM gsession_edge_node)",
)
_COLUMNS = (
    "version, created_at, idle_expires_at, absolute_expires_at, payload, successor, "
    "state, confirmed_at, queued, base, sent, number, typed"
)


#: Rows of one prefix only: several applications may share a file.
_OWN = "length(key) = ? AND substr(key, 1, ?) = ?"


class State(IntEnum):
    """The relation of a row to the session at the centre."""

    PLAIN = 0  # an unchanged copy
    CHANGED = 1  # changed here after it was copied
    CREATED = 2  # created here
    ENDED = 3  # ended here: a tombstone


class Row(NamedTuple):
    """A node's copy of one session.

    ``record``: the record to serve; for a tombstone, what is left of it. ``confirmed_at``: when the
    centre was last known to have it like this, or to have its ``base``, in milliseconds.
    ``queued``: its place in the queue for the centre; None if there is nothing to settle. ``base``:
    the record at the centre that was changed here. ``sent`` and ``number``: the record that was
    last sent to the centre, and its number. ``typed``: the changed keys that have their own merge
    policy.
    """

    record: Record
    state: State
    confirmed_at: int
    queued: int | None = None
    base: Record | None = None
    sent: Record | None = None
    number: int | None = None
    typed: frozenset[str] = frozenset()

    @property
    def useful_until(self) -> int:
        """When a waiting change becomes useless, in milliseconds.

        A changed session that the centre has stays, so that its loss is reported.
        """
        is_own = self.state is State.CREATED and self.sent is None
        return self.record.idle_expires_at if is_own else self.record.absolute_expires_at


class Found(NamedTuple):
    """The state of a row. ``is_queued``: the centre must get its changes before a call about it."""

    state: int
    confirmed_at: int
    is_queued: bool


class Rows:
    """The rows of one prefix, on a connection."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        #: the arguments of ``_OWN``
        self._own = len(prefix) + KEY_LENGTH, len(prefix), prefix

    def select(self, db: sqlite3.Connection, key: str) -> Row | None:
        found = db.execute(
            f"SELECT {_COLUMNS} FROM gsession_edge WHERE key = ?", (self.prefix + key,)
        ).fetchone()
        return None if found is None else _row(key, found)

    def plain_since(self, db: sqlite3.Connection, key: str) -> int | None:
        """When an unchanged row was confirmed; None without such a row. The fast path of reads."""
        for (confirmed_at,) in db.execute(
            "SELECT confirmed_at FROM gsession_edge WHERE key = ? AND state = 0",
            (self.prefix + key,),
        ):
            return int(confirmed_at)
        return None

    def state_of(self, db: sqlite3.Connection, key: str) -> Found | None:
        found = db.execute(
            "SELECT state, confirmed_at, queued IS NOT NULL FROM gsession_edge WHERE key = ?",
            (self.prefix + key,),
        ).fetchone()
        return None if found is None else Found(*found)

    def insert(self, db: sqlite3.Connection, row: Row, removable_at: int) -> None:
        """Store the row, in place of any other."""
        record = row.record
        db.execute(
            f"INSERT OR REPLACE INTO gsession_edge (key, {_COLUMNS}, removable_at) "
            f"VALUES ({', '.join('?' * 15)})",
            (
                self.prefix + record.key,
                *record[1:],
                int(row.state),
                row.confirmed_at,
                row.queued,
                _packed(row.base),
                _packed(row.sent),
                row.number,
                encode(sorted(row.typed)) if row.typed else None,
                removable_at,
            ),
        )

    def copy(
        self, db: sqlite3.Connection, record: Record, confirmed_at: int, removable_at: int
    ) -> None:
        """Copy a record from the centre, unless the row has changes or is newer."""
        db.execute(
            "INSERT INTO gsession_edge (key, version, created_at, idle_expires_at, "
            "absolute_expires_at, payload, successor, state, confirmed_at, removable_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET version = excluded.version, "
            "created_at = excluded.created_at, idle_expires_at = excluded.idle_expires_at, "
            "absolute_expires_at = excluded.absolute_expires_at, payload = excluded.payload, "
            "successor = excluded.successor, confirmed_at = excluded.confirmed_at, "
            "removable_at = excluded.removable_at "
            "WHERE state = 0 AND confirmed_at <= excluded.confirmed_at",
            (self.prefix + record.key, *record[1:], confirmed_at, removable_at),
        )

    def confirm(
        self,
        db: sqlite3.Connection,
        key: str,
        version: int,
        confirmed_at: int,
        removable_at: int,
    ) -> None:
        """Note that the centre still had this version."""
        db.execute(
            "UPDATE gsession_edge SET confirmed_at = max(confirmed_at, ?), removable_at = ? "
            "WHERE key = ? AND version = ? AND state = 0",
            (confirmed_at, removable_at, self.prefix + key, version),
        )

    def forget(self, db: sqlite3.Connection, key: str, confirmed_at: int) -> None:
        """Remove an unchanged row that isn't newer, because the centre has no such session."""
        db.execute(
            "DELETE FROM gsession_edge WHERE key = ? AND state = 0 AND confirmed_at <= ?",
            (self.prefix + key, confirmed_at),
        )

    def remove(self, db: sqlite3.Connection, key: str) -> None:
        db.execute("DELETE FROM gsession_edge WHERE key = ?", (self.prefix + key,))

    def remove_old(self, db: sqlite3.Connection, now: int) -> None:
        """Remove up to two rows that are no longer needed."""
        db.execute(
            "DELETE FROM gsession_edge WHERE key IN (SELECT key FROM gsession_edge "
            "WHERE removable_at <= ? AND (queued IS NULL OR state = 3 OR (state = 2 AND sent IS "
            "NULL)) LIMIT 2)",
            (now,),
        )

    def next_number(self, db: sqlite3.Connection, now: int) -> int:
        """A number that this node has never used, even if its file was restored from a backup."""
        db.execute("UPDATE gsession_edge_node SET numbers = max(numbers + 1, ?)", (now,))
        (number,) = db.execute("SELECT numbers FROM gsession_edge_node").fetchone()
        return int(number)

    def queue(
        self, db: sqlite3.Connection, *, ends: bool, after: int, upto: int, limit: int
    ) -> list[tuple[str, int]]:
        """The keys of rows to settle, with their places in the queue, in order."""
        found = db.execute(
            "SELECT key, queued FROM gsession_edge WHERE queued IS NOT NULL "
            f"AND state {'= 3' if ends else '< 3'} AND queued > ? AND queued <= ? "
            f"AND {_OWN} ORDER BY queued LIMIT ?",
            (after, upto, *self._own, limit),
        ).fetchall()
        return [(key.removeprefix(self.prefix), queued) for key, queued in found]

    def oldest(self, db: sqlite3.Connection) -> int | None:
        """When the waiting change that was confirmed first was confirmed."""
        (found,) = db.execute(
            "SELECT min(confirmed_at) FROM gsession_edge "
            f"WHERE queued IS NOT NULL AND state < 3 AND {_OWN}",
            self._own,
        ).fetchone()
        return None if found is None else int(found)

    def count(self, db: sqlite3.Connection, limit: int) -> tuple[int, int]:
        """How many ends and how many other rows are queued, each up to ``limit``."""
        counts = []
        for states in ("= 3", "< 3"):
            (number,) = db.execute(
                "SELECT count(*) FROM (SELECT 1 FROM gsession_edge WHERE queued IS NOT NULL "
                f"AND state {states} AND {_OWN} LIMIT ?)",
                (*self._own, limit),
            ).fetchone()
            counts.append(number)
        return counts[0], counts[1]


def _row(key: str, columns: Any) -> Row:
    version, created, idle, absolute, payload, successor, *more = columns
    record = Record(key, version, created, idle, absolute, payload, successor)
    state, confirmed_at, queued, base, sent, number, typed = more
    return Row(
        record,
        State(state),
        confirmed_at,
        queued,
        _unpacked(key, base),
        _unpacked(key, sent),
        number,
        frozenset(decode(typed, type=list[str])) if typed else frozenset(),
    )


def _packed(record: Record | None) -> bytes | None:
    return None if record is None else encode(record[1:6])


def _unpacked(key: str, data: bytes | None) -> Record | None:
    if data is None:
        return None
    try:
        version, created, idle, absolute, payload = decode(
            data, type=tuple[int, int, int, int, bytes]
        )
    except MsgspecError:
        raise UnreadableRecord("corrupt", "the queue of this edge is damaged") from None
    return Record(key, version, created, idle, absolute, payload)
