"""Sessions in one SQLite file, shared by all workers of one machine: the embedded default.

WAL mode, one short immediate transaction per write. A save survives the end of the process; a
deletion and a rotation are also forced to the disk (``synchronous=FULL``), so that a power cut
cannot bring back a session that was logged out. Every create removes up to two expired records,
so that the file does not grow with the sessions of the past.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Gone, KeyTaken, SettingError, Stale, StoreUnavailable, UnreadableRecord
from .base import Record, StoreOptions, milliseconds

_APPLICATION_ID = 0x67536573  # "gSes"
_SCHEMA_VERSION = 1
_SCHEMA = """
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
"""
_COLUMNS = "version, created_at, idle_expires_at, absolute_expires_at, payload, successor"
_LIVE = "successor IS NULL AND idle_expires_at > ?"
_KEEP_IDLE = 16  # connections


class SQLiteStore:
    """Keeps records in the file at ``path``, made with mode 0600; its folder is made if missing.

    Safe with threads, gevent and several processes. A connection never crosses a fork.
    Raises ``SettingError`` where the file is a database of something else.
    """

    def __init__(self, path: str | os.PathLike[str], options: StoreOptions | None = None) -> None:
        options = options or StoreOptions()
        self.path = Path(path)
        self._clock = options.clock
        self._timeout = options.timeout
        self._prefix = options.prefix
        self._pool: deque[sqlite3.Connection] = deque()
        self._pid = os.getpid()
        self._inherited: list[deque[sqlite3.Connection]] = []
        self._lock = threading.Lock()

    def create(self, record: Record) -> None:
        now = milliseconds(self._clock)
        with self._transaction() as db:
            db.execute(
                "DELETE FROM gsession WHERE key IN "
                "(SELECT key FROM gsession WHERE idle_expires_at <= ? LIMIT 2)",
                (now,),
            )
            there = self._select(db, record.key)
            if there is not None and there.version == record.version:
                return
            if there is not None and now < there.idle_expires_at:
                raise KeyTaken
            self._insert(db, record)

    def load(self, key: str) -> Record | None:
        with self._connection() as db:
            record = self._select(db, key)
        if record is None or milliseconds(self._clock) >= record.idle_expires_at:
            return None
        return record

    def save(self, record: Record, expected_version: int) -> None:
        now = milliseconds(self._clock)
        with self._connection() as db:
            done = db.execute(
                "UPDATE gsession SET version = ?, created_at = ?, idle_expires_at = ?, "
                "absolute_expires_at = ?, payload = ? "
                f"WHERE key = ? AND version IN (?, ?) AND {_LIVE}",
                (
                    *record[1:6],
                    self._prefix + record.key,
                    expected_version,
                    record.version,
                    now,
                ),
            )
            if done.rowcount == 0:
                self._expect(self._select(db, record.key), None, now)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        now = milliseconds(self._clock)
        with self._connection() as db:
            done = db.execute(
                "UPDATE gsession SET idle_expires_at = "
                "min(max(idle_expires_at, ?), absolute_expires_at) "
                f"WHERE key = ? AND version = ? AND {_LIVE}",
                (idle_expires_at, self._prefix + record.key, record.version, now),
            )
            return done.rowcount == 1

    def replace(
        self, key: str, record: Record, expected_version: int, grace_until: int | None
    ) -> None:
        now = milliseconds(self._clock)
        with self._transaction(durable=True) as db:
            taken = self._select(db, record.key)
            if taken is not None and taken.version == record.version:
                return
            old = self._select(db, key)
            old = self._expect(old, expected_version, now)
            if taken is not None and now < taken.idle_expires_at:
                raise KeyTaken
            self._insert(db, record)
            if grace_until is None:
                self._remove(db, key)
            else:
                self._insert(db, old.pointer(record, grace_until))

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        now = milliseconds(self._clock)
        with self._transaction(durable=True) as db:
            record = self._select(db, key)
            if expected_version is not None:
                self._expect(record, expected_version, now)
            found = False
            while record is not None:
                found = found or record.is_live(now)
                self._remove(db, record.key)
                record = self._select(db, record.successor) if record.successor else None
            return found

    def sweep(self, limit: int) -> int:
        """Remove at most ``limit`` expired records in one short transaction."""
        with self._transaction() as db:
            done = db.execute(
                "DELETE FROM gsession WHERE key IN "
                "(SELECT key FROM gsession WHERE idle_expires_at <= ? LIMIT ?)",
                (milliseconds(self._clock), limit),
            )
            return done.rowcount

    def close(self) -> None:
        while self._pool:
            self._pool.pop().close()

    def _select(self, db: sqlite3.Connection, key: str) -> Record | None:
        row = db.execute(
            f"SELECT {_COLUMNS} FROM gsession WHERE key = ?", (self._prefix + key,)
        ).fetchone()
        if row is None:
            return None
        record = Record(key, *row)
        if not (
            type(record.payload) is bytes
            and all(type(number) is int for number in record[1:5])
            and type(record.successor) in (str, type(None))
        ):
            raise UnreadableRecord("corrupt", "columns of wrong types")
        return record

    def _insert(self, db: sqlite3.Connection, record: Record) -> None:
        db.execute(
            f"INSERT OR REPLACE INTO gsession (key, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self._prefix + record.key, *record[1:]),
        )

    def _remove(self, db: sqlite3.Connection, key: str) -> None:
        db.execute("DELETE FROM gsession WHERE key = ?", (self._prefix + key,))

    @staticmethod
    def _expect(record: Record | None, version: int | None, now: int) -> Record:
        if record is None or not record.is_live(now):
            raise Gone
        if record.version != version:
            raise Stale
        return record

    @contextmanager
    def _transaction(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._connection() as db:
            if durable:
                db.execute("PRAGMA synchronous=FULL")
            try:
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            finally:
                if durable:
                    db.execute("PRAGMA synchronous=NORMAL")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of this process, translated errors, back in the pool afterwards."""
        if self._pid != os.getpid():
            self._leave_parent()
        db: sqlite3.Connection | None = None
        try:
            try:
                db = self._pool.pop()
            except IndexError:
                db = self._open()
            yield db
        except (Gone, Stale, KeyTaken, UnreadableRecord):
            raise
        except sqlite3.Error as error:
            # A connection in an unknown state is not used again.
            if db is not None:
                db.close()
            db = None
            raise StoreUnavailable(f"sqlite: {error}") from error
        except BaseException:
            if db is not None:
                db.close()
            db = None
            raise
        finally:
            if db is not None:
                if len(self._pool) < _KEEP_IDLE:
                    self._pool.append(db)
                else:
                    db.close()

    def _leave_parent(self) -> None:
        """Forget connections opened before a fork: using or closing them here is unsafe."""
        with self._lock:
            if self._pid != os.getpid():
                self._inherited.append(self._pool)
                self._pool = deque()
                self._pid = os.getpid()

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StoreUnavailable(f"sqlite: cannot open {self.path}: {error.strerror}") from error
        db = sqlite3.connect(
            self.path,
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=32,
        )
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (schema_version,) = db.execute("PRAGMA user_version").fetchone()
        if application_id != _APPLICATION_ID or schema_version != _SCHEMA_VERSION:
            self._create_schema(db)
        db.execute("PRAGMA synchronous=NORMAL")

    def _create_schema(self, db: sqlite3.Connection) -> None:
        self._switch_to_wal(db)
        db.execute("BEGIN IMMEDIATE")
        try:
            (application_id,) = db.execute("PRAGMA application_id").fetchone()
            (schema_version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application_id != _APPLICATION_ID and tables:
                raise SettingError(
                    f"SESSION_STORE: {self.path} is an SQLite database of another program; "
                    "give the sessions a file of their own"
                )
            if schema_version > _SCHEMA_VERSION:
                raise SettingError(
                    f"SESSION_STORE: {self.path} was written by a newer Flask-GSession"
                )
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _switch_to_wal(self, db: sqlite3.Connection) -> None:
        # SQLite does not apply its busy timeout to this switch, and workers start together.
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.01)
