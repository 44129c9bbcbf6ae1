"""Sessions in an SQLite file: the embedded default."""

from .store import SQLiteStore

__all__ = ["SQLiteStore"]
