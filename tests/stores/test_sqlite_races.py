"""SQLite connections while another thread closes them, or the file is replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from flask_gsession.stores import StoreOptions
from flask_gsession.stores.sqlite import file as sqlite
from flask_gsession.stores.sqlite.store import SQLiteStore
from flask_gsession.testing import a_record
from tests.harness.interleaving import before_line


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(tmp_path / "sessions.sqlite3", StoreOptions())
    store.create(a_record(time.time))
    yield store
    store.close()


def connections(store: SQLiteStore) -> int:
    return len(store.file._pool) + len(store.file._watching)


def test_connections_are_closed_while_a_call_takes_the_last(store: SQLiteStore) -> None:
    file = store.file
    file._give_back(file._open(), file._pool)
    file._give_back(file._open(), file._pool)
    with before_line(sqlite._close_all, "pool.pop()", lambda: sqlite._close_all(file._pool)):
        store.close()
    assert not file._pool


def test_a_connection_to_a_replaced_file_does_not_stay_open(store: SQLiteStore) -> None:
    file = store.file

    def replace() -> None:
        os.rename(file.path, f"{file.path}.old")
        file._look_for_file()

    db = file._open()
    with before_line(type(file)._give_back, "pool.append(db)", replace):
        file._give_back(db, file._pool)
    assert db not in sqlite._opened.connections


def test_a_file_that_is_opened_during_a_fork_waits_for_it(tmp_path: Path) -> None:
    """The fork goes through all files, and would fail if their set changed meanwhile."""
    opening = Thread(target=sqlite.SQLiteFile, args=(tmp_path / "other.sqlite3", 1.0))
    with sqlite._opened.forking:
        opening.start()
        opening.join(0.1)
        assert opening.is_alive()
    opening.join(30)
    assert not opening.is_alive()


def test_a_file_is_opened_in_a_child_of_a_fork_in_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the parent may have held the lock."""
    held, noticed = Event(), Event()

    def hold() -> None:
        with sqlite._opened.forking:
            held.set()
            noticed.wait(5)

    Thread(target=hold).start()
    held.wait(30)
    monkeypatch.setattr(sqlite.process, "notice", noticed.set)
    sqlite.SQLiteFile(tmp_path / "other.sqlite3", 1.0)
    assert noticed.is_set()


class Interrupt(BaseException):
    """Raised by a signal handler."""


def test_an_interrupt_while_the_file_is_replaced_loses_nothing(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, record = store.file, a_record(time.time)
    file._give_back(file._open(), file._pool)
    os.rename(file.path, f"{file.path}.old")

    def strike() -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(file, "_start_pool", strike)
        with pytest.raises(Interrupt):
            file._look_for_file()
    file._look_at = 0.0
    store.create(record)
    other = SQLiteStore(file.path, StoreOptions())
    assert other.load(record.key) == record
    other.close()
