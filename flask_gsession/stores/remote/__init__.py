"""A store in another process, over gRPC. The other end is ``flask gsession serve``."""

from ... import protocol as _before_grpc  # noqa: F401  # it quiets gRPC
from .address import Address
from .store import RemoteStore

__all__ = ["Address", "RemoteStore"]
