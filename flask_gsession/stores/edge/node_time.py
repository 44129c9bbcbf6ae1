"""The time of a node: how old its copies are, whatever somebody does to the system's clock."""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from ...errors import StoreUnavailable
from ...processes import process
from ..base import Clock, milliseconds
from ..sqlite.file import SQLiteFile

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SECOND = 1000  # milliseconds that the clock may gain before the other processes must hear of it
_NEVER = -(1 << 62)


def since_boot() -> float:
    """Seconds since the machine started, with those that it slept. The same in all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot_id() -> str:
    """Names this start of the machine; "" where no clock is the same in all processes."""
    try:
        return _BOOT_ID.read_text().strip() if hasattr(time, "CLOCK_BOOTTIME") else ""
    except OSError:
        return ""


class NodeTime:
    """Follows ``clock`` forward. If that is set back, it goes on by ``elapsed``, in seconds.

    The processes of a node agree on it by the node's file: the largest difference that any of
    them has seen between the two. After a restart of the machine they begin with ``clock``.
    """

    def __init__(self, file: SQLiteFile, clock: Clock, elapsed: Clock | None = None) -> None:
        self._file = file
        self._clock = clock
        self._boot = ""
        if elapsed is None:
            # A test's clock says how much time has passed, too.
            self._boot = _boot_id() if clock is time.time else ""
            elapsed = since_boot if self._boot else time.monotonic if clock is time.time else clock
        self._elapsed = elapsed
        self._ahead = 0
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._agreed = _NEVER  # the difference that the others know of

    def __call__(self) -> int:
        """The time in milliseconds."""
        elapsed = int(self._elapsed() * 1000)
        self._ahead = max(self._ahead, milliseconds(self._clock) - elapsed)
        return self._ahead + elapsed

    def agree(self) -> None:
        """Compare notes with the other processes, if there is news. Not within a transaction."""
        if self._ahead - self._agreed <= _SECOND:
            return
        self()
        self._agreed = self._ahead
        with suppress(StoreUnavailable):  # a full disk, for example
            if self._boot:
                self._ahead = max(self._ahead, self._file.within(self._noted))

    def disagrees(self) -> None:
        """A time of another process lies in the future: agree again."""
        self._agreed = _NEVER

    def _noted(self, db: sqlite3.Connection) -> int:
        boot, ahead = db.execute("SELECT boot, ahead FROM gsession_edge_node").fetchone()
        if boot == self._boot and self._ahead - ahead <= _SECOND:
            return int(ahead)
        db.execute(
            "UPDATE gsession_edge_node SET boot = ?, ahead = ? WHERE boot <> ? OR ahead < ?",
            (self._boot, self._ahead) * 2,
        )
        return self._ahead
