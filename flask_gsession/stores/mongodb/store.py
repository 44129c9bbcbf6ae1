"""Sessions in MongoDB 5.0 or newer: one document per session, the payload as one binary field.

Writes are acknowledged by a majority. Loads read from the primary, by default its own latest data.
A TTL index removes expired documents. Since it may be a minute late, each read and write also
checks the expiry.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from pymongo import MongoClient

from ...live.listener import Listener
from ..base import Deleted, Record, Store
from ..support import StoreOptions, closing
from .blobs import MongoDBBlobs
from .changes import MongoDBSource
from .driver import Call, Document, Driver
from .foreign import MongoDBDocuments
from .health import MongoDBChecks
from .journal import MongoDBJournal
from .layout import Layout
from .leases import MongoDBLeases
from .records import Records
from .scans import MongoDBScans


class MongoDBStore(Store):
    """Keeps records in the collection ``gsession`` of the URL's database (default ``gsession``).

    ``url_or_client``: a URL, or an existing ``MongoClient``, which is never closed. For a URL, each
    worker process makes a client at first use.
    """

    def __init__(
        self, url_or_client: str | MongoClient[Document], options: StoreOptions | None = None
    ):
        self._options = options = options or StoreOptions()
        self.driver = Driver(url_or_client, options)
        layout = Layout(options.prefix, options.clock)
        self._records = Records(self.driver, layout)
        self.leases = MongoDBLeases(self._records)
        self.blobs = MongoDBBlobs(self.driver, layout)
        self.scans = self.upkeep = self.counts = scans = MongoDBScans(self.driver, layout)
        self.journal = MongoDBJournal(self._records, scans)
        self.checks = MongoDBChecks(self.driver, layout)
        self.changes = self._listener = Listener(MongoDBSource(self.driver, options.prefix))
        closing(self, self._listener.close)
        closing(self, self.driver.close)

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
        self.driver.close()

    def documents(self, database: str, collection: str) -> MongoDBDocuments:
        """The documents that another package keeps in a collection of this server."""
        return MongoDBDocuments(self.driver, self._options, database, collection)

    def lend_collection(self, operation: str) -> AbstractContextManager[Any]:
        """The collection of the sessions, for other packages, for the time of one call.

        The driver's errors in the ``with`` block become ``StoreUnavailable``, which names the
        ``operation``. An interrupt may leave the block's deadline in the current context, so run it
        in a copy (``contextvars.copy_context``).
        """
        return Call(self.driver, operation)
