"""The SQLite file: its connections in this process, forks and access rights."""

from __future__ import annotations

import errno
import functools
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
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
from ...processes import at_fork, is_at_work, process
from .. import file_locks
from ..interrupts import reraise_interruption
from ..rights import is_foreign_link, others_may_replace, secure
from ..support import closing, deadline, time_left
from .layout import APPLICATION_ID, SCHEMA, SCHEMA_VERSION, TRIGGERS, AddedColumn

P = ParamSpec("P")
T = TypeVar("T")

# Errors that are a method's answer: the connection is intact.
_REFUSALS = (Gone, Stale, KeyTaken, LeaseLost, QueueFull, UnreadableRecord)
_KEEP_IDLE = 16  # connections
_LOG_BYTES = 16 * 2**20  # of the write-ahead log that are kept on disk
_LOOK_AGAIN = 1.0  # seconds between checks that the path still leads to this file
_WAIT_TO_FORK = 1.0  # seconds, for running calls in other threads

_File = tuple[int, int]  # device and inode


def _close_all(pool: deque[_Connection]) -> None:
    while True:
        try:
            connection = pool.pop()  # unless another thread was faster
        except IndexError:
            return
        connection.close()


_numbers = count()


class _Connection(sqlite3.Connection):
    """One of our connections, with the file that it has open."""

    def __init__(self, file: _File | None, name: str, *, timeout: float, **options: Any) -> None:
        self.number = next(_numbers)
        self.timeout = timeout  # seconds, for other writers
        self.files = {file}  # more than one if the file is replaced while it is open
        _opened.connections.add(self)
        super().__init__(name, timeout=timeout, **options)

    def wait_at_most(self, seconds: float) -> None:
        """Set how long to wait for other writers."""
        if seconds != self.timeout:
            self.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")
            self.timeout = seconds

    def close(self) -> None:
        super().close()
        _opened.connections.discard(self)


class _Opened:
    """The connections of this process to all files, and the files that it must leave alone.

    SQLite counts a file's locks in the memory of the process. A child that is forked while a file
    is open inherits the count without the locks, and would write into a file that others believe
    unused. Neither a new connection nor closing the inherited ones repairs that.
    """

    def __init__(self) -> None:
        # Held while files are created or changed. A signal handler may call the store, too.
        self.lock = threading.RLock()
        self.forking = threading.RLock()  # held during a fork that Python sees
        self.connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self.inherited: set[_File] = set()
        self.files: weakref.WeakSet[SQLiteFile] = weakref.WeakSet()
        process.register(self.begin)
        at_fork(before=self.before_fork, after_in_parent=self.after_fork)

    def begin(self) -> None:
        """In a forked process: open connections belong to the parent, and mustn't be closed."""
        self.lock = threading.RLock()
        self.forking = threading.RLock()
        for connection in list(self.connections):
            self.inherited.update(filter(None, connection.files))
            _leak(connection)
        self.connections.clear()
        for file in list(self.files):
            file._start_pool()

    def before_fork(self) -> None:
        """Close all connections, busy ones as soon as they are returned, within a short wait."""
        self.forking.acquire()
        over = time.monotonic() + _WAIT_TO_FORK
        while True:
            for file in list(self.files):
                file.close()
            if not self.connections or time.monotonic() >= over:
                return
            time.sleep(0.001)

    def after_fork(self) -> None:
        self.forking.release()


def _leak(connection: _Connection) -> None:
    """Leak the connection: closing it, as the interpreter does at exit, could write old data."""
    with suppress(ImportError):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


_opened = _Opened()


@contextmanager
def _folder_lock(folder: Path, seconds: float) -> Iterator[bool]:
    """Lock the folder against other processes. Yields False if it doesn't support locks.

    Raises ``OSError`` if another process holds the lock for longer than ``seconds``.
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
                file_locks.lock(lock, wait=False)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise OSError(
                        errno.ETIMEDOUT, "another process has locked its folder"
                    ) from None
                time.sleep(0.01)
            except OSError as error:  # some file systems, and Windows, have no locks
                reraise_interruption(error)
                yield False
                return
            else:
                break
        try:
            yield True
        finally:
            file_locks.unlock(lock)
    finally:
        os.close(lock)


class HasFile(Protocol):
    """An object whose methods run on a connection: a part of the store, or the records."""

    @property
    def file(self) -> SQLiteFile: ...


H = TypeVar("H", bound=HasFile)


def on_connection(
    method: Callable[Concatenate[H, sqlite3.Connection, P], T],
) -> Callable[Concatenate[H, P], T]:
    """Decorator: run the method on a connection of the pool."""
    return _decorated(method)


def in_transaction(
    *, durable: bool = False
) -> Callable[
    [Callable[Concatenate[H, sqlite3.Connection, P], T]],
    Callable[Concatenate[H, P], T],
]:
    """Decorator: run the method in a write transaction. ``durable``: force it to the disk."""

    def decorate(
        method: Callable[Concatenate[H, sqlite3.Connection, P], T],
    ) -> Callable[Concatenate[H, P], T]:
        return _decorated(method, transaction=True, durable=durable)

    return decorate


def _decorated(
    method: Callable[Concatenate[H, sqlite3.Connection, P], T], **how: bool
) -> Callable[Concatenate[H, P], T]:
    @functools.wraps(method)
    def call(caller: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return caller.file.within(lambda db: method(caller, db, *args, **kwargs), **how)

    del call.__wrapped__  # its signature differs
    return call


class SQLiteFile:
    """The file at ``path``. A call waits at most ``timeout`` seconds for other writers.

    ``tables``: statements that create further tables if they don't exist, and columns added later.
    """

    def __init__(
        self, path: str | os.PathLike[str], timeout: float, tables: Sequence[str | AddedColumn] = ()
    ) -> None:
        self.path = Path(path)
        self._timeout = timeout
        self.tables = tables
        self._file: _File | None = None
        self._look_at = 0.0  # of time.monotonic
        self._warned_of_folder = False
        self._start_pool()
        process.notice()
        with _opened.forking:  # a fork goes through the files
            _opened.files.add(self)

    def data_version(self) -> tuple[int, int]:
        """Changes whenever another connection has written to the file.

        Uses its own connection, which stays open until ``forget_data_version`` or a fork.
        """

        def look(db: sqlite3.Connection) -> tuple[int, int]:
            (version,) = db.execute("PRAGMA data_version").fetchone()
            return db.number, version  # type: ignore[attr-defined]  # one of ours

        return self.within(look, watching=True)

    def forget_data_version(self) -> None:
        """Close the connection that ``data_version`` keeps."""
        _close_all(self._watching)

    def within(
        self,
        work: Callable[[sqlite3.Connection], T],
        *,
        transaction: bool = False,
        durable: bool = False,
        watching: bool = False,
    ) -> T:
        """Run ``work`` on a connection of this process, and translate its errors.

        This isn't a context manager: an interrupt could leave one in the middle, and its finalizer,
        which runs later, may be interrupted too. After success a connection goes back into the
        pool; otherwise it is closed.
        """
        process.notice()
        if time.monotonic() >= self._look_at:
            self._look_for_file()
        pool = self._watching if watching else self._pool
        db: _Connection | None = None
        keep = True
        try:
            try:
                db = pool.pop()
            except IndexError:
                # Otherwise C code may fork the process, without calling Python's hooks.
                keep = watching or is_at_work()

                db = self._open()
            db.wait_at_most(time_left(self._timeout))
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
            # Never reuse a connection in an unknown state.
            if db is not None:
                db.close()
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_READONLY:
                _close_all(pool)  # they were opened read-only, and would stay so
            busy = code == sqlite3.SQLITE_BUSY
            raise StoreUnavailable(f"sqlite: {error}", contention=busy) from error
        except BaseException:
            if db is not None:
                db.close()
            raise
        self._give_back(db, pool if keep else None)
        return answer

    def _give_back(self, db: _Connection, pool: deque[_Connection] | None) -> None:
        if pool is None or len(pool) >= _KEEP_IDLE:
            db.close()
            return
        pool.append(db)
        if pool is not self._pool and pool is not self._watching:  # it was replaced
            _close_all(pool)

    def _start_pool(self) -> None:
        self._pool: deque[_Connection] = deque()
        self._watching: deque[_Connection] = deque()  # at most one
        closing(self, partial(_close_all, self._pool))
        closing(self, partial(_close_all, self._watching))

    def _look_for_file(self) -> None:
        """Stop using a deleted or replaced file: other processes use the one at the path."""
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
            if self._file not in (None, file):
                pools = self._pool, self._watching
                self._start_pool()
                for pool in pools:
                    _close_all(pool)
            self._file = file  # last, so that after an interrupt the next look does the rest

    def _open(self) -> _Connection:
        try:
            if not self.path.exists():
                self._make_file()
            self._secure_files()
        except OSError as error:
            reraise_interruption(error)
            raise StoreUnavailable(f"sqlite: cannot open {self.path}: {error.strerror}") from error
        self._look_for_file()  # and check again, since it may be deleted in between
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
                timeout=time_left(self._timeout),
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
        """Create the file, after removing the -wal and -shm files of a deleted one.

        SQLite would reuse them and truncate memory that connections to the deleted file still
        share, which would crash those processes.
        """
        path = Path(os.path.realpath(self.path))  # SQLite follows links
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _folder_lock(path.parent, time_left(self._timeout)) as alone, _opened.lock:
            if path.exists():
                return
            for left in ("-wal", "-shm") if alone else ():
                Path(f"{path}{left}").unlink(missing_ok=True)
            # Only on a file that no connection of this process has open: closing any descriptor of
            # a file drops all locks that the process holds on it.
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def _secure_files(self) -> None:
        """Revoke the rights of other users to the file and SQLite's files beside it."""
        if is_foreign_link(self.path):
            raise SettingError(
                f"SESSION_STORE: {self.path} is another user's symbolic link, which could lead "
                "anywhere: use the path of the file itself"
            )
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
                "Every user of this machine can replace %s: run chmod o-w %s",
                path,
                folder,
            )

    def _prepare(self, db: sqlite3.Connection) -> None:
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (schema_version,) = db.execute("PRAGMA user_version").fetchone()
        if application_id != APPLICATION_ID or schema_version != SCHEMA_VERSION:
            self._create_schema(db)
        for statement in self.tables:
            if isinstance(statement, AddedColumn):
                statement.add(db)
            else:
                db.execute(statement)
        db.execute("PRAGMA synchronous=NORMAL")
        # Otherwise the log would keep the disk space of one large removal forever.
        db.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
        # Malformed text must count as a corrupt record, not as an outage.
        db.text_factory = lambda text: text.decode("utf-8", "replace")

    def _create_schema(self, db: sqlite3.Connection) -> None:
        self._switch_to_wal(db)
        db.execute("BEGIN IMMEDIATE")
        try:
            (application_id,) = db.execute("PRAGMA application_id").fetchone()
            (schema_version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application_id != APPLICATION_ID and tables:
                raise SettingError(
                    f"SESSION_STORE: {self.path} is the SQLite database of another program; "
                    "use a separate file for sessions"
                )
            if schema_version > SCHEMA_VERSION:
                raise SettingError(
                    f"SESSION_STORE: {self.path} was written by a newer Flask-GSession: upgrade "
                    "this installation, or use another file"
                )
            if schema_version < SCHEMA_VERSION:
                db.execute(
                    "DROP TABLE IF EXISTS gsession_lease"
                )  # leases need not survive an upgrade
            for statement in (*SCHEMA.split(";"), *TRIGGERS):
                db.execute(statement)
            db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _switch_to_wal(self, db: sqlite3.Connection) -> None:
        # SQLite's busy timeout doesn't cover this switch, and workers start at the same time.
        until = deadline(self._timeout)
        while True:
            try:
                db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() >= until:
                    raise
            time.sleep(0.01)

    def close(self) -> None:
        """Close idle connections."""
        _close_all(self._pool)
        _close_all(self._watching)
