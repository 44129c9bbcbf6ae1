"""A store in another process, asked over gRPC: ``flask gsession serve`` is its other end."""

from .address import Address
from .store import RemoteStore

__all__ = ["Address", "RemoteStore"]
