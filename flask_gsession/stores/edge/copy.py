"""The copy and the queue of a node: every method is one transaction on the node's file.

tests/simulation/edge_model.py shows for each condition here what goes wrong without it.
"""

from __future__ import annotations

import os
import sqlite3

from ...errors import CutOff, Gone, KeyTaken, Stale
from ..base import MAX_POINTERS, Clock, Deleted, Record, milliseconds, new_version
from ..parts import LOST_EXPIRY, EdgeFigures
from ..sqlite.file import in_transaction, on_connection
from .node_file import NodeFile, NodeUnavailable
from .node_time import NodeTime
from .rows import TABLES, Found, Row, Rows, State

_DAY = 86_400_000  # milliseconds that a tombstone outlives its session, as clocks differ
_UNCOUNTED = 200
_AHEAD = 5_000  # milliseconds that a confirmation may seem to lie ahead


class Copy:
    """The file of a node. ``offline``: seconds for which a copy serves without the centre.

    ``most``: sessions with changes that may be queued.
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
        self._rows = Rows(prefix)
        self._clock = clock
        #: how old copies are, also if the clock is set back
        self.time = NodeTime(self.file, clock)
        self._offline = int(offline * 1000)
        self._most = most
        self._room = 0  # sessions that may be queued before they are counted again

    def now(self) -> int:
        """The time in milliseconds, for expiry. ``time`` has the time for all else."""
        return milliseconds(self._clock)

    # -- reads

    @on_connection
    def get(self, db: sqlite3.Connection, key: str) -> Row | None:
        return self._rows.select(db, key)

    def plain_since(self, key: str) -> int | None:
        """When the centre last confirmed a row without changes; None without such a row."""
        return self.file.within(lambda db: self._rows.plain_since(db, key))

    @on_connection
    def state_of(self, db: sqlite3.Connection, key: str) -> Found | None:
        """The state of a row, for a call."""
        return self._rows.state_of(db, key)

    def served(self, row: Row, why: str) -> Record | None:
        """The record of a row, for a request that is served here; None for an ended session.

        ``why``: the reason that the centre isn't asked. Raises ``CutOff`` for a copy that was
        confirmed too long ago.
        """
        if row.state is State.ENDED:
            return None
        if row.state is State.CREATED and row.sent is None:
            return row.record  # nobody else knows it
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
        """The centre has had this record since ``confirmed_at``. ``new``: there was no copy."""

        def copy(db: sqlite3.Connection) -> None:
            if new:
                self._rows.remove_old(db, self.now())
            self._rows.copy(db, record, confirmed_at, self._copy_ends(record, confirmed_at))

        self.file.within(copy)

    @on_connection
    def confirmed(self, db: sqlite3.Connection, record: Record, confirmed_at: int) -> None:
        """The centre had this version at that time."""
        end = self._copy_ends(record, confirmed_at)
        self._rows.confirm(db, record.key, record.version, confirmed_at, end)

    @on_connection
    def absent(self, db: sqlite3.Connection, key: str, confirmed_at: int) -> None:
        """The centre had no such session at that time."""
        self._rows.forget(db, key, confirmed_at)

    @in_transaction()
    def created(self, db: sqlite3.Connection, record: Record, confirmed_at: int) -> None:
        """The centre created this session."""
        now = self.now()
        self._rows.remove_old(db, now)
        end = self._copy_ends(record, confirmed_at)
        self._rows.insert(db, Row(record, State.PLAIN, confirmed_at), end)

    @in_transaction(durable=True)
    def ended(self, db: sqlite3.Connection, key: str, last: Record | None = None) -> None:
        """The centre ended this session, and has heard of it from here."""
        now = self.now()
        self._rows.remove_old(db, now)
        ended = {row.record.key: row.record for row in self._led(db, key)}
        if last is None:
            end = now + LOST_EXPIRY
            last = Record(key, new_version(), now, end, end, b"")
        ended.setdefault(last.key, last)
        ended.setdefault(key, last._replace(key=key))
        for record in ended.values():
            self._bury(db, record)

    @in_transaction(durable=True)
    def withdrawn(self, db: sqlite3.Connection, key: str) -> Row | None:
        """Serve this copy no longer: the centre is about to rotate the session; the copy."""
        row = self._rows.select(db, key)
        if row is None or row.state is not State.PLAIN:
            return None
        self._rows.remove(db, key)
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
        """The centre rotated the session under ``key``."""
        there = self._rows.select(db, key)
        if there is not None and there.queued is not None:
            pass  # it changed in between; settling merges or reports that
        elif pointer is None:
            self._bury(db, record._replace(key=key) if there is None else there.record)
        else:
            end = self._copy_ends(pointer, confirmed_at)
            self._rows.insert(db, Row(pointer, State.PLAIN, confirmed_at), end)
        end = self._copy_ends(record, confirmed_at)
        self._rows.insert(db, Row(record, State.PLAIN, confirmed_at), end)

    # -- the queue: changes that the centre can't make now

    @in_transaction()
    def queue_created(
        self, db: sqlite3.Connection, record: Record, typed: frozenset[str] = frozenset()
    ) -> None:
        """Create the session here; ``typed`` as in ``Row``. Raises ``KeyTaken``."""
        now = self.now()
        self._rows.remove_old(db, now)
        there = self._rows.select(db, record.key)
        if there is not None and there.record.version == record.version:
            return
        if there is not None and (there.state is State.ENDED or now < there.record.idle_expires_at):
            raise KeyTaken
        self._check_room(db)
        queued = self._rows.next_number(db, self.time())
        row = Row(record, State.CREATED, self.time(), queued=queued, typed=typed)
        self._rows.insert(db, row, record.absolute_expires_at)

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
        self._rows.remove_old(db, now)
        rows = self._led(db, key)
        last = rows[-1] if rows else None
        live = last is not None and last.state is not State.ENDED and last.record.is_live(now)
        if expected_version is not None:
            if last is None or not live or last.record.key != key:
                raise Gone
            if last.record.version != expected_version:
                raise Stale
        if last is None:
            # Perhaps the centre knows it. Its end isn't known, so the longest possible.
            end = now + LOST_EXPIRY
            last = Row(Record(key, new_version(), now, end, end, b""), State.PLAIN, 0)
            rows = [last]
        for row in rows:
            if row.state is State.ENDED:
                continue
            if row.state is State.CREATED and row.sent is None:
                self._bury(db, row.record)
                continue
            queued = self._rows.next_number(db, self.time())
            ended = Row(row.record, State.ENDED, row.confirmed_at, queued, row.base)
            self._rows.insert(db, ended, row.record.absolute_expires_at + _DAY)
        return Deleted(True, last.record) if live else Deleted(False)

    def _live(self, db: sqlite3.Connection, key: str, why: str) -> Row:
        row = self._rows.select(db, key)
        if row is None:
            raise CutOff(f"session {key} has no copy at this edge: {why}")
        if self.served(row, why) is None or not row.record.is_live(self.now()):
            raise Gone
        return row

    def _change(self, db: sqlite3.Connection, row: Row, record: Record) -> None:
        if row.state is State.PLAIN:
            self._check_room(db)
            queued = self._rows.next_number(db, self.time())
            row = row._replace(state=State.CHANGED, base=row.record, queued=queued)
        self._rows.insert(db, row._replace(record=record), record.absolute_expires_at)

    def _check_room(self, db: sqlite3.Connection) -> None:
        if self._room > 0:
            self._room -= 1
            return
        waiting = self._rows.count(db, self._most)[1]
        # Other workers take from it too.
        self._room = min(_UNCOUNTED, (self._most - waiting) // 16)
        if waiting >= self._most:
            raise NodeUnavailable(
                f"the outbox is full: {self._most} sessions with changes wait for the centre, as "
                "many as its URL allows, and no other session can be changed until it is back",
                contention=True,
            )

    def _led(self, db: sqlite3.Connection, key: str) -> list[Row]:
        """The row of this key, and those that its pointers lead to."""
        rows: list[Row] = []
        now = self.now()
        while len(rows) < MAX_POINTERS:
            row = self._rows.select(db, key)
            if row is None or any(row.record.key == other.record.key for other in rows):
                break
            rows.append(row)
            if row.record.successor is None or now >= row.record.idle_expires_at:
                break
            key = row.record.successor
        return rows

    def _bury(self, db: sqlite3.Connection, record: Record) -> None:
        """A tombstone of which the centre need not hear."""
        left = record._replace(payload=b"", successor=None)
        row = Row(left, State.ENDED, self.time())
        self._rows.insert(db, row, record.absolute_expires_at + _DAY)

    def _copy_ends(self, record: Record, confirmed_at: int) -> int:
        return min(record.idle_expires_at, confirmed_at + self._offline)

    # -- settling

    @in_transaction()
    def lease(self, db: sqlite3.Connection, settler: str, length: float) -> bool:
        """Let this settler alone settle for ``length`` seconds from now, if no other one does."""
        now = self.time()
        until = now + int(length * 1000)
        done = db.execute(
            "UPDATE gsession_edge_node SET settler = ?, settler_until = ? "
            "WHERE settler IN ('', ?) OR settler_until <= ? OR settler_until > ?",
            (settler, until, settler, now, now + 2 * int(length * 1000)),
        )
        return done.rowcount == 1

    @on_connection
    def release(self, db: sqlite3.Connection, settler: str, trouble: str, *, empty: bool) -> None:
        """Give the lease back; ``trouble`` as in ``EdgeFigures``, ``empty``: nothing is left."""
        db.execute(
            "UPDATE gsession_edge_node SET settler = '', trouble = ?, "
            "settled_at = CASE WHEN ? THEN ? ELSE settled_at END WHERE settler = ?",
            (trouble, empty, self.now(), settler),
        )

    @on_connection
    def last_number(self, db: sqlite3.Connection) -> int:
        (number,) = db.execute("SELECT numbers FROM gsession_edge_node").fetchone()
        return int(number)

    @on_connection
    def queue(
        self, db: sqlite3.Connection, *, ends: bool, after: int, upto: int, limit: int
    ) -> list[tuple[str, int]]:
        """The keys of rows to settle, ends or others, with their places in the queue, in order."""
        return self._rows.queue(db, ends=ends, after=after, upto=upto, limit=limit)

    @on_connection
    def is_queued(self, db: sqlite3.Connection, *, ends: bool = False) -> bool:
        """Whether anything is queued; with ``ends``, any end."""
        counts = self._rows.count(db, 1)
        return bool(counts[0] or (counts[1] and not ends))

    @in_transaction()
    def sending(self, db: sqlite3.Connection, row: Row) -> Row | None:
        """Note what is about to be sent, unless something is on its way already.

        None if there is nothing to send any more.
        """
        now = self._rows.select(db, row.record.key)
        if now is None or now.state is not row.state or now.queued is None:
            return None
        if now.sent is None:
            now = now._replace(sent=now.record, number=self._rows.next_number(db, self.time()))
            if now.state is State.CREATED:  # from here on, others may know it
                now = now._replace(confirmed_at=self.time())
            self._rows.insert(db, now, now.record.absolute_expires_at)
        return now

    @in_transaction()
    def unsent(self, db: sqlite3.Connection, row: Row) -> None:
        """It wasn't sent after all."""
        now = self._rows.select(db, row.record.key)
        if now is not None and now.number == row.number and now.state is row.state:
            back = now._replace(sent=None, number=None)
            self._rows.insert(db, back, now.record.absolute_expires_at)

    @in_transaction()
    def arrived(
        self,
        db: sqlite3.Connection,
        row: Row,
        there: Record,
        pointers: list[Record],
        confirmed_at: int,
    ) -> bool:
        """The centre has the sent changes of this row, in the record ``there``.

        ``pointers`` lead to it. Later changes stay queued. False if the session has ended here.
        """
        now = self._rows.select(db, row.record.key)
        if now is None or now.number != row.number or now.state is not row.state:
            return now is None or now.state is not State.ENDED
        assert row.sent is not None
        db.execute("UPDATE gsession_edge_node SET settled = settled + 1")
        if now.record == row.sent:
            self._rows.remove(db, row.record.key)
            for record in (*pointers, there):
                self._rows.copy(db, record, confirmed_at, self._copy_ends(record, confirmed_at))
            return True
        queued = self._rows.next_number(db, self.time())
        rest = Row(now.record, State.CHANGED, confirmed_at, queued, row.sent, typed=now.typed)
        self._rows.insert(db, rest, now.record.absolute_expires_at)
        return True

    @in_transaction()
    def dropped(self, db: sqlite3.Connection, row: Row, *, counts: bool = True) -> Row | None:
        """Give up the changes of a session that has ended at the centre; returns its row."""
        now = self._rows.select(db, row.record.key)
        if now is None or now.state not in (State.CHANGED, State.CREATED):
            return None
        if now.state is not row.state or now.number != row.number:
            return None
        if now.sent is not None and now.state is State.CREATED:
            # Another settler may have created it since, or still be about to.
            queued = self._rows.next_number(db, self.time())
            ended = Row(now.record, State.ENDED, now.confirmed_at, queued)
            self._rows.insert(db, ended, now.record.absolute_expires_at + _DAY)
        else:
            self._rows.remove(db, row.record.key)
        db.execute("UPDATE gsession_edge_node SET dropped = dropped + ?", (counts,))
        return now

    @in_transaction()
    def told(self, db: sqlite3.Connection, row: Row) -> None:
        """The centre has heard of this end."""
        now = self._rows.select(db, row.record.key)
        if now is not None and now.state is State.ENDED and now.queued == row.queued:
            self._bury(db, now.record)

    @on_connection
    def figures(self, db: sqlite3.Connection) -> EdgeFigures:
        ends, changes = self._rows.count(db, 10 * self._most)
        oldest = self._rows.oldest(db)
        node, *past = db.execute(
            "SELECT id, settled_at, settled, dropped, trouble FROM gsession_edge_node"
        ).fetchone()
        lag = 0.0 if oldest is None else max(0.0, (self.time() - oldest) / 1000)
        return EdgeFigures(node, ends, changes, oldest, lag, *past)
