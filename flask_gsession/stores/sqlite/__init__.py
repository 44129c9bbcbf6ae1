"""Sessions in an SQLite file: the embedded default.

``file`` has the connections, ``layout`` the tables, ``records`` the verbs. ``leases``, ``blobs``,
``scans`` and ``health`` are the parts of ``store``.
"""

from .store import SQLiteStore

__all__ = ["SQLiteStore"]
