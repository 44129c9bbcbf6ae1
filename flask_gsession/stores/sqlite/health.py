"""Doctor checks for an SQLite file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from contextlib import suppress

from ..parts import Checks, Finding
from ..rights import OTHERS, others_may_replace
from .file import SQLiteFile, on_connection

_LITTLE_SPACE = 64 * 2**20  # bytes


class SQLiteChecks(Checks):
    """The part ``checks`` of an SQLite store."""

    def __init__(self, file: SQLiteFile) -> None:
        self.file = file

    @on_connection
    def check(self, db: sqlite3.Connection) -> list[Finding]:
        (journal,) = db.execute("PRAGMA journal_mode").fetchone()
        try:
            (sound,) = db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:  # too damaged to list the damage
            sound = str(error)
        folder = self.file.path.parent
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (self.file.path, folder)]
        for beside in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                modes[0] |= stat.S_IMODE(
                    os.stat(f"{os.path.realpath(self.file.path)}{beside}").st_mode
                )
        shared = others_may_replace(folder)
        free = shutil.disk_usage(folder).free
        return [
            Finding("ok", "integrity")
            if sound == "ok"
            else Finding(
                "error",
                "integrity",
                str(sound),
                "Stop the application, then restore the file without -wal and -shm.",
            ),
            Finding("ok", "journal", journal)
            if journal == "wal"
            else Finding(
                "warning",
                "journal",
                journal,
                "Readers and writers block each other: use a local disk.",
            ),
            Finding("ok", "file permissions", f"{modes[0]:o}")
            if not modes[0] & OTHERS
            else Finding(
                "error",
                "file permissions",
                f"{modes[0]:o}",
                f"Other users may read it: chmod 600 {self.file.path}*",
            ),
            Finding("ok", "folder permissions", f"{modes[1]:o}")
            if not shared
            else Finding(
                "error",
                "folder permissions",
                f"{modes[1]:o}",
                f"Other users may replace it: chmod go-w {folder}",
            ),
            Finding("ok", "disk", f"{free >> 20} MiB free")
            if free >= _LITTLE_SPACE
            else Finding(
                "error", "disk", f"{free >> 20} MiB free", "Saves will soon fail: free some space."
            ),
        ]
