"""Sessions in this process's memory: for tests and single-process tools."""

from .store import MemoryStore

__all__ = ["MemoryStore"]
