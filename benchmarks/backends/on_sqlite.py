"""SQLite: ours, Flask-Session's SQLAlchemy store and the bare sqlite3 module, a file each."""

from __future__ import annotations

import gc
import shutil
import sqlite3
import tempfile
import weakref
from collections import Counter
from contextlib import ExitStack, closing, suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path

from flask import Flask
from flask_session import Session as FlaskSession  # type: ignore[import-untyped]
from flask_sqlalchemy import SQLAlchemy

from benchmarks.backends.base import Traffic
from benchmarks.measure import Call
from flask_gsession import Session


class SqliteBackend:
    """Three fresh files in one fresh directory, so on one disk.

    Each extension keeps its own defaults, and they differ: Flask-Session's rollback journal is
    flushed to the disk at each commit, our write-ahead log at checkpoints, logouts and rotations.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="gsession-bench-"))
        self._opened = ExitStack()

    def flask_session(self, app: Flask) -> None:
        app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{self._directory / 'theirs.sqlite3'}"
        app.config["SESSION_SQLALCHEMY"] = database = SQLAlchemy(app)
        app.config["SESSION_TYPE"] = "sqlalchemy"
        FlaskSession(app)
        with app.app_context():
            self._opened.callback(database.engine.dispose)

    def ours(self, app: Flask) -> None:
        session = Session(
            app, store=f"sqlite:///{self._directory / 'ours.sqlite3'}", newcomers_per_minute=None
        )
        self._opened.callback(session.close, app)

    def floor(self) -> BareSqlite:
        return BareSqlite(self._directory / "ours.sqlite3", self._directory / "floor.sqlite3")

    def traffic(self, call: Call, times: int) -> Traffic:
        """Counts statements by SQLite's own trace hook. There are no bytes on a wire to count."""
        seen: Counter[str] = Counter()

        def note(statement: str) -> None:
            seen[statement.split(None, 1)[0].upper()] += 1

        # Nobody keeps a list of the connections in use, but the garbage collector knows them.
        connections = [found for found in gc.get_objects() if type(found) is sqlite3.Connection]
        _trace(connections, note)
        for _ in range(times):
            call()
        _trace(connections, None)
        commands = {name: n / times for name, n in seen.items()}
        return Traffic(round_trips=sum(commands.values()), commands=commands)

    def versions(self) -> dict[str, str]:
        return {"SQLite": sqlite3.sqlite_version, "SQLAlchemy": version("SQLAlchemy")}

    def close(self) -> None:
        self._opened.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class BareSqlite:
    """The SELECT of a load and the UPDATE of a save, on a copy of our file."""

    SELECT = (
        "SELECT version, created_at, idle_expires_at, absolute_expires_at, payload, successor "
        "FROM gsession WHERE key = ?"
    )
    UPDATE = (
        "UPDATE gsession SET version = ?, created_at = ?, idle_expires_at = ?, "
        "absolute_expires_at = ?, payload = ? "
        "WHERE key = ? AND version = ? AND idle_expires_at > ?"
    )

    def __init__(self, ours: Path, copy: Path) -> None:
        self._database = sqlite3.connect(copy, isolation_level=None)
        weakref.finalize(self, self._database.close)
        with closing(sqlite3.connect(ours)) as source:
            source.backup(self._database)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        ((self._key,),) = self._database.execute("SELECT key FROM gsession")
        self._fresh = count()

    def read(self) -> object:
        return self._database.execute(self.SELECT, (self._key,)).fetchone()

    def write(self) -> object:
        old, created, idle, absolute, payload, _ = self._database.execute(
            self.SELECT, (self._key,)
        ).fetchone()
        fresh = next(self._fresh)
        payload = payload[:-8] + b"%08d" % (fresh % 100_000_000)
        done = self._database.execute(
            self.UPDATE,
            (old ^ 1, created, idle + fresh % 2, absolute, payload, self._key, old, created),
        )
        if done.rowcount != 1:
            raise RuntimeError("the floor's own row is gone")
        return None


def _trace(connections: list[sqlite3.Connection], note: object) -> None:
    for connection in connections:
        # Closed connections and those from other threads refuse this; our requests use neither.
        with suppress(sqlite3.ProgrammingError):
            connection.set_trace_callback(note)  # type: ignore[arg-type]
