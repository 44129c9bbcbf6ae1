"""A store for a node near its users, that goes on while the centre can't be reached."""

from .address import EdgeAddress
from .store import EdgeStore

__all__ = ["EdgeAddress", "EdgeStore"]
