"""Changes of sessions in an SQLite file, found by polling ten times a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable

from ...errors import StoreUnavailable
from ...live.listener import Heard
from .file import SQLiteFile

_INTERVAL = 0.1  # seconds


class SQLiteSource:
    """The file, as a listener's only server."""

    unproven = "SQLite answers within microseconds, so a cache would gain nothing"
    one_feed = True

    def __init__(self, file: SQLiteFile, timeout: float) -> None:
        self._file = file
        self.timeout = timeout
        self.moved: Callable[[], object] = bool
        self.shifted: Callable[[], object] = bool

    def servers(self) -> Iterable[Hashable]:
        return ("",)

    def server_of(self, key: str) -> Hashable:
        return ""

    def open(self, server: Hashable) -> SQLiteChanges:
        return SQLiteChanges(self._file)


class SQLiteChanges:
    """Notices that the file changed, but not which records."""

    def __init__(self, file: SQLiteFile) -> None:
        self._file = file
        self._shut = threading.Event()
        self._version = file.data_version()

    def read(self, seconds: float) -> Heard:
        if self._shut.wait(min(seconds, _INTERVAL)):
            raise StoreUnavailable("sqlite: closed")
        before, self._version = self._version, self._file.data_version()
        return Heard([], more=self._version != before)

    def beat(self) -> None:
        """Never called, since a beat would prove nothing."""

    def shut(self) -> None:
        self._shut.set()

    def close(self) -> None:
        self._file.forget_data_version()
