"""Sessions in one SQLite file, shared by all workers of one machine: the embedded default.

WAL mode, one short immediate transaction per write. A save survives the end of the process; a
deletion and a rotation are also forced to the disk (``synchronous=FULL``), so that a power cut
cannot bring back a session that was logged out. Every create removes up to two expired records,
so that the file does not grow with the sessions of the past.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import shutil
import sqlite3
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from ...errors import (
    Gone,
    KeyTaken,
    LeaseLost,
    QueueFull,
    SettingError,
    Stale,
    StoreUnavailable,
    UnreadableRecord,
)
from ...events import logger
from ...processes import is_at_work, process
from ..base import TICKET, Deleted, Record, Store, milliseconds
from ..interrupts import reraise_interruption
from ..lease import Lease, poll
from ..parts import COUNT_ALL, MORE, Finding, Page, Tidied, itself
from ..rights import OTHERS, is_foreign_link, others_may_replace, secure
from ..support import StoreOptions, closing

P = ParamSpec("P")
T = TypeVar("T")

# Answers of a method; the connection is well.
_REFUSALS = (Gone, Stale, KeyTaken, LeaseLost, QueueFull, UnreadableRecord)
_APPLICATION_ID = 0x67536573  # "gSes"
_SCHEMA_VERSION = 4
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
_TRIGGERS = (
    """
    CREATE TRIGGER IF NOT EXISTS gsession_lease_ends AFTER DELETE ON gsession
    BEGIN DELETE FROM gsession_lease WHERE key = old.key; END
    """,
    """
    CREATE TRIGGER IF NOT EXISTS gsession_blob_ends AFTER DELETE ON gsession_blob
    BEGIN DELETE FROM gsession_frame WHERE name = old.name; END
    """,
)
_COLUMNS = "version, created_at, idle_expires_at, absolute_expires_at, payload, successor"
_LIVE = "successor IS NULL AND idle_expires_at > ?"
_BETWEEN = "key > ? AND key >= ? AND key < ?"
_ORPHANED = "NOT EXISTS (SELECT 1 FROM gsession WHERE gsession.key = gsession_lease.key)"
_KEEP_IDLE = 16  # connections
_BLOBS_AT_ONCE = 10  # to remove: each may be of many megabytes
_LITTLE_SPACE = 64 * 2**20  # bytes
_LOG_BYTES = 16 * 2**20  # of the write-ahead log that stay on the disk
_LOOK_AGAIN = 1.0  # seconds after which to see whether the file is still the one at the path
_WAIT_TO_FORK = 1.0  # seconds, for calls that are under way in other threads

_File = tuple[int, int]  # device and inode


def _checked(record: Record) -> Record:
    if not (
        type(record.payload) is bytes
        and all(type(number) is int for number in record[1:5])
        and type(record.successor) in (str, type(None))
    ):
        raise UnreadableRecord("corrupt", "columns of wrong types")
    return record


def _close_all(pool: deque[_Connection]) -> None:
    while pool:
        pool.pop().close()


class _Connection(sqlite3.Connection):
    """A connection of this package's, with the file that it has open."""

    def __init__(self, file: _File | None, *arguments: Any, **options: Any) -> None:
        self.files = {file}  # more than one where it is replaced meanwhile
        _opened.connections.add(self)
        super().__init__(*arguments, **options)

    def close(self) -> None:
        super().close()
        _opened.connections.discard(self)


class _Opened:
    """The connections of this process to all files, and the files that it must leave alone.

    SQLite counts a file's locks in the memory of the process. A child that is forked while a file
    is open inherits the count without the locks, and would write into a file that others believe
    unused. Nothing repairs that: neither a new connection nor closing the inherited ones.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # around what makes or changes files
        self.forking = threading.RLock()  # held while a fork that Python sees is under way
        self.connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self.inherited: set[_File] = set()
        self.stores: weakref.WeakSet[SQLiteStore] = weakref.WeakSet()
        process.register(self.begin)
        os.register_at_fork(before=self.before_fork, after_in_parent=self.after_fork)

    def begin(self) -> None:
        """In a forked process: what is open is its parent's, and must not even be closed."""
        self.lock = threading.Lock()
        self.forking = threading.RLock()
        for connection in list(self.connections):
            self.inherited.update(filter(None, connection.files))
            _keep_for_ever(connection)
        self.connections.clear()
        for store in list(self.stores):
            store._start_pool()

    def before_fork(self) -> None:
        """Close all connections; those that are in use as they come back, if they do so soon."""
        self.forking.acquire()
        over = time.monotonic() + _WAIT_TO_FORK
        while True:
            for store in list(self.stores):
                store.close()
            if not self.connections or time.monotonic() >= over:
                return
            time.sleep(0.001)

    def after_fork(self) -> None:
        """In the parent."""
        self.forking.release()


def _keep_for_ever(connection: _Connection) -> None:
    """Or it would be closed at the end of the interpreter, which could write what is outdated."""
    with suppress(ImportError):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


_opened = _Opened()


@contextmanager
def _alone_in(folder: Path, seconds: float) -> Iterator[bool]:
    """Of all processes one at a time; False where this cannot be had.

    Raises ``OSError`` where another one is in there for longer than ``seconds``.
    """
    deadline = time.monotonic() + seconds
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        reraise_interruption(error)
        yield False
        return
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise OSError(errno.ETIMEDOUT, "another process locks its folder") from None
                time.sleep(0.01)
            except OSError as error:  # not on every file system
                reraise_interruption(error)
                yield False
                return
            else:
                break
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # also where a child was forked, and has it open
    finally:
        os.close(lock)


def _on_connection(
    method: Callable[Concatenate[SQLiteStore, sqlite3.Connection, P], T],
) -> Callable[Concatenate[SQLiteStore, P], T]:
    """The method, on a connection of the pool."""
    return _decorated(method)


def _in_transaction(
    *, durable: bool = False
) -> Callable[
    [Callable[Concatenate[SQLiteStore, sqlite3.Connection, P], T]],
    Callable[Concatenate[SQLiteStore, P], T],
]:
    """The method, in a transaction of its own that writes; ``durable``: forced to the disk."""
    return partial(_decorated, transaction=True, durable=durable)


def _decorated(
    method: Callable[Concatenate[SQLiteStore, sqlite3.Connection, P], T], **how: bool
) -> Callable[Concatenate[SQLiteStore, P], T]:
    @functools.wraps(method)
    def call(store: SQLiteStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return store._within(lambda db: method(store, db, *args, **kwargs), **how)

    del call.__wrapped__  # it has another signature
    return call


class SQLiteStore(Store):
    """Keeps records in the file at ``path``, made with mode 0600; its folder is made if missing.

    A file that was there before loses the rights of others, with a warning in the log.

    Safe with threads, gevent and several processes. Connections are closed before a fork by
    ``os.fork``, and after use outside a request. A process that is forked while one is open, as in
    C after a request, is refused with ``StoreUnavailable``: SQLite would damage the file.
    Raises ``SettingError`` where the file is a database of something else, or is another user's.
    """

    leases = blobs = scans = upkeep = counts = checks = itself

    def __init__(self, path: str | os.PathLike[str], options: StoreOptions | None = None) -> None:
        options = options or StoreOptions()
        self.path = Path(path)
        self._clock = options.clock
        self._timeout = options.timeout
        self._prefix = options.prefix
        self._file: _File | None = None
        self._look_at = 0.0  # of time.monotonic
        self._warned_of_folder = False
        self._start_pool()
        _opened.stores.add(self)

    @_in_transaction()
    def create(self, db: sqlite3.Connection, record: Record) -> None:
        now = milliseconds(self._clock)
        db.execute(
            "DELETE FROM gsession WHERE key IN "
            "(SELECT key FROM gsession WHERE idle_expires_at <= ? LIMIT 2)",
            (now,),
        )
        there = self._select(db, record.key)
        if there is not None and there.version == record.version:
            return
        if there is not None:
            if now < there.idle_expires_at:
                raise KeyTaken
            self._remove(db, record.key)
        self._insert(db, record)

    @_on_connection
    def load(self, db: sqlite3.Connection, key: str) -> Record | None:
        return self._select(db, key)

    def save(
        self,
        record: Record,
        expected_version: int,
        lease: str | None = None,
        *,
        shorten: bool = False,
    ) -> None:
        def save(db: sqlite3.Connection) -> None:
            now = milliseconds(self._clock)
            if lease is not None:
                there = self._select(db, record.key)
                if there is None or there.version != record.version:
                    self._expect(db, there, expected_version, lease)
            _, version, created, idle, absolute, payload, _ = record
            done = db.execute(
                "UPDATE gsession SET version = ?, created_at = ?, "
                "idle_expires_at = max(?, min(idle_expires_at, ?)), "
                "absolute_expires_at = ?, payload = ? "
                f"WHERE key = ? AND version = ? AND {_LIVE}",
                (
                    version,
                    created,
                    idle,
                    idle if shorten else absolute,  # of the stored one, what counts at most
                    absolute,
                    payload,
                    self._prefix + record.key,
                    expected_version,
                    now,
                ),
            )
            if done.rowcount == 0:
                there = self._select(db, record.key)
                if there is None or there.version != record.version:
                    self._expect(db, there, None, None)

        self._within(save, transaction=lease is not None)

    @_on_connection
    def renew(self, db: sqlite3.Connection, record: Record, idle_expires_at: int) -> bool:
        now = milliseconds(self._clock)
        done = db.execute(
            "UPDATE gsession SET idle_expires_at = "
            "min(max(idle_expires_at, ?), absolute_expires_at) "
            f"WHERE key = ? AND version = ? AND {_LIVE}",
            (idle_expires_at, self._prefix + record.key, record.version, now),
        )
        return done.rowcount == 1

    @_in_transaction(durable=True)
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
        now = milliseconds(self._clock)
        taken = self._select(db, record.key)
        if taken is not None and taken.version == record.version:
            return
        old = self._expect(db, self._select(db, key), expected_version, lease)
        if taken is not None and now < taken.idle_expires_at:
            raise KeyTaken
        self._insert(db, record if shorten else record.kept_as_long_as(old))
        self._remove(db, key)
        if pointer is not None:
            self._insert(db, pointer)

    @_in_transaction(durable=True)
    def delete(
        self,
        db: sqlite3.Connection,
        key: str,
        expected_version: int | None = None,
        lease: str | None = None,
    ) -> Deleted:
        now = milliseconds(self._clock)
        record = self._select(db, key)
        if expected_version is not None:
            self._expect(db, record, expected_version, lease)
        record = self._pop(db, record, now)
        return Deleted(record is not None, record)

    def _pop(self, db: sqlite3.Connection, record: Record | None, now: int) -> Record | None:
        while True:  # each pointer goes, so there is an end
            if record is None:
                return None
            self._remove(db, record.key)
            if record.successor is None or now >= record.idle_expires_at:
                return record if record.is_live(now) else None
            record = self._select(db, record.successor)

    @_on_connection
    def count(self, db: sqlite3.Connection) -> int:
        """About how many sessions are live; 60 ms for a million, in which nobody waits."""
        now = milliseconds(self._clock)
        ours = (self._prefix, self._prefix + "\x7f")
        (live,) = db.execute(
            "SELECT count(*) FROM gsession WHERE idle_expires_at > ?", (now,)
        ).fetchone()
        if live <= COUNT_ALL:
            # The unary plus keeps SQLite to the index of the expiry.
            (live,) = db.execute(
                f"SELECT count(*) FROM gsession WHERE {_LIVE} "
                "AND +key > ? AND +key < ? AND +key <> ?",
                (now, *ours, self._prefix + TICKET),
            ).fetchone()
            return int(live)
        # Of each index alone, without a look at the rows: those under other prefixes are
        # taken to live as long as ours.
        (mine,) = db.execute(
            "SELECT count(*) FROM gsession WHERE key > ? AND key < ?", ours
        ).fetchone()
        (everybodys,) = db.execute("SELECT count(*) FROM gsession").fetchone()
        return int(live * mine / max(1, everybodys))

    @_in_transaction()
    def write_frame(
        self, db: sqlite3.Connection, name: str, offset: int, frame: bytes, expires_at: int
    ) -> None:
        now = milliseconds(self._clock)
        name = self._prefix + name
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

    @_on_connection
    def read_frame(self, db: sqlite3.Connection, name: str, offset: int, size: int) -> bytes | None:
        row = db.execute(
            "SELECT frame FROM gsession_frame JOIN gsession_blob USING (name) "
            "WHERE name = ? AND start = ? AND expires_at > ?",
            (self._prefix + name, offset, milliseconds(self._clock)),
        ).fetchone()
        return row[0] if row is not None and type(row[0]) is bytes else None

    @_in_transaction()
    def renew_blobs(self, db: sqlite3.Connection, names: Sequence[str], expires_at: int) -> None:
        now = milliseconds(self._clock)
        db.executemany(
            "UPDATE gsession_blob SET expires_at = max(expires_at, ?) "
            "WHERE name = ? AND expires_at > ?",
            [(expires_at, self._prefix + name, now) for name in names],
        )

    @_in_transaction()
    def discard_blobs(self, db: sqlite3.Connection, names: Sequence[str], at: int) -> None:
        now = milliseconds(self._clock)
        if at <= now:
            statement = "DELETE FROM gsession_blob WHERE name = ?"
            db.executemany(statement, [(self._prefix + name,) for name in names])
        else:
            statement = "UPDATE gsession_blob SET expires_at = min(expires_at, ?) WHERE name = ?"
            db.executemany(statement, [(at, self._prefix + name) for name in names])

    def _sweep_blobs(self, db: sqlite3.Connection, now: int, limit: int) -> int:
        done = db.execute(
            "DELETE FROM gsession_blob WHERE name IN "
            "(SELECT name FROM gsession_blob WHERE expires_at <= ? LIMIT ?)",
            (now, limit),
        )
        return done.rowcount

    @_on_connection
    def scan(
        self, db: sqlite3.Connection, cursor: str = "", limit: int = 200, begins: str = ""
    ) -> Page:
        now = milliseconds(self._clock)
        rows = db.execute(
            f"SELECT key, {_COLUMNS} FROM gsession WHERE {_BETWEEN} ORDER BY key LIMIT ?",
            (*self._range(cursor, begins), limit),
        ).fetchall()
        records, unreadable = [], []
        keys = [row[0][len(self._prefix) :] for row in rows]
        for key, row in zip(keys, rows, strict=True):
            try:
                record = _checked(Record(key, *row[1:]))
            except UnreadableRecord:
                unreadable.append(key)
            else:
                if now < record.idle_expires_at:
                    records.append(record)
        return Page(records, unreadable, keys[-1] if len(keys) == limit else "")

    def tidy(self, cursor: str = "", limit: int = 1000, *, dry_run: bool = False) -> Tidied:
        """Takes the expired by their index, so that it sees no others; the cursor says nothing."""
        return self._within(
            lambda db: self._tidied(db, limit, dry_run=dry_run), transaction=not dry_run
        )

    def _tidied(self, db: sqlite3.Connection, limit: int, *, dry_run: bool) -> Tidied:
        now = milliseconds(self._clock)
        found = {}
        more = False
        for kind, table, condition, arguments in (
            ("expired sessions", "gsession", "idle_expires_at <= ?", (now,)),
            # Text and blobs are behind every number.
            ("unreadable records", "gsession", "idle_expires_at >= ''", ()),
            ("orphaned locks", "gsession_lease", _ORPHANED, ()),
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

    @_in_transaction()
    def acquire(
        self, db: sqlite3.Connection, key: str, owner: str, lease_ms: int, max_waiters: int
    ) -> int:
        now = milliseconds(self._clock)  # after the wait for the database
        record = self._select(db, key)
        if record is None or not record.is_live(now):
            raise Gone
        lease = self._lease(db, key)
        answer = lease.acquire(owner, now, lease_ms, max_waiters)
        self._put_lease(db, key, lease)
        return answer

    @_on_connection
    def extend(self, db: sqlite3.Connection, key: str, owner: str, lease_ms: int) -> bool:
        now = milliseconds(self._clock)
        done = db.execute(
            "UPDATE gsession_lease SET until = ?, length = ? "
            "WHERE key = ? AND owner = ? AND until > ?",
            (now + lease_ms, lease_ms, self._prefix + key, owner, now),
        )
        return done.rowcount == 1

    @_in_transaction()
    def release(self, db: sqlite3.Connection, key: str, owner: str) -> bool:
        lease = self._lease(db, key)
        held = lease.release(owner, milliseconds(self._clock))
        self._put_lease(db, key, lease)
        return held

    def wait_for_release(self, key: str, owner: str, seconds: float) -> None:
        poll(lambda: self._is_turn_of(key, owner), seconds)

    @_on_connection
    def _is_turn_of(self, db: sqlite3.Connection, key: str, owner: str) -> bool:
        return self._lease(db, key).is_turn_of(owner, milliseconds(self._clock))

    @_on_connection
    def check(self, db: sqlite3.Connection) -> list[Finding]:
        (journal,) = db.execute("PRAGMA journal_mode").fetchone()
        try:
            (sound,) = db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:  # damaged beyond a list of what is damaged
            sound = str(error)
        folder = self.path.parent
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (self.path, folder)]
        for beside in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                modes[0] |= stat.S_IMODE(os.stat(f"{os.path.realpath(self.path)}{beside}").st_mode)
        shared = others_may_replace(folder)
        free = shutil.disk_usage(folder).free
        return [
            Finding("ok", "integrity")
            if sound == "ok"
            else Finding(
                "error",
                "integrity",
                str(sound),
                "Stop the application; restore the file, without -wal and -shm.",
            ),
            Finding("ok", "journal", journal)
            if journal == "wal"
            else Finding(
                "warning", "journal", journal, "Readers and writers wait: use a local disk."
            ),
            Finding("ok", "file rights", f"{modes[0]:o}")
            if not modes[0] & OTHERS
            else Finding(
                "error",
                "file rights",
                f"{modes[0]:o}",
                f"Others may read it: chmod 600 {self.path}*",
            ),
            Finding("ok", "folder rights", f"{modes[1]:o}")
            if not shared
            else Finding(
                "error",
                "folder rights",
                f"{modes[1]:o}",
                f"Others may put another file in its place: chmod go-w {folder}",
            ),
            Finding("ok", "disk", f"{free >> 20} MiB free")
            if free >= _LITTLE_SPACE
            else Finding(
                "error", "disk", f"{free >> 20} MiB free", "Soon nothing can be saved: make room."
            ),
        ]

    def close(self) -> None:
        _close_all(self._pool)

    def _lease(self, db: sqlite3.Connection, key: str) -> Lease:
        row = db.execute(
            "SELECT owner, until, length, waiters FROM gsession_lease WHERE key = ?",
            (self._prefix + key,),
        ).fetchone()
        if row is None:
            return Lease()
        try:
            return Lease.of(row[0], row[1], row[2], json.loads(row[3]))
        except (ValueError, TypeError, RecursionError):
            return Lease()  # junk

    def _put_lease(self, db: sqlite3.Connection, key: str, lease: Lease) -> None:
        name = self._prefix + key
        if lease == Lease():
            db.execute("DELETE FROM gsession_lease WHERE key = ?", (name,))
        else:
            db.execute(
                "INSERT OR REPLACE INTO gsession_lease VALUES (?, ?, ?, ?, ?)",
                (name, lease.owner, lease.until, lease.length, json.dumps(lease.waiters)),
            )

    def _select(self, db: sqlite3.Connection, key: str) -> Record | None:
        row = db.execute(
            f"SELECT {_COLUMNS} FROM gsession WHERE key = ?", (self._prefix + key,)
        ).fetchone()
        if row is None:
            return None
        return _checked(Record(key, *row))

    def _range(self, cursor: str, begins: str) -> tuple[str, str, str]:
        """For ``_BETWEEN``: the names of keys behind ``cursor`` that start with ``begins``."""
        start = self._prefix + begins
        return self._prefix + cursor, start, f"{start}\U0010ffff"

    def _insert(self, db: sqlite3.Connection, record: Record) -> None:
        db.execute(
            f"INSERT OR REPLACE INTO gsession (key, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self._prefix + record.key, *record[1:]),
        )

    def _remove(self, db: sqlite3.Connection, key: str) -> None:
        db.execute("DELETE FROM gsession WHERE key = ?", (self._prefix + key,))

    def _expect(
        self, db: sqlite3.Connection, record: Record | None, version: int | None, lease: str | None
    ) -> Record:
        now = milliseconds(self._clock)
        if record is None or not record.is_live(now):
            raise Gone
        if lease is not None and not self._lease(db, record.key).is_held_by(lease, now):
            raise LeaseLost
        if record.version != version:
            raise Stale
        return record

    def _within(
        self,
        work: Callable[[sqlite3.Connection], T],
        *,
        transaction: bool = False,
        durable: bool = False,
    ) -> T:
        """What ``work`` makes of a connection of this process; errors translated.

        One function, and no context manager, for those that an interrupt strikes: where one is left
        in the middle, a finalizer goes on with it later, and may be struck itself. A connection
        goes back into the pool only when all is done, and is closed otherwise.
        """
        process.notice()
        if time.monotonic() >= self._look_at:
            self._look_for_file()
        pool = self._pool
        db: _Connection | None = None
        keep = True
        try:
            try:
                db = pool.pop()
            except IndexError:
                keep = is_at_work()  # else the process may be forked without a hook of Python's
                db = self._open()
            try:
                if durable:
                    db.execute("PRAGMA synchronous=FULL")
                if transaction:
                    db.execute("BEGIN IMMEDIATE")
                answer = work(db)
                if transaction:
                    db.execute("COMMIT")
                if durable:
                    db.execute("PRAGMA synchronous=NORMAL")
            except _REFUSALS:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if durable:
                    db.execute("PRAGMA synchronous=NORMAL")
                raise
        except _REFUSALS:
            if db is not None:
                self._give_back(db, pool if keep else None)
            raise
        except sqlite3.Error as error:
            # A connection in an unknown state is not used again.
            if db is not None:
                db.close()
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_READONLY:
                _close_all(pool)  # opened for reading only, they would stay so
            busy = code == sqlite3.SQLITE_BUSY
            raise StoreUnavailable(f"sqlite: {error}", contention=busy) from error
        except BaseException:
            if db is not None:
                db.close()
            raise
        self._give_back(db, pool if keep else None)
        return answer

    def _give_back(self, db: _Connection, pool: deque[_Connection] | None) -> None:
        if pool is self._pool and len(pool) < _KEEP_IDLE:
            pool.append(db)
        else:
            db.close()

    def _start_pool(self) -> None:
        self._pool: deque[_Connection] = deque()
        closing(self, partial(_close_all, self._pool))

    def _look_for_file(self) -> None:
        """Leave a file that was deleted or replaced: others work on the one at the path by now."""
        self._look_at = time.monotonic() + _LOOK_AGAIN
        file = None
        try:
            there = os.stat(self.path)
            file = there.st_dev, there.st_ino
        except FileNotFoundError:
            pass
        except OSError as error:
            reraise_interruption(error)
            return
        with _opened.lock:
            pool, before = self._pool, self._file
            self._file = file
            if before not in (None, file):
                self._start_pool()
                _close_all(pool)

    def _open(self) -> _Connection:
        try:
            if not self.path.exists():
                self._make_file()
            self._secure_files()
        except OSError as error:
            reraise_interruption(error)
            raise StoreUnavailable(f"sqlite: cannot open {self.path}: {error.strerror}") from error
        self._look_for_file()  # and again afterwards: it may be deleted meanwhile
        before = self._file
        if before in _opened.inherited:
            raise StoreUnavailable(
                f"sqlite: {self.path} was open when this process was forked, and SQLite cannot use "
                "it safely here. Fork before the first request, or call Session.close(app) before "
                "the fork; with uWSGI, set lazy-apps = true"
            )
        with _opened.forking:
            db = _Connection(
                before,
                f"file://{quote(os.fsencode(self.path.absolute()))}?mode=rw",
                uri=True,
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
        self._look_for_file()
        db.files.add(self._file)
        return db

    def _make_file(self) -> None:
        """Make the file, and first remove what a deleted one left beside it.

        SQLite would take that for its own, and cut the memory short that connections to the deleted
        file still share: that ends their process.
        """
        path = Path(os.path.realpath(self.path))  # of a link SQLite uses the place it leads to
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone_in(path.parent, self._timeout) as alone, _opened.lock:
            if path.exists():
                return
            for left in ("-wal", "-shm") if alone else ():
                Path(f"{path}{left}").unlink(missing_ok=True)
            # Only ever on a file that no connection of this process has open: closing any
            # descriptor of a file drops all locks that the process holds on it.
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def _secure_files(self) -> None:
        """Let nobody else read or write the file, or what SQLite keeps beside it."""
        if is_foreign_link(self.path):
            raise SettingError(f"SESSION_STORE: {self.path} is a symbolic link of another user's")
        path = os.path.realpath(self.path)
        for part in (path, f"{path}-wal", f"{path}-shm"):
            with suppress(FileNotFoundError):
                problem = secure(part)
                if problem:
                    raise SettingError(f"SESSION_STORE: {part} {problem}")
        folder = os.path.dirname(path)
        if not self._warned_of_folder and others_may_replace(folder, 0o002):
            self._warned_of_folder = True
            logger.warning(
                "Everybody on this machine may put another file in the place of %s: chmod o-w %s",
                path,
                folder,
            )

    def _prepare(self, db: sqlite3.Connection) -> None:
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (schema_version,) = db.execute("PRAGMA user_version").fetchone()
        if application_id != _APPLICATION_ID or schema_version != _SCHEMA_VERSION:
            self._create_schema(db)
        db.execute("PRAGMA synchronous=NORMAL")
        # What one large removal logs does not keep its place on the disk for good.
        db.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
        # Text that is none must look like a corrupt record, not like a store that is down.
        db.text_factory = lambda text: text.decode("utf-8", "replace")

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
            if schema_version < _SCHEMA_VERSION:
                db.execute("DROP TABLE IF EXISTS gsession_lease")  # of no lasting value
            for statement in (*_SCHEMA.split(";"), *_TRIGGERS):
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
