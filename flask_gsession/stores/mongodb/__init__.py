"""Sessions in MongoDB."""

from .store import MongoDBStore, check_url

__all__ = ["MongoDBStore", "check_url"]
