"""Sessions in MongoDB.

``driver`` has the client and the set-up of each call, ``layout`` the documents, ``records`` the
verbs. ``leases``, ``blobs``, ``scans`` and ``health`` are the parts of ``store``.
"""

from .driver import check_url
from .store import MongoDBStore

__all__ = ["MongoDBStore", "check_url"]
