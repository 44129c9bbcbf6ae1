"""Sessions in one SQLite file, shared by all workers of one machine: the embedded default.

WAL mode, one short immediate transaction per write. A save survives the end of the process. A
deletion and a rotation are also forced to the disk (``synchronous=FULL``), so that a power cut
cannot bring back a session that was logged out. Every create removes up to two expired records, so
that the file does not grow without limit.
"""

from __future__ import annotations

import os

from ...live.listener import Listener
from ..base import Deleted, Record, Store
from ..support import StoreOptions, closing
from .blobs import SQLiteBlobs
from .changes import SQLiteSource
from .file import SQLiteFile
from .health import SQLiteChecks
from .journal import SQLiteJournal
from .layout import Layout
from .leases import SQLiteLeases
from .records import Records
from .scans import SQLiteScans


class SQLiteStore(Store):
    """Keeps records in the file at ``path``, created with mode 0600 and with its folder if missing.

    An existing file loses the rights of other users, with a warning in the log.

    Safe with threads, gevent and several processes. Connections are closed before ``os.fork``, and
    after each use outside a request. In a process that was forked while one was open, such as by C
    code after a request, calls raise ``StoreUnavailable``, since SQLite would damage the file.
    Raises ``SettingError`` if the file belongs to another program or user.
    """

    def __init__(self, path: str | os.PathLike[str], options: StoreOptions | None = None) -> None:
        options = options or StoreOptions()
        self.file = SQLiteFile(path, options.timeout)
        self.path = self.file.path
        layout = Layout(options.prefix, options.clock)
        self._records = Records(self.file, layout)
        self.bulk = self._records
        self.leases = SQLiteLeases(self._records)
        self.blobs = SQLiteBlobs(self.file, layout)
        self.scans = self.upkeep = self.counts = scans = SQLiteScans(self.file, layout)
        self.journal = SQLiteJournal(self._records, scans)
        self.checks = SQLiteChecks(self.file)
        self.changes = self._listener = Listener(SQLiteSource(self.file, options.timeout))
        closing(self, self._listener.close)
        closing(self, self.file.close)

    def create(self, record: Record) -> None:
        self._records.create(record)

    def load(self, key: str) -> Record | None:
        return self._records.load(key)

    def save(self, record: Record, expected_version: int, *, shorten: bool = False) -> None:
        self._records.save(record, expected_version, shorten=shorten)

    def renew(self, record: Record, idle_expires_at: int) -> bool:
        return self._records.renew(record, idle_expires_at)

    def replace(
        self,
        key: str,
        record: Record,
        expected_version: int,
        pointer: Record | None,
        *,
        shorten: bool = False,
    ) -> None:
        self._records.replace(key, record, expected_version, pointer, shorten=shorten)

    def delete(self, key: str, expected_version: int | None = None) -> Deleted:
        return self._records.delete(key, expected_version)

    def close(self) -> None:
        self._listener.close()
        self.file.close()
