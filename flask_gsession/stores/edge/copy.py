"""A node's copies and its queue of changes. Every method is one transaction on the node's file.

tests/simulation/edge_model.py shows for each condition here what goes wrong without it.
"""

from __future__ import annotations

import os
import sqlite3

from ...errors import CutOff, Gone, KeyTaken, Stale
from ..base import MAX_POINTERS, Clock, Deleted, Record, milliseconds, new_version
from ..parts import LOST_EXPIRY
from ..sqlite.file import in_transaction, on_connection
from .node_file import NodeFile, NodeUnavailable
from .node_time import NodeTime
from .rows import TABLES, Found, Row, Rows, State

DAY = 86_400_000  # milliseconds that a tombstone outlives its session, because clocks differ
_UNCOUNTED = 200
_AHEAD = 5_000  # milliseconds that a confirmation may be in the future


class Copy:
    """The file of a node. ``offline``: seconds for which a copy serves without the centre.

    ``most``: how many sessions may have queued changes. ``Waiting`` has the methods that settle
    them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float,
        prefix: str,
        clock: Clock,
        offline: float,
        most: int,
    ) -> None:
        self.file = NodeFile(path, timeout, TABLES)
        self.rows = Rows(prefix)
        self._clock = clock
        #: the age of copies, even if the clock is set back
        self.time = NodeTime(self.file, clock)
        self._offline = int(offline * 1000)
        self.most = most
        self._room = 0  # how many more sessions may be queued before we count again

    def now(self) -> int:
        """The time in milliseconds, for expiry. For everything else use ``time``."""
        return milliseconds(self._clock)

    # -- reads

    @on_connection
    def get(self, db: sqlite3.Connection, key: str) -> Row | None:
        return self.rows.select(db, key)

    def plain_since(self, key: str) -> int | None:
        """When the centre last confirmed a row without changes; None without such a row."""
        return self.file.within(lambda db: self.rows.plain_since(db, key))

    @on_connection
    def state_of(self, db: sqlite3.Connection, key: str) -> Found | None:
        return self.rows.state_of(db, key)

    def served(self, row: Row, why: str) -> Record | None:
        """The record of a row, for a request that is served from the copy; None for an ended
        session.

        ``why``: why the centre isn't asked. Raises ``CutOff`` for a copy that was confirmed too
        long ago.
        """
        if row.state is State.ENDED:
            return None
        if row.state is State.CREATED and row.sent is None:
            return row.record  # only this node has it
        age = self.time() - row.confirmed_at
        if -_AHEAD <= age < self._offline:
            return row.record
        if age < 0:
            self.time.disagrees()
        raise CutOff(
            f"the copy of session {row.record.key} at this edge was confirmed {age / 1000:.0f} s "
            f"ago, and offline_for allows {self._offline / 1000:g} s: {why}"
        )

    # -- copies of what the centre has

    def copied(self, record: Record, confirmed_at: int, *, new: bool = False) -> None:
        """Note that the centre had this record at ``confirmed_at``. ``new``: there was no copy."""

        def copy(db: sqlite3.Connection) -> None:
            if new:
                self.rows.remove_old(db, self.now())
            self.rows.copy(db, record, confirmed_at, self.copy_ends(record, confirmed_at))

        self.file.within(copy)

    @on_connection
    def confirmed(self, db: sqlite3.Connection, record: Record, confirmed_at: int) -> None:
        """Note that the centre had this version at that time."""
        end = self.copy_ends(record, confirmed_at)
        self.rows.confirm(db, record.key, record.version, confirmed_at, end)

    @on_connection
    def absent(self, db: sqlite3.Connection, key: str, confirmed_at: int) -> None:
        """Note that the centre had no such session at that time."""
        self.rows.forget(db, key, confirmed_at)

    @in_transaction()
    def created(self, db: sqlite3.Connection, record: Record, confirmed_at: int) -> None:
        """Note that the centre created this session."""
        now = self.now()
        self.rows.remove_old(db, now)
        end = self.copy_ends(record, confirmed_at)
        self.rows.insert(db, Row(record, State.PLAIN, confirmed_at), end)

    @in_transaction(durable=True)
    def ended(self, db: sqlite3.Connection, key: str, last: Record | None = None) -> None:
        """Note that the centre ended this session at this node's request."""
        now = self.now()
        self.rows.remove_old(db, now)
        ended = {row.record.key: row.record for row in self._chain(db, key)}
        if last is None:
            end = now + LOST_EXPIRY
            last = Record(key, new_version(), now, end, end, b"")
        ended.setdefault(last.key, last)
        ended.setdefault(key, last._replace(key=key))
        for record in ended.values():
            self.add_tombstone(db, record)

    @in_transaction(durable=True)
    def withdrawn(self, db: sqlite3.Connection, key: str) -> Row | None:
        """Stop serving a copy before the centre rotates the session. Returns the copy."""
        row = self.rows.select(db, key)
        if row is None or row.state is not State.PLAIN:
            return None
        self.rows.remove(db, key)
        return row

    @in_transaction()
    def rotated(
        self,
        db: sqlite3.Connection,
        key: str,
        record: Record,
        pointer: Record | None,
        confirmed_at: int,
    ) -> None:
        """Note that the centre rotated the session under ``key``."""
        there = self.rows.select(db, key)
        if there is not None and there.queued is not None:
            pass  # it changed here in between; settling merges the change or reports it
        elif pointer is None:
            self.add_tombstone(db, record._replace(key=key) if there is None else there.record)
        else:
            end = self.copy_ends(pointer, confirmed_at)
            self.rows.insert(db, Row(pointer, State.PLAIN, confirmed_at), end)
        end = self.copy_ends(record, confirmed_at)
        self.rows.insert(db, Row(record, State.PLAIN, confirmed_at), end)

    # -- the queue: changes that the centre can't make now

    @in_transaction()
    def queue_created(
        self, db: sqlite3.Connection, record: Record, typed: frozenset[str] = frozenset()
    ) -> None:
        """Create the session here; ``typed`` as in ``Row``. Raises ``KeyTaken``."""
        now = self.now()
        self.rows.remove_old(db, now)
        there = self.rows.select(db, record.key)
        if there is not None and there.record.version == record.version:
            return
        if there is not None and (there.state is State.ENDED or now < there.record.idle_expires_at):
            raise KeyTaken
        self._check_room(db)
        queued = self.rows.next_number(db, self.time())
        row = Row(record, State.CREATED, self.time(), queued=queued, typed=typed)
        self.rows.insert(db, row, row.useful_until)

    @in_transaction()
    def queue_saved(
        self,
        db: sqlite3.Connection,
        record: Record,
        expected_version: int,
        typed: frozenset[str] = frozenset(),
        *,
        shorten: bool,
        why: str,
    ) -> None:
        """Replace that version here; ``typed`` as in ``Row``.

        Raises ``Gone``, ``Stale`` and ``CutOff``.
        """
        row = self._live(db, record.key, why)
        if row.record.version == record.version:
            return
        if row.record.version != expected_version:
            raise Stale
        if not shorten:
            record = record.kept_as_long_as(row.record)
        self._change(db, row._replace(typed=row.typed | typed), record)

    @in_transaction()
    def queue_renewed(
        self, db: sqlite3.Connection, record: Record, idle_expires_at: int, why: str
    ) -> bool:
        """Move the idle expiry here. Raises ``CutOff``."""
        try:
            row = self._live(db, record.key, why)
        except Gone:
            return False
        there = row.record
        if there.version != record.version:
            return False
        end = min(max(idle_expires_at, there.idle_expires_at), there.absolute_expires_at)
        if end != there.idle_expires_at:
            self._change(db, row, there._replace(idle_expires_at=end))
        return True

    @in_transaction(durable=True)
    def queue_ended(
        self, db: sqlite3.Connection, key: str, expected_version: int | None = None
    ) -> Deleted:
        """End the session here and now. Raises ``Stale`` and ``Gone`` as ``Store.delete``."""
        now = self.now()
        self.rows.remove_old(db, now)
        rows = self._chain(db, key)
        last = rows[-1] if rows else None
        live = last is not None and last.state is not State.ENDED and last.record.is_live(now)
        if expected_version is not None:
            if last is None or not live or last.record.key != key:
                raise Gone
            if last.record.version != expected_version:
                raise Stale
        if last is None:
            # The centre may have it. Its end is unknown, so assume the latest possible.
            end = now + LOST_EXPIRY
            last = Row(Record(key, new_version(), now, end, end, b""), State.PLAIN, 0)
            rows = [last]
        for row in rows:
            if row.state is State.ENDED:
                continue
            if row.state is State.CREATED and row.sent is None:
                self.add_tombstone(db, row.record)
                continue
            queued = self.rows.next_number(db, self.time())
            ended = Row(row.record, State.ENDED, row.confirmed_at, queued, row.base)
            self.rows.insert(db, ended, row.record.absolute_expires_at + DAY)
        return Deleted(True, last.record) if live else Deleted(False)

    def _live(self, db: sqlite3.Connection, key: str, why: str) -> Row:
        row = self.rows.select(db, key)
        if row is None:
            raise CutOff(f"session {key} has no copy at this edge: {why}")
        if self.served(row, why) is None or not row.record.is_live(self.now()):
            raise Gone
        return row

    def _change(self, db: sqlite3.Connection, row: Row, record: Record) -> None:
        if row.state is State.PLAIN:
            self._check_room(db)
            queued = self.rows.next_number(db, self.time())
            row = row._replace(state=State.CHANGED, base=row.record, queued=queued)
        row = row._replace(record=record)
        self.rows.insert(db, row, row.useful_until)

    def _check_room(self, db: sqlite3.Connection) -> None:
        if self._room > 0:
            self._room -= 1
            return
        waiting = self.rows.count(db, self.most)[1]
        # Other workers use up the same room.
        self._room = min(_UNCOUNTED, (self.most - waiting) // 16)
        if waiting >= self.most:
            raise NodeUnavailable(
                f"the outbox is full: {self.most} sessions with changes wait for the centre, as "
                "many as its URL allows, and no other session can be changed until it is back",
                contention=True,
            )

    def _chain(self, db: sqlite3.Connection, key: str) -> list[Row]:
        """The row of this key, and the rows that its pointers lead to."""
        rows: list[Row] = []
        now = self.now()
        while len(rows) < MAX_POINTERS:
            row = self.rows.select(db, key)
            if row is None or any(row.record.key == other.record.key for other in rows):
                break
            rows.append(row)
            if row.record.successor is None or now >= row.record.idle_expires_at:
                break
            key = row.record.successor
        return rows

    def add_tombstone(self, db: sqlite3.Connection, record: Record) -> None:
        """Store a tombstone that the centre need not get."""
        left = record._replace(payload=b"", successor=None)
        row = Row(left, State.ENDED, self.time())
        self.rows.insert(db, row, record.absolute_expires_at + DAY)

    def copy_ends(self, record: Record, confirmed_at: int) -> int:
        """When this copy may be removed."""
        return min(record.idle_expires_at, confirmed_at + self._offline)
