"""Identifies visitors for other services, and serves session values or the store over gRPC."""

from .. import protocol as _before_grpc  # noqa: F401  # it quiets gRPC
