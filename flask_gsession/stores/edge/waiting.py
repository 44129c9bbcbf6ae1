"""The changes that wait at a node for its centre. Every method is one transaction.

tests/simulation/edge_model.py shows for each condition here what goes wrong without it.
"""

from __future__ import annotations

import sqlite3

from ..base import Record
from ..parts import EdgeFigures
from ..sqlite.file import in_transaction, on_connection
from .copy import DAY, Copy
from .rows import Row, State


class Waiting:
    """The ends and changes in the file of ``copy`` that haven't reached the centre."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self.file = copy.file

    @in_transaction()
    def lease(self, db: sqlite3.Connection, settler: str, length: float) -> bool:
        """Give this settler the lease for ``length`` seconds, unless another one has it."""
        now = self._copy.time()
        until = now + int(length * 1000)
        done = db.execute(
            "UPDATE gsession_edge_node SET settler = ?, settler_until = ? "
            "WHERE settler IN ('', ?) OR settler_until <= ? OR settler_until > ?",
            (settler, until, settler, now, now + 2 * int(length * 1000)),
        )
        return done.rowcount == 1

    @on_connection
    def release(self, db: sqlite3.Connection, settler: str, trouble: str, *, empty: bool) -> None:
        """Release the lease. ``trouble``: as in ``EdgeFigures``. ``empty``: nothing is left."""
        db.execute(
            "UPDATE gsession_edge_node SET settler = '', trouble = ?, "
            "settled_at = CASE WHEN ? THEN ? ELSE settled_at END WHERE settler = ?",
            (trouble, empty, self._copy.now(), settler),
        )

    @on_connection
    def last_number(self, db: sqlite3.Connection) -> int:
        """The number that was used last."""
        (number,) = db.execute("SELECT numbers FROM gsession_edge_node").fetchone()
        return int(number)

    @on_connection
    def queue(
        self, db: sqlite3.Connection, *, ends: bool, after: int, upto: int, limit: int
    ) -> list[tuple[str, int]]:
        """The keys of rows to settle, ends or others, with their places in the queue, in order."""
        return self._copy.rows.queue(db, ends=ends, after=after, upto=upto, limit=limit)

    @on_connection
    def is_queued(self, db: sqlite3.Connection, *, ends: bool = False) -> bool:
        """Whether anything is queued; with ``ends``, whether any end is."""
        counts = self._copy.rows.count(db, 1)
        return bool(counts[0] or (counts[1] and not ends))

    @in_transaction()
    def sending(self, db: sqlite3.Connection, row: Row) -> Row | None:
        """Store the record that is about to be sent, unless one is on its way already. Returns None
        if there is nothing left to send.
        """
        now = self._copy.rows.select(db, row.record.key)
        if now is None or now.state is not row.state or now.queued is None:
            return None
        if now.sent is None:
            now = now._replace(
                sent=now.record, number=self._copy.rows.next_number(db, self._copy.time())
            )
            if now.state is State.CREATED:  # from here on, the centre may have it
                now = now._replace(confirmed_at=self._copy.time())
            self._copy.rows.insert(db, now, now.record.absolute_expires_at)
        return now

    @in_transaction()
    def unsent(self, db: sqlite3.Connection, row: Row) -> None:
        """Note that it wasn't sent."""
        now = self._copy.rows.select(db, row.record.key)
        if now is not None and now.number == row.number and now.state is row.state:
            back = now._replace(sent=None, number=None)
            self._copy.rows.insert(db, back, back.useful_until)

    @in_transaction()
    def arrived(
        self,
        db: sqlite3.Connection,
        row: Row,
        there: Record,
        pointers: list[Record],
        confirmed_at: int,
    ) -> bool:
        """Note that the centre has the sent changes of this row, in the record ``there``.
        ``pointers`` lead to it. Later changes stay queued. Returns False if the session has ended
        here.
        """
        now = self._copy.rows.select(db, row.record.key)
        if now is None or now.number != row.number or now.state is not row.state:
            return now is None or now.state is not State.ENDED
        assert row.sent is not None
        db.execute("UPDATE gsession_edge_node SET settled = settled + 1")
        if now.record == row.sent:
            self._copy.rows.remove(db, row.record.key)
            for record in (*pointers, there):
                self._copy.rows.copy(
                    db, record, confirmed_at, self._copy.copy_ends(record, confirmed_at)
                )
            return True
        queued = self._copy.rows.next_number(db, self._copy.time())
        rest = Row(now.record, State.CHANGED, confirmed_at, queued, row.sent, typed=now.typed)
        self._copy.rows.insert(db, rest, now.record.absolute_expires_at)
        return True

    @in_transaction()
    def dropped(self, db: sqlite3.Connection, row: Row, *, counts: bool = True) -> Row | None:
        """Drop the changes of a session that has ended at the centre. Returns its row."""
        now = self._copy.rows.select(db, row.record.key)
        if now is None or now.state not in (State.CHANGED, State.CREATED):
            return None
        if now.state is not row.state or now.number != row.number:
            return None
        if now.sent is not None and now.state is State.CREATED:
            # Another settler may have created it since, or may still do so.
            queued = self._copy.rows.next_number(db, self._copy.time())
            ended = Row(now.record, State.ENDED, now.confirmed_at, queued)
            self._copy.rows.insert(db, ended, now.record.absolute_expires_at + DAY)
        else:
            self._copy.rows.remove(db, row.record.key)
        db.execute("UPDATE gsession_edge_node SET dropped = dropped + ?", (counts,))
        return now

    @in_transaction()
    def end_delivered(self, db: sqlite3.Connection, row: Row) -> None:
        """Note that this end has reached the centre."""
        now = self._copy.rows.select(db, row.record.key)
        if now is not None and now.state is State.ENDED and now.queued == row.queued:
            self._copy.add_tombstone(db, now.record)

    @on_connection
    def figures(self, db: sqlite3.Connection) -> EdgeFigures:
        """The changes that wait, and the counts of settled ones."""
        ends, changes = self._copy.rows.count(db, 10 * self._copy.most)
        oldest = self._copy.rows.oldest(db)
        node, *past = db.execute(
            "SELECT id, settled_at, settled, dropped, trouble FROM gsession_edge_node"
        ).fetchone()
        lag = 0.0 if oldest is None else max(0.0, (self._copy.time() - oldest) / 1000)
        return EdgeFigures(node, ends, changes, oldest, lag, *past)
