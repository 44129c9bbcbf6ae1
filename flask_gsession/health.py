"""The checks of a store, for an application that makes them itself."""

from .operate.health import check_store

__all__ = ["check_store"]
