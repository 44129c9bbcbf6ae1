"""The time of a node, for the age of its copies, even if the system's clock is changed."""

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
_SECOND = 1000  # milliseconds that the clock may gain before the other processes must know
_NEVER = -(1 << 62)


def since_boot() -> float:
    """Seconds since the machine booted, including sleep. The same in all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot_id() -> str:
    """An id of this boot of the machine; "" if no clock is the same in all processes."""
    try:
        return _BOOT_ID.read_text().strip() if hasattr(time, "CLOCK_BOOTTIME") else ""
    except OSError:
        return ""


class NodeTime:
    """Follows ``clock`` forward. If ``clock`` is set back, continues with ``elapsed``, in seconds.

    The processes of a node share, in the node's file, the largest difference between the two that
    any of them has seen. After a reboot they start again from ``clock``.
    """

    def __init__(self, file: SQLiteFile, clock: Clock, elapsed: Clock | None = None) -> None:
        self._file = file
        self._clock = clock
        self._boot = ""
        if elapsed is None:
            # A test's clock also measures elapsed time.
            self._boot = _boot_id() if clock is time.time else ""
            elapsed = since_boot if self._boot else time.monotonic if clock is time.time else clock
        self._elapsed = elapsed
        self._ahead = 0
        self._start()
        process.register(self._start)

    def _start(self) -> None:
        self._agreed = _NEVER  # the difference that is in the file

    def __call__(self) -> int:
        """The time in milliseconds."""
        elapsed = int(self._elapsed() * 1000)
        self._ahead = max(self._ahead, milliseconds(self._clock) - elapsed)
        return self._ahead + elapsed

    def agree(self) -> None:
        """Synchronise with the other processes if needed. Don't call it within a transaction."""
        if self._ahead - self._agreed <= _SECOND:
            return
        self()
        self._agreed = self._ahead
        with suppress(StoreUnavailable):  # a full disk, for example
            if self._boot:
                self._ahead = max(self._ahead, self._file.within(self._noted))

    def disagrees(self) -> None:
        """Synchronise again, because another process's time is in the future."""
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
