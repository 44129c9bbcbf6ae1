"""A store in another process, asked over gRPC: ``flask gsession serve`` is its other end."""

from ... import protocol as _before_grpc  # noqa: F401  # it quiets gRPC
from .address import Address
from .store import RemoteStore

__all__ = ["Address", "RemoteStore"]
