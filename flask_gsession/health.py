"""The store checks, for applications that run them themselves."""

from .operate.health import check_store

__all__ = ["check_store"]
