"""The shop's own SQLite file: people, stock and orders. It holds no sessions."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from .instance import create_once

BUSY_TIMEOUT = 10.0  # seconds that a writer waits for the one before it

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE people (
    name TEXT PRIMARY KEY,
    full_name TEXT NOT NULL,
    password_hash TEXT NOT NULL
) STRICT;
CREATE TABLE stock (
    sku TEXT PRIMARY KEY,
    stock INTEGER NOT NULL CHECK (stock >= 0)
) STRICT;
CREATE TABLE orders (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    buyer TEXT NOT NULL REFERENCES people (name),
    token TEXT NOT NULL,
    placed_at TEXT NOT NULL,
    UNIQUE (buyer, token)
) STRICT;
CREATE TABLE order_lines (
    number INTEGER NOT NULL REFERENCES orders (number),
    sku TEXT NOT NULL,
    name TEXT NOT NULL,
    price INTEGER NOT NULL,
    quantity INTEGER NOT NULL CHECK (quantity > 0),
    PRIMARY KEY (number, sku)
) STRICT;
"""


class Database:
    """Short-lived connections to one file, so threads and forked workers share nothing.

    :param path: the SQLite file; made with its tables when it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        create_once(path, _create_tables)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read from."""
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
        with closing(connection):
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is alone in writing; an exception inside it undoes all of it."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")


def _create_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
