"""A store for a node near its users, which keeps working while the centre can't be reached."""

from .address import EdgeAddress
from .store import EdgeStore

__all__ = ["EdgeAddress", "EdgeStore"]
